"""Experts and what stands between them and a game: answers of all kinds, ways, talks, battles, files."""

import json

import numpy as np
import pytest

from pokemon_env import experts
from pokemon_env.examples.code_agent import CodeAgentExpert, make_game_state
from pokemon_env.examples.code_agent import make_expert as make_code_agent
from pokemon_env.experts import (
    BUTTONS,
    Driver,
    EpisodeEnd,
    ScriptedExpert,
    distance_field,
    make_expert,
    normalize_action,
)

PICTURE = np.zeros((160, 240, 3), np.uint8)
NAMES = list(BUTTONS)
MOVES = {"UP": (0, -1), "DOWN": (0, 1), "LEFT": (-1, 0), "RIGHT": (1, 0)}
SIDES = {"UP": "north", "DOWN": "south", "LEFT": "west", "RIGHT": "east"}


# answers --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "answer,numbers",
    [
        (3, [3]),
        (np.int64(9), [9]),
        (np.array(2), [2]),
        ("A", [0]),
        (" down ", [5]),
        ("left", [6]),
        ({"action": "b"}, [1]),
        ({"action": ["up", "a"], "why": "a tree"}, [4, 0]),
        (["up", 5, {"action": "R"}], [4, 5, 9]),
        (np.array([1, 2]), [1, 2]),
        (("start",), [2]),
    ],
)
def test_answers_that_mean_something(answer, numbers):
    assert normalize_action(answer, NAMES, 10) == numbers


@pytest.mark.parametrize(
    "answer", [None, -1, 10, "no_op", "", [], {}, {"act": "a"}, True, 1.0, np.array(1.5), ["a", "x"], [[]], object()]
)
def test_answers_that_mean_nothing_are_refused(answer):
    with pytest.raises(ValueError, match="the expert answered"):
        normalize_action(answer, NAMES, 10)


def test_names_need_names():
    assert normalize_action(1, None, 2) == [1]
    with pytest.raises(ValueError, match="expected 0 to 1$"):
        normalize_action("A", None, 2)


class Scripted:
    """Answers what it is told to, an exception by raising it."""

    def __init__(self, *answers):
        self.answers, self.asked, self.log = list(answers), 0, []

    def seed(self, seed):
        self.log.append(seed)

    def reset(self, info):
        self.log.append(info)

    def get_action(self, obs, info):
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_a_list_is_played_to_its_end_unless_something_else_was_played():
    expert = Scripted(["up", "up", "a"], "b", ["left", "left"], "right")
    driver = Driver(expert, NAMES, 10)
    driver.reset({"n": 1}, seed=5)
    assert expert.log == [5, {"n": 1}]
    taken = None
    for expected in (4, 4, 0, 1, 6):
        action, error = driver.action(PICTURE, {}, taken)
        assert (action, error) == (expected, "")
        taken = action
    assert expert.asked == 3
    assert driver.action(PICTURE, {}, taken=0) == (7, "")  # the second left is not said any more
    driver.queue.extend([1, 1])
    driver.reset({}, None)
    assert not driver.queue


def test_an_error_is_told_and_no_action_invented():
    driver = Driver(Scripted(RuntimeError("no\n  answer"), "jump", ["a", 99], "a", EpisodeEnd("over")), NAMES, 10)
    driver.reset({})
    assert driver.action(PICTURE, {}) == (-1, "RuntimeError: no answer")
    assert driver.action(PICTURE, {})[0] == -1
    assert driver.action(PICTURE, {})[0] == -1 and not driver.queue
    assert driver.action(PICTURE, {}) == (0, "")
    assert driver.action(PICTURE, {})[1].startswith("EpisodeEnd: ")


def test_an_expert_that_cannot_reset_gives_no_action_in_that_episode():
    expert = Scripted("a", "a")
    expert.reset = lambda info: 1 / info["n"]
    driver = Driver(expert, NAMES, 10)
    driver.reset({"n": 0})
    assert driver.action(PICTURE, {}) == driver.action(PICTURE, {}) == (-1, "ZeroDivisionError: division by zero")
    driver.reset({"n": 1})
    assert driver.action(PICTURE, {}) == (0, "")


def test_ctrl_c_passes_through():
    driver = Driver(Scripted(KeyboardInterrupt()), NAMES, 10)
    with pytest.raises(KeyboardInterrupt):
        driver.action(PICTURE, {})


# ways -----------------------------------------------------------------------------------------------------------------
def naive_distances(rows, goals, blocked):
    """Relaxes all cells until nothing changes."""
    inside = [(x, y) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell == "."]
    far = {cell: 0 if cell in goals else 10**6 for cell in set(inside) | set(goals)}
    for _ in range(len(inside) + 1):
        for x, y in inside:
            if (x, y) not in blocked and (x, y) not in goals:
                far[x, y] = min([far[x, y], *(1 + far.get((x + a, y + b), 10**6) for a, b in MOVES.values())])
    return {cell: d for cell, d in far.items() if d < 10**6}


@pytest.mark.parametrize("seed", range(8))
def test_distances(seed):
    rng = np.random.default_rng(seed)
    rows = tuple("".join(rng.choice(list(".#"), 9, p=[0.7, 0.3])) for _ in range(7))
    free = [(x, y) for y in range(7) for x in range(9) if rows[y][x] == "."]
    picks = [free[i] for i in rng.permutation(len(free))[:6]]
    goals, blocked = frozenset(picks[:2]), frozenset(picks[2:])
    assert distance_field(rows, goals, blocked) == naive_distances(rows, goals, blocked)


def info_at(rows, x, y, facing="south", **changes) -> dict:
    """What PokemonEnv tells on the quest's first map, on the field."""
    place = {"collision": list(rows), "warps": [], "connections": {}, "objects": []}
    place |= {key: changes.pop(key) for key in list(changes) if key in place}
    info = {
        "game": "quest",
        "player": {"name": "ANN", "x": x, "y": y, "facing": facing, "map": [0, 16], "location": "ROUTE 101"},
        "party": [],
        "items": {},
        "money": 0,
        "badges": [False] * 8,
        "flags": [],
        "map": place,
        "dialogue": False,
        "locked": False,
        "battle": None,
        "menu": "none",
        "milestones": {"completed": [], "next": None, "total": 14, "new": []},
    }
    return info | changes


ROUTE = [  # the bag is at (4, 8), the goal without a creature
    "################",
    "#......#.......#",
    "#.####.#.#####.#",
    "#.#..#.#.#...#.#",
    "#.#..#...#...#.#",
    "#.#..#####...#.#",
    "#.#..........#.#",
    "#.##.#########.#",
    "#...#..........#",
    "#.#............#",
    "################",
]


def walk(expert: ScriptedExpert, info: dict, limit: int = 100) -> list[str]:
    """Buttons until A; walls and people stop a step, which still turns."""
    buttons = []
    while len(buttons) < limit:
        button = NAMES[expert.get_action(PICTURE, info)]
        buttons.append(button)
        if button == "A":
            return buttons
        if button in MOVES:
            player = info["player"]
            cell = player["x"] + MOVES[button][0], player["y"] + MOVES[button][1]
            player["facing"] = SIDES[button]
            people = [tuple(person) for person in info["map"]["objects"]]
            if info["map"]["collision"][cell[1]][cell[0]] == "." and cell not in people:
                player["x"], player["y"] = cell
    raise AssertionError(f"still walking after {limit} steps")


def test_it_takes_a_shortest_way_turns_to_the_goal_and_presses_a():
    expert = ScriptedExpert()
    for y, row in enumerate(ROUTE):
        for x, cell in enumerate(row):
            if cell == ".":
                info = info_at(ROUTE, x, y, "south")
                beside = {(3, 8), (5, 8), (4, 9), (4, 7)}
                way = naive_distances(ROUTE, beside, set())[x, y]
                buttons = walk(expert, info)
                me = info["player"]["x"], info["player"]["y"]
                assert me in beside and len([b for b in buttons if b in MOVES]) in (way, way + 1)
                dx, dy = MOVES[next(b for b, side in SIDES.items() if side == info["player"]["facing"])]
                assert (me[0] + dx, me[1] + dy) == (4, 8)


def test_equally_short_ways_are_taken_in_a_fixed_order():
    open_field = ["." * 20] * 20
    expert = ScriptedExpert()
    assert walk(expert, info_at(open_field, 12, 15))[:6] == ["UP"] * 6
    assert walk(expert, info_at(open_field, 0, 0))[:7] == ["DOWN"] * 7


def test_it_depends_on_what_it_is_shown_alone():
    fresh = [NAMES[ScriptedExpert().get_action(PICTURE, info_at(ROUTE, x, 1))] for x in (1, 3, 6, 8, 12)]
    used = ScriptedExpert()
    walk(used, info_at(ROUTE, 14, 9))
    assert [NAMES[used.get_action(PICTURE, info_at(ROUTE, x, 1))] for x in (1, 3, 6, 8, 12)] == fresh


def test_people_are_walked_around_and_waited_for():
    rows = ["." * 9] * 9
    assert NAMES[ScriptedExpert().get_action(PICTURE, info_at(rows, 4, 2))] == "DOWN"
    assert NAMES[ScriptedExpert().get_action(PICTURE, info_at(rows, 4, 2, objects=[[4, 3]]))] in ("LEFT", "RIGHT")
    tube = ["####.####"] * 7 + ["####.####"]
    assert NAMES[ScriptedExpert().get_action(PICTURE, info_at(tube, 4, 2, objects=[[4, 3]]))] == "B"
    far = info_at(tube, 4, 2, objects=[[4, 5]])
    assert NAMES[ScriptedExpert().get_action(PICTURE, far)] == "DOWN"  # they may be gone until then
    unseen = info_at(["." * 30] * 30, 4, 20, objects=[[4, 12]])
    assert NAMES[ScriptedExpert().get_action(PICTURE, unseen)] == "UP"


def test_a_person_behind_a_counter_is_talked_to_across_it():
    rows = [".......", "#######", ".......", "......."]
    expert, info = ScriptedExpert(), info_at(rows, 0, 3)
    expert_goal = lambda info: ((0, 16), (3, 0))  # noqa: E731
    quest = experts.QUEST.goal
    try:
        experts.QUEST.goal = expert_goal
        info["map"]["objects"] = [[3, 0]]
        walk(expert, info)
    finally:
        experts.QUEST.goal = quest
    assert (info["player"]["x"], info["player"]["y"], info["player"]["facing"]) == (3, 2, "north")


def test_other_doors_are_not_stepped_on():
    rows = [".....", ".....", "....."]
    info = info_at(rows, 0, 1, warps=[[2, 1, 1, 0], [4, 1, 0, 16]])
    info["player"]["map"] = [0, 9]  # to the route, which a door at (4, 1) leads to
    steps, expert = [], ScriptedExpert()
    while (info["player"]["x"], info["player"]["y"]) != (4, 1) and len(steps) < 20:
        button = NAMES[expert.get_action(PICTURE, info)]
        info["player"]["x"] += MOVES[button][0]
        info["player"]["y"] += MOVES[button][1]
        steps.append((info["player"]["x"], info["player"]["y"]))
    assert steps[-1] == (4, 1) and (2, 1) not in steps and len(steps) == 6


def test_maps_are_left_over_an_edge_that_can_be_reached():
    rows = ["..#..", "..#..", "..#.."]
    info = info_at(rows, 0, 2, connections={"north": [0, 16]})
    info["player"]["map"] = [0, 9]
    expert = ScriptedExpert()
    assert NAMES[expert.get_action(PICTURE, info)] == "UP"
    info["player"]["y"] = 0
    assert NAMES[expert.get_action(PICTURE, info)] == "UP"  # over the edge
    info["map"]["connections"] = {"east": [0, 16], "south": [1, 4]}  # east is behind the wall
    assert NAMES[expert.get_action(PICTURE, info)] == "DOWN"
    info["map"]["connections"] = {}
    with pytest.raises(ValueError, match="has no exit"):
        expert.get_action(PICTURE, info)


def test_the_plot_goes_on_with_the_flags():
    flags, goals = [], []
    for mark, _, _ in experts.QUEST.plot:
        goals.append(experts.QUEST.goal(info_at(ROUTE, 1, 1, flags=list(flags))))
        flags.append(mark)
    assert goals == [(place, cell) for _, place, cell in experts.QUEST.plot] and len(set(goals)) == 7
    assert experts.QUEST.goal(info_at(ROUTE, 1, 1, flags=flags)) == (experts.RUSTBORO, None)


# menus and battles ----------------------------------------------------------------------------------------------------
def battle(trainer, menu, cursor, kind="leaf") -> dict:
    enemy = {"species": 1, "level": 5, "hp": 20, "max_hp": 30}
    return info_at(
        ROUTE,
        1,
        1,
        locked=True,
        menu=menu,
        party=[{"hp": 40, "max_hp": 48}],
        battle={"trainer": trainer, "enemy": enemy, "menu": menu, "cursor": cursor, "kind": kind},
    )


def press(cursor: int, button: str) -> int:
    return {"UP": cursor & 1, "DOWN": cursor | 2, "LEFT": cursor & 2, "RIGHT": cursor | 1}[button]


@pytest.mark.parametrize("cursor", range(4))
@pytest.mark.parametrize("trainer,wanted", [(True, 0), (False, 3)])
def test_trainers_are_fought_and_wild_ones_fled(trainer, wanted, cursor):
    for _ in range(3):
        button = NAMES[ScriptedExpert().get_action(PICTURE, battle(trainer, "action", cursor))]
        if button == "A":
            break
        cursor = press(cursor, button)
    assert button == "A" and cursor == wanted


@pytest.mark.parametrize("cursor", [0, 1])
@pytest.mark.parametrize("kind,wanted", [("leaf", 0), ("tide", 1)])
def test_the_strong_move_is_taken(kind, wanted, cursor):
    button = NAMES[ScriptedExpert().get_action(PICTURE, battle(True, "move", cursor, kind))]
    assert button == ("A" if cursor == wanted else "LEFT" if cursor else "RIGHT")
    assert NAMES[ScriptedExpert().get_action(PICTURE, battle(False, "move", cursor, kind))] == "B"
    assert NAMES[ScriptedExpert().get_action(PICTURE, battle(True, "message", cursor, kind))] == "A"


@pytest.mark.parametrize(
    "hp,potions,menu,button",
    [
        (10, 1, "none", "START"),
        (10, 1, "start", "A"),
        (10, 0, "start", "B"),
        (40, 3, "start", "B"),
        (40, 3, "message", "A"),
        (40, 3, "choose", "A"),
    ],
)
def test_potions_and_menus(hp, potions, menu, button):
    items = {"potion": potions}
    info = info_at(ROUTE, 1, 1, party=[{"hp": hp, "max_hp": 48}], items=items, menu=menu, locked=menu != "none")
    assert NAMES[ScriptedExpert().get_action(PICTURE, info)] == button


def test_without_a_potion_or_need_it_walks():
    for hp, items in ((10, {"potion": 0}), (10, {}), (40, {"potion": 3})):
        info = info_at(ROUTE, 1, 1, party=[{"hp": hp, "max_hp": 48}], items=items)
        assert NAMES[ScriptedExpert().get_action(PICTURE, info)] in MOVES


def test_on_emerald_it_goes_to_the_next_place_and_talks_there():
    rows = ["....."] * 5
    info = info_at(rows, 2, 4, game="emerald", menu=None, connections={"north": [0, 10], "south": [0, 9]})
    info["milestones"]["completed"] = [mark for mark, _, _ in experts.EMERALD.plot[:8]]  # up to the lab
    assert NAMES[ScriptedExpert().get_action(PICTURE, info)] == "UP"
    info["player"]["map"], info["map"]["objects"] = [11, 3], [[2, 0], [0, 0]]
    info["milestones"]["completed"] = [mark for mark, _, _ in experts.EMERALD.plot[:20]]
    assert walk(ScriptedExpert(), info) == ["UP"] * 3 + ["A"]
    info["locked"] = True
    assert NAMES[ScriptedExpert().get_action(PICTURE, info)] == "A"


def test_before_a_game_is_on_it_presses_a():
    info = info_at([], 0, 0, None, game="emerald", menu=None)
    info["player"]["map"] = None
    assert NAMES[ScriptedExpert().get_action(PICTURE, info)] == "A"


def test_it_says_so_where_it_cannot_play():
    driver = Driver("scripted", None, 4)
    assert driver.action(PICTURE, {"lives": 3})[1].startswith("ValueError: the scripted expert plays PokemonEnv only")


# random, replay, plug-ins, checkpoints --------------------------------------------------------------------------------
def actions_of(expert, seed, info, n=50):
    driver = Driver(expert, NAMES, 10)
    driver.reset(info, seed)
    return [driver.action(PICTURE, info)[0] for _ in range(n)]


def test_chance_follows_from_the_seeds():
    first = actions_of("random:3", 7, {"x": 1})
    assert first == actions_of("random:3", 7, {"x": 1}) and len(set(first)) > 5
    others = [actions_of("random:3", 8, {"x": 1}), actions_of("random:4", 7, {"x": 1}), actions_of("random", 7, {})]
    assert all(first != other for other in others)
    expert = make_expert("random:3", NAMES, 10)
    actions_of(expert, 99, {})
    assert actions_of(expert, 7, {"x": 1}) == first  # whatever it played before


def test_replays(tmp_path):
    text = tmp_path / "way.txt"
    text.write_text("up, UP 5\n# nothing\nA # talk\n")
    expert = make_expert(f"replay:{text}", NAMES, 10)
    for _ in range(2):
        expert.reset({})
        assert [expert.get_action(PICTURE, {}) for _ in range(4)] == [4, 4, 5, 0]
        with pytest.raises(EpisodeEnd, match="all 4 actions"):
            expert.get_action(PICTURE, {})
    np.savez(tmp_path / "old.npz", actions=np.array([1, 2]))
    assert experts.load_replay(tmp_path / "old.npz") == ([1, 2], None)
    np.savez(tmp_path / "new.npz", actions=np.array([1, 2]), taken_actions=np.array([1, 3]), seed=np.int64(8))
    assert experts.load_replay(tmp_path / "new.npz") == ([1, 3], 8)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("jump.txt", b"up jump", "found 'jump', expected 0 to 9 or one of A, B"),
        ("high.txt", b"10", "found 10, expected 0 to 9"),
        ("none.txt", b"# nothing", "an empty list"),
        ("picture.txt", b"\xff\xfe\x00", "is no text"),
        ("cut.npz", b"PK\x03\x04 and no more", "is damaged or no episode"),
        ("text.npz", b"hello", "is damaged or no episode"),
        ("pickled.npz", None, "is damaged or no episode"),
    ],
)
def test_wrong_replays_name_the_file(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        np.savez(path, actions=np.array([{"a": 1}], object))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        make_expert(f"replay:{path}", NAMES, 10)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "spec", ["", "script", "scripted:x", "random:x", "replay:", "checkpoint:", "file.py", "a:b", "keyboard:z"]
)
def test_unknown_specifications_are_refused(spec):
    with pytest.raises(ValueError, match="there is no expert"):
        make_expert(spec)


def test_plugged_in_files(tmp_path):
    path = tmp_path / "agent.py"
    path.write_text("class Agent:\n    def get_action(self, obs, info):\n        return ['up', 'a']\nmake = Agent\n")
    driver = Driver(f"{path}:make", NAMES, 10)
    driver.reset({}, 1)  # it needs no reset and no seed
    assert [driver.action(PICTURE, {}) for _ in range(3)] == [(4, ""), (0, ""), (4, "")]
    assert not (tmp_path / "__pycache__").exists()
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match="agent.py does not run: ModuleNotFoundError"):
        make_expert(f"{path}:make")
    with pytest.raises(FileNotFoundError, match="my_agent.py"):
        make_expert(f"{tmp_path}/other.py:make")


POLICY = """
class Policy:
    def __init__(self, action):
        self.action, self.begun = action, []

    @classmethod
    def load(cls, checkpoint, device):
        return cls(checkpoint["action"])

    def __call__(self, frames, infos, begun):
        assert frames.shape == (1, 160, 240, 3) and len(infos) == 1
        self.begun += begun.tolist()
        return [self.action]
"""


def test_a_checkpoint_is_played_by_the_script_in_its_folder(tmp_path):
    import torch

    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        make_expert(f"checkpoint:{tmp_path}")
    torch.save({"action": 7}, tmp_path / "final_model.pth")
    with pytest.raises(ValueError, match="holds 0 scripts"):
        make_expert(f"checkpoint:{tmp_path}")
    (tmp_path / "my_bc.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="my_bc.py has no Policy"):
        make_expert(f"checkpoint:{tmp_path}")
    (tmp_path / "my_bc.py").write_text(POLICY)
    driver = Driver(f"checkpoint:{tmp_path}", NAMES, 10)
    for _ in range(2):
        driver.reset({})
        assert [driver.action(PICTURE, {})[0] for _ in range(3)] == [7, 7, 7]
    assert driver.expert.policy.begun == [True, False, False] * 2
    torch.save({"action": 3}, tmp_path / "best_model.pth")
    assert actions_of(f"checkpoint:{tmp_path}", 0, {}, 1) == [3]
    assert actions_of(f"checkpoint:{tmp_path / 'final_model.pth'}", 0, {}, 1) == [7]


# the keyboard ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def pygame(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame = pytest.importorskip("pygame")
    yield pygame
    pygame.quit()


def tap(pygame, *keys):
    for key in keys:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))


def test_taps_become_actions_and_other_keys_nothing(pygame):
    expert = experts.KeyboardExpert({"z": 0, "up": 4, "right shift": 3}, None, steps_per_s=1000.0, stop=stop_after(200))
    tap(pygame, pygame.K_q, pygame.K_z, pygame.K_UP)
    assert [expert.get_action(PICTURE, {}) for _ in range(2)] == [0, 4]
    tap(pygame, pygame.K_RSHIFT)
    assert expert.get_action(PICTURE, {}) == 3
    shown = pygame.surfarray.array3d(expert.window)
    assert shown.shape == (720, 480, 3)
    with pytest.raises(KeyboardInterrupt):  # no key, no action: the game waits until it is stopped
        expert.get_action(PICTURE, {})


def stop_after(n: int):
    """A `stop` that is true from its n-th call on, so that a test ends."""
    calls = iter(range(n))
    return lambda: next(calls, None) is None


def test_a_key_that_is_held_repeats_and_idle_steps_are_played_if_wanted(pygame, monkeypatch):
    held = dict.fromkeys((pygame.K_z, pygame.K_UP), False) | {pygame.K_UP: True}
    monkeypatch.setattr(pygame.key, "get_pressed", lambda: held)
    expert = experts.KeyboardExpert({"z": 0, "up": 4}, idle=8, steps_per_s=200.0, stop=stop_after(500))
    assert [expert.get_action(PICTURE, {}) for _ in range(3)] == [4, 4, 4]
    held[pygame.K_UP] = False
    assert [expert.get_action(PICTURE, {}) for _ in range(3)] == [8, 8, 8]


@pytest.mark.parametrize("how", ["escape", "window"])
def test_escape_and_the_closed_window_end_the_run(pygame, how):
    expert = experts.KeyboardExpert({"z": 0}, None, stop=stop_after(200))
    if how == "escape":
        tap(pygame, pygame.K_ESCAPE)
    else:
        pygame.event.post(pygame.event.Event(pygame.QUIT))
    with pytest.raises(KeyboardInterrupt):
        Driver(expert, NAMES, 10).action(PICTURE, {})


def test_the_keyboard_expert_is_made_by_the_collector_only():
    with pytest.raises(ValueError, match="needs a window and a person"):
        make_expert("keyboard")


# the example ----------------------------------------------------------------------------------------------------------
def test_the_code_agent_gets_its_game_state_and_its_answers_are_played():
    states = []

    class Agent:
        def step(self, game_state):
            states.append(game_state)
            return [{"action": "up"}, {"action": ["right", "a"]}]

    info = info_at(ROUTE, 3, 9, "west", objects=[[5, 5]], money=500)
    info["party"] = [{"species": 277, "nickname": "EMBIT", "level": 5, "hp": 9, "max_hp": 20, "status": "ok"}]
    picture = np.random.default_rng(0).integers(0, 255, (160, 240, 3), np.uint8)
    driver = Driver(CodeAgentExpert(Agent()), NAMES, 10)
    driver.reset(info)
    assert [driver.action(picture, info) for _ in range(3)] == [(4, ""), (7, ""), (0, "")]
    (state,) = states
    assert set(state) == {"frame", "player", "game", "map", "visual"}
    assert np.array_equal(np.asarray(state["frame"]), picture) and state["visual"]["screenshot"] is state["frame"]
    assert state["player"]["position"] == {"x": 3, "y": 9} and state["player"]["facing"] == "west"
    assert state["player"]["party"][0]["current_hp"] == 9 and state["game"]["money"] == 500
    assert state["game"]["game_state"] == "overworld" and state["map"]["objects"] == [[5, 5]]
    assert make_game_state(picture, battle(True, "action", 0) | {"party": []})["game"]["is_in_battle"]
    json.dumps({**state, "frame": None, "visual": None})  # plain data beside the pictures


def test_the_stub_agent_plays_without_a_key():
    driver = Driver(make_code_agent(), NAMES, 10)
    driver.reset({})
    walk = [driver.action(PICTURE, info_at(ROUTE, 3, 9)) for _ in range(8)]
    assert {NAMES[action] for action, error in walk if not error} == set(MOVES)
    driver.reset({})
    assert driver.action(PICTURE, info_at(ROUTE, 3, 9, dialogue=True)) == (0, "")
