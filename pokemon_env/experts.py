"""Experts: whoever says which button to press. Collector and trainer get them from `make_expert`.

An expert has `get_action(obs, info)` and may have `reset(info)` and `seed(seed)`. `Driver` asks it for one action a
step and turns names, dicts and lists into numbers. Page: docs/collect_expert_data.md
"""

import importlib.util
import json
import sys
import time
import zipfile
import zlib
from collections import deque
from pathlib import Path
from typing import Protocol

import numpy as np

BUTTONS = ("A", "B", "START", "SELECT", "UP", "DOWN", "LEFT", "RIGHT", "L", "R")
SPECS = "scripted, random[:seed], keyboard, replay:FILE, checkpoint:RUN_OR_FILE or path/to/file.py:factory"


class Expert(Protocol):
    """What the collector and the trainer need of an expert."""

    def reset(self, info: dict) -> None:
        """A new episode begins with `info`. Optional."""

    def get_action(self, obs: np.ndarray, info: dict) -> int | str | dict | list:
        """The action for `obs` (H, W, 3) uint8: its number, its name, {"action": ...}, or a list of these, which is
        played to its end before the expert is asked again. An exception ends the episode as failed."""


class EpisodeEnd(Exception):
    """The expert has nothing more to play: the episode ends here, cut short but not failed."""


# actions --------------------------------------------------------------------------------------------------------------
def normalize_action(action, meanings: list[str] | None = None, n_actions: int = len(BUTTONS)) -> list[int]:
    """What an expert answered as a list of action numbers below `n_actions`, at least one. Names are looked up in
    `meanings`, in any case. Raises ValueError for anything else: nothing is guessed."""
    if isinstance(action, dict):
        if "action" not in action:
            raise ValueError(f"the expert answered {_short(action)}, expected an entry 'action' in it")
        return normalize_action(action["action"], meanings, n_actions)
    if isinstance(action, list | tuple) or (isinstance(action, np.ndarray) and action.ndim):
        numbers = [number for item in action for number in normalize_action(item, meanings, n_actions)]
        if not numbers:
            raise ValueError("the expert answered an empty list, expected an action")
        return numbers
    if isinstance(action, str):
        names = [name.upper() for name in meanings or ()]
        if action.strip().upper() in names:
            return [names.index(action.strip().upper())]
    elif isinstance(action, int | np.integer | np.ndarray) and not isinstance(action, bool):
        if (isinstance(action, int | np.integer) or action.dtype.kind in "iu") and 0 <= int(action) < n_actions:
            return [int(action)]
    expected = f"0 to {n_actions - 1}" + (f" or one of {', '.join(meanings)}" if meanings else "")
    raise ValueError(f"the expert answered {_short(action)}, expected {expected}")


class Driver:
    """Asks an expert, or the one that a specification names, for one action a step. A list is queued and its rest
    dropped when something else was played than it said."""

    def __init__(self, expert, meanings: list[str] | None = None, n_actions: int = len(BUTTONS)):
        self.meanings, self.n_actions = meanings, n_actions
        self.expert = make_expert(expert, meanings, n_actions) if isinstance(expert, str) else expert
        self.queue, self.last, self.broken = deque(), None, ""

    def reset(self, info: dict, seed: int | None = None):
        """A new episode. What the expert's `reset` raises is told by the next `action`."""
        self.queue.clear()
        self.last, self.broken = None, ""
        try:
            if seed is not None and hasattr(self.expert, "seed"):
                self.expert.seed(seed)
            if hasattr(self.expert, "reset"):
                self.expert.reset(info)
        except Exception as error:  # whatever a plugged-in agent does
            self.broken = describe(error)

    def action(self, obs: np.ndarray, info: dict, taken: int | None = None) -> tuple[int, str]:
        """(the expert's action, "") or (-1, what went wrong). `taken`: the action that led here, None after reset."""
        if self.broken:
            return -1, self.broken
        if taken is not None and taken != self.last:
            self.queue.clear()
        try:
            if not self.queue:
                answer = self.expert.get_action(obs, info)
                self.queue.extend(normalize_action(answer, self.meanings, self.n_actions))
        except Exception as error:
            self.last = None
            return -1, describe(error)
        self.last = self.queue.popleft()
        return self.last, ""


def describe(error: Exception) -> str:
    """The exception in one line: its class, then its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# the scripted expert --------------------------------------------------------------------------------------------------
A, B, START, UP, DOWN, LEFT, RIGHT = (BUTTONS.index(name) for name in "A B START UP DOWN LEFT RIGHT".split())
WAIT = B  # does nothing on the field
MOVES = {UP: (0, -1), DOWN: (0, 1), LEFT: (-1, 0), RIGHT: (1, 0)}  # in this order among equally short ways
FACING = {"north": UP, "south": DOWN, "west": LEFT, "east": RIGHT}
SIGHT = (7, 5)  # cells to the side and up or down that the screen shows around the player
FAR = 1 << 30
CACHED = 512  # distance fields kept
LOW_HP = 0.4  # share of HP below which a potion is taken


def distance_field(rows: tuple[str, ...], goals: frozenset, blocked: frozenset) -> dict[tuple[int, int], int]:
    """Steps from every cell (x, y) that can be walked to the nearest of `goals`. `rows`: '#' is a wall; nobody walks
    over `blocked`, goals excepted."""
    field = dict.fromkeys(goals, 0)
    queue = deque(goals)
    while queue:
        x, y = cell = queue.popleft()
        further = field[cell] + 1
        for dx, dy in MOVES.values():
            near = (x + dx, y + dy)
            if near not in field and near not in blocked and is_free(rows, near):
                field[near] = further
                queue.append(near)
    return field


def is_free(rows: tuple[str, ...], cell: tuple[int, int]) -> bool:
    x, y = cell
    return 0 <= y < len(rows) and 0 <= x < len(rows[y]) and rows[y][x] != "#"


def hops(roads: dict, target: tuple[int, int]) -> dict[tuple[int, int], int]:
    """How many maps lie between each map of `roads` {map: neighbours} and `target`."""
    count, queue = {target: 0}, deque([target])
    while queue:
        here = queue.popleft()
        for near in roads.get(here, ()):
            if near not in count:
                count[near] = count[here] + 1
                queue.append(near)
    return count


class ScriptedExpert:
    """Walks shortest ways to what the plot asks for next, turns pages with A, and has a rule for battles.

    It depends on `info` alone, remembers nothing but plans, and asks for nothing that the screen does not show: people
    count as walls only where they stand near. On Emerald it goes where the next milestone is, as far as that leads.
    """

    def __init__(self):
        self.fields, self.hops, self.exits = {}, {}, {}

    def get_action(self, obs: np.ndarray, info: dict) -> int:
        if "map" not in info or "player" not in info:
            raise ValueError("the scripted expert plays PokemonEnv only: info has no 'map' and 'player'")
        if info["battle"]:
            return self.fight(info)
        if info["locked"] or not info["map"]["collision"] or not info["player"]["map"]:  # the last two: a title screen
            return self.answer(info)
        if wants_potion(info):
            return START
        script = QUEST if info["game"] == "quest" else EMERALD
        goal_map, goal = script.goal(info)
        here = tuple(info["player"]["map"])
        if here != goal_map:
            return self.travel(info, script, here, goal_map)
        if goal is None:  # being there is all that the script knows
            goal = nearest_person(info)
        return self.talk(info, goal) if goal else A

    # menus
    def answer(self, info: dict) -> int:
        if info["menu"] == "start":
            return A if wants_potion(info) else B
        return A

    def fight(self, info: dict) -> int:
        battle = info["battle"]
        if battle["menu"] == "action":
            return to_cursor(battle["cursor"], 0 if battle["trainer"] or info["game"] != "quest" else 3)
        if battle["menu"] == "move" and info["game"] == "quest":
            if not battle["trainer"]:
                return B
            return to_cursor(battle["cursor"], 0 if battle["kind"] == "leaf" else 1)
        return A

    # the field
    def talk(self, info: dict, cell: tuple[int, int]) -> int:
        """Go beside `cell`, or to the other side of a counter before it, face it, press A."""
        rows, me = tuple(info["map"]["collision"]), (info["player"]["x"], info["player"]["y"])
        places = {}
        for move, (dx, dy) in MOVES.items():
            beside, across = (cell[0] - dx, cell[1] - dy), (cell[0] - 2 * dx, cell[1] - 2 * dy)
            if is_free(rows, beside):
                places[beside] = move
            elif is_free(rows, across):
                places.setdefault(across, move)
        if me in places:
            return A if FACING.get(info["player"]["facing"]) == places[me] else places[me]
        return self.walk(info, frozenset(places), rows, me)

    def travel(self, info: dict, script, here: tuple, target: tuple) -> int:
        """Towards the map `target`, by the exit that can be reached and leads to the map nearest to it."""
        rows, me = tuple(info["map"]["collision"]), (info["player"]["x"], info["player"]["y"])
        if (script, target) not in self.hops:
            self.hops[script, target] = hops(script.roads, target)
        count = self.hops[script, target]
        exits = self.find_exits(info["map"], rows)
        ways = sorted((count.get(there, FAR), there) for there in exits if there != here)
        for _, there in ways:
            cells = exits[there]
            if me in cells:
                return cells[me]
            move = self.walk(info, frozenset(cells), rows, me, wait=False)
            if move is not None:
                return move
        if not ways:
            raise ValueError(f"map {list(here)} has no exit, so there is no way to {list(target)}")
        return WAIT

    def find_exits(self, of_map: dict, rows: tuple) -> dict[tuple[int, int], dict[tuple[int, int], int]]:
        """{map that an exit leads to: {cell: the move that leaves from it}}"""
        warps, sides = (tuple(map(tuple, pairs)) for pairs in (of_map["warps"], of_map["connections"].items()))
        key = rows, warps, str(sides)
        if key not in self.exits:
            exits = self.exits[key] = {}
            for x, y, *there in warps:
                exits.setdefault(tuple(there), {})[x, y] = outward(rows, x, y)
            for side, there in sides:
                cells = exits.setdefault(tuple(there), {})
                if side in FACING:
                    cells |= {cell: FACING[side] for cell in edge(rows, side)}
        return self.exits[key]

    def walk(self, info: dict, goals: frozenset, rows: tuple, me: tuple, wait: bool = True) -> int | None:
        """One cell on the shortest way to one of `goals`, around people who stand near. None: there is no way."""
        x, y = me
        warps = frozenset((warp[0], warp[1]) for warp in info["map"]["warps"]) - goals
        people = frozenset(
            (px, py) for px, py in info["map"]["objects"] if abs(px - x) <= SIGHT[0] and abs(py - y) <= SIGHT[1]
        )
        move = self.downhill(rows, goals, warps | people, me)
        if move is None and people:
            way = self.downhill(rows, goals, warps, me)  # as if the people were not there
            if way is not None:
                dx, dy = MOVES[way]
                if (x + dx, y + dy) not in people:
                    return way
                if info["game"] == "quest":
                    return WAIT  # they will go on
                return A if FACING.get(info["player"]["facing"]) == way else way
        return WAIT if move is None and wait else move

    def downhill(self, rows: tuple, goals: frozenset, blocked: frozenset, me: tuple) -> int | None:
        key = (rows, goals, blocked)
        field = self.fields.get(key)
        if field is None:
            if len(self.fields) >= CACHED:
                self.fields.clear()
            field = self.fields[key] = distance_field(rows, goals, blocked)
        steps = {move: field.get((me[0] + dx, me[1] + dy), FAR) for move, (dx, dy) in MOVES.items()}
        move = min(steps, key=steps.get)  # the first of several
        return move if steps[move] < FAR else None


def to_cursor(cursor: int, wanted: int) -> int:
    """The button that brings the cursor of a 2x2 menu (0 1 / 2 3) nearer to `wanted`, A when it is there."""
    if cursor // 2 != wanted // 2:
        return DOWN if wanted > cursor else UP
    if cursor % 2 != wanted % 2:
        return RIGHT if wanted > cursor else LEFT
    return A


def wants_potion(info: dict) -> bool:
    """Whether the first creature has lost so much that a potion is due, and there is one; quest only."""
    if info["game"] != "quest" or not info["party"] or not info.get("items", {}).get("potion"):
        return False
    first = info["party"][0]
    return first["hp"] < LOW_HP * first["max_hp"]


def edge(rows: tuple, side: str) -> list[tuple[int, int]]:
    """Free cells of the first or last row or column."""
    height, width = len(rows), len(rows[0]) if rows else 0
    cells = {
        "north": [(x, 0) for x in range(width)],
        "south": [(x, height - 1) for x in range(width)],
        "west": [(0, y) for y in range(height)],
        "east": [(width - 1, y) for y in range(height)],
    }[side]
    return [cell for cell in cells if is_free(rows, cell)]


def outward(rows: tuple, x: int, y: int) -> int:
    """The move that leaves through a warp one already stands on: out of the map, or into the wall that has the door."""
    for move, (dx, dy) in MOVES.items():
        if not (0 <= y + dy < len(rows) and 0 <= x + dx < len(rows[y])):
            return move
    return DOWN


def nearest_person(info: dict) -> tuple[int, int] | None:
    x, y = info["player"]["x"], info["player"]["y"]
    people = sorted((abs(px - x) + abs(py - y), px, py) for px, py in info["map"]["objects"])
    return people[0][1:] if people else None


class Script:
    """What to do in which order. `plot`: rows (flag or milestone when done, map, cell to talk to or None)."""

    def __init__(self, roads: dict, plot: list[tuple], by_flag: bool):
        self.roads, self.plot, self.by_flag = roads, plot, by_flag

    def goal(self, info: dict) -> tuple[tuple[int, int], tuple[int, int] | None]:
        done = info["flags"] if self.by_flag else info["milestones"]["completed"]
        for mark, place, cell in self.plot:
            if mark not in done:
                return place, cell
        return self.plot[-1][1:]


def _both_ways(*roads: tuple) -> dict:
    """{map: its neighbours} of pairs of maps."""
    table: dict = {}
    for one, other in roads:
        table.setdefault(one, []).append(other)
        table.setdefault(other, []).append(one)
    return table


# map (group, number) of both games
HOME, ROUTE_101, LAB, OLDALE, WOODS, RUSTBORO, GYM = (0, 9), (0, 16), (1, 4), (0, 10), (24, 11), (0, 3), (11, 3)
PETALBURG, ROUTE_102, ROUTE_103, ROUTE_104 = (0, 0), (0, 17), (0, 18), (0, 19)

QUEST = Script(
    _both_ways(
        (HOME, ROUTE_101), (HOME, LAB), (ROUTE_101, OLDALE), (OLDALE, WOODS), (WOODS, RUSTBORO), (RUSTBORO, GYM)
    ),
    [
        (0x860, ROUTE_101, (4, 8)),  # the bag on the table
        (0x74, LAB, (5, 3)),  # the professor, for the permit
        (0x861, OLDALE, (12, 6)),  # the aide, for the book
        (0x20, OLDALE, (3, 5)),  # the keeper of the gate, who takes the toll
        (0x50A, WOODS, (7, 2)),  # the trainer in the way
        (0x867, GYM, (4, 2)),  # the leader, for the badge
        (None, RUSTBORO, None),
    ],
    by_flag=True,
)

# locations only: what has to be done in them goes as far as talking to whoever stands nearest leads
EMERALD = Script(
    _both_ways(
        ((25, 40), HOME),
        (HOME, (1, 0)),
        ((1, 0), (1, 1)),
        (HOME, (1, 2)),
        ((1, 2), (1, 3)),
        (HOME, LAB),
        (HOME, ROUTE_101),
        (ROUTE_101, OLDALE),
        (OLDALE, ROUTE_103),
        (OLDALE, ROUTE_102),
        (ROUTE_102, PETALBURG),
        (PETALBURG, (8, 1)),
        (PETALBURG, ROUTE_104),
        (ROUTE_104, WOODS),
        (ROUTE_104, RUSTBORO),
        (RUSTBORO, GYM),
    ),
    [
        ("LITTLEROOT_TOWN", HOME, None),
        ("PLAYER_HOUSE_ENTERED", (1, 0), None),
        ("PLAYER_BEDROOM", (1, 1), None),
        ("RIVAL_HOUSE", (1, 2), None),
        ("RIVAL_BEDROOM", (1, 3), None),
        ("ROUTE_101", ROUTE_101, None),
        ("STARTER_CHOSEN", ROUTE_101, None),
        ("BIRCH_LAB_VISITED", LAB, None),
        ("OLDALE_TOWN", OLDALE, None),
        ("ROUTE_103", ROUTE_103, None),
        ("RECEIVED_POKEDEX", LAB, None),
        ("ROUTE_102", ROUTE_102, None),
        ("PETALBURG_CITY", PETALBURG, None),
        ("DAD_FIRST_MEETING", (8, 1), None),
        ("GYM_EXPLANATION", (8, 1), None),
        ("ROUTE_104_SOUTH", ROUTE_104, None),
        ("PETALBURG_WOODS", WOODS, None),
        ("TEAM_AQUA_GRUNT_DEFEATED", WOODS, None),
        ("RUSTBORO_CITY", RUSTBORO, None),
        ("RUSTBORO_GYM_ENTERED", GYM, None),
        ("ROXANNE_DEFEATED", GYM, None),
        ("FIRST_GYM_COMPLETE", RUSTBORO, None),
    ],
    by_flag=False,
)


# others ---------------------------------------------------------------------------------------------------------------
class RandomExpert:
    """Every action alike. An episode's actions follow from `seed`, the episode's seed and its first info."""

    def __init__(self, n_actions: int, seed: int = 0):
        self.n_actions, self.own_seed, self.episode_seed = n_actions, seed, 0
        self.reset({})

    def seed(self, seed: int):
        self.episode_seed = seed

    def reset(self, info: dict):
        digest = zlib.crc32(json.dumps(info, sort_keys=True, default=str).encode())
        self.rng = np.random.default_rng([self.own_seed, self.episode_seed, digest])

    def get_action(self, obs: np.ndarray, info: dict) -> int:
        return int(self.rng.integers(self.n_actions))


class ReplayExpert:
    """The actions of a file once more, from the first in every episode; then the episode ends."""

    def __init__(self, path: Path, meanings: list[str] | None, n_actions: int):
        try:
            self.actions = normalize_action(load_replay(path)[0], meanings, n_actions)
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be replayed here: {error}".replace("the expert answered", "found")
            ) from None
        self.position = 0

    def reset(self, info: dict):
        self.position = 0

    def get_action(self, obs: np.ndarray, info: dict) -> int:
        if self.position == len(self.actions):
            raise EpisodeEnd(f"all {len(self.actions)} actions were played")
        self.position += 1
        return self.actions[self.position - 1]


def load_replay(path: Path) -> tuple[list[int | str], int | None]:
    """The actions played in a file and the seed they began from, None where it is not said. The file is an episode
    (.npz), or a text of numbers or names with blanks, commas or newlines between them; `#` begins a comment. Raises
    FileNotFoundError, or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Name an episode (.npz) or a text of actions to replay")
    if path.suffix != ".npz":
        try:
            lines = [line.split("#")[0].replace(",", " ") for line in path.read_text().splitlines()]
        except ValueError as error:
            raise ValueError(f"{path} is no text ({error}), expected names or numbers of actions") from None
        return [int(word) if word.isdigit() else word for word in " ".join(lines).split()], None
    try:
        with np.load(path, allow_pickle=False) as episode:
            actions = episode["taken_actions" if "taken_actions" in episode else "actions"].tolist()
            return actions, int(episode["seed"]) if "seed" in episode else None
    except (ValueError, KeyError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or no episode ({describe(error)})") from None


CHECKPOINTS = ("best_model.pth", "best_val.pth", "final_model.pth", "best.pt", "last.pt")


class CheckpointExpert:
    """A trained policy as expert. The network comes from the script copy in the run folder, so this runs that script:
    its `Policy.load(checkpoint, device=)` is called with pictures (1, H, W, 3), infos, and which begin an episode."""

    def __init__(self, path: Path, device: str = "cpu"):
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in CHECKPOINTS if (path / name).is_file()]
            if not found:
                raise FileNotFoundError(f"{path} holds no checkpoint, expected one of {', '.join(CHECKPOINTS)}")
            path = found[0]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. Name a run folder or a checkpoint in it")
        scripts = sorted(path.parent.glob("*.py"))
        if len(scripts) != 1:
            names = ", ".join(script.name for script in scripts) or "none"
            raise ValueError(f"{path.parent} holds {len(scripts)} scripts ({names}), expected the one that trained it")
        module = load_module(scripts[0])
        if not hasattr(module, "Policy"):
            raise ValueError(f"{scripts[0]} has no Policy with load(checkpoint, device), as bc_pokemon.py has")
        from common.runs import load_checkpoint  # imports torch, which the other experts do not need

        self.policy, self.begun = module.Policy.load(load_checkpoint(path), device=device), True

    def reset(self, info: dict):
        self.begun = True

    def get_action(self, obs: np.ndarray, info: dict) -> int:
        action = self.policy(obs[None], [info], np.array([self.begun]))[0]
        self.begun = False
        return int(action)


class KeyboardExpert:
    """A person: shows the screen in a window and waits for a key. Closing the window or Escape is a Ctrl-C.

    `keys` {key name of pygame: action}; a key held down repeats. `idle`: action played when no key came within a
    step's time, None lets the game wait. `steps_per_s` is the most that is played a second, `stop()` true ends it."""

    def __init__(
        self,
        keys: dict[str, int],
        idle: int | None = None,
        steps_per_s: float = 4.0,
        stop=lambda: False,
        scale: int = 3,
    ):
        import pygame

        self.pygame, self.idle, self.period, self.stop, self.scale = pygame, idle, 1 / steps_per_s, stop, scale
        self.window, self.last = None, 0.0
        self.pressed = deque(maxlen=2)  # taps that came while a step was played; more would lag behind the person
        pygame.init()
        try:
            self.keys = {pygame.key.key_code(name): action for name, action in keys.items()}
        except ValueError as error:
            raise ValueError(
                f"keyboard: {error}. Expected names of pygame such as z, return, right shift, up"
            ) from None

    def get_action(self, obs: np.ndarray, info: dict) -> int:
        pygame = self.pygame
        size = (obs.shape[1] * self.scale, obs.shape[0] * self.scale)
        if self.window is None:
            self.window = pygame.display.set_mode(size)
            pygame.display.set_caption("collect_expert_data: keyboard")
        picture = pygame.image.frombuffer(np.ascontiguousarray(obs), (obs.shape[1], obs.shape[0]), "RGB")
        self.window.blit(pygame.transform.scale(picture, size), (0, 0))
        pygame.display.flip()
        until = time.monotonic() + self.period
        while True:
            if self.stop():
                raise KeyboardInterrupt
            for event in pygame.event.get():
                if event.type == pygame.QUIT or (event.type == pygame.KEYDOWN and event.key == pygame.K_ESCAPE):
                    raise KeyboardInterrupt
                if event.type == pygame.KEYDOWN and event.key in self.keys:
                    self.pressed.append(self.keys[event.key])
            now = time.monotonic()
            if now - self.last >= self.period:
                wanted = self.pressed.popleft() if self.pressed else None
                if wanted is None:
                    held = pygame.key.get_pressed()
                    wanted = next((action for key, action in self.keys.items() if held[key]), None)
                if wanted is None and now >= until:
                    wanted = self.idle
                if wanted is not None:
                    self.last = now
                    return wanted
            time.sleep(0.005)


# making them ----------------------------------------------------------------------------------------------------------
def make_expert(spec: str, meanings: list[str] | None = None, n_actions: int = len(BUTTONS)) -> Expert:
    """The expert that `spec` names, one of SPECS. Raises ValueError or FileNotFoundError that say what was expected."""
    kind, _, rest = spec.partition(":")
    if spec == "scripted":
        return ScriptedExpert()
    if kind == "random" and (not rest or rest.isdigit()):
        return RandomExpert(n_actions, int(rest or 0))
    if spec == "keyboard":
        raise ValueError("the keyboard expert plays in collect_expert_data.py only: it needs a window and a person")
    if kind == "replay" and rest:
        return ReplayExpert(Path(rest), meanings, n_actions)
    if kind == "checkpoint" and rest:
        return CheckpointExpert(Path(rest))
    path, colon, factory = spec.rpartition(":")
    if colon and path.endswith(".py"):
        module = load_module(Path(path))
        if not hasattr(module, factory):
            raise ValueError(f"{path} has no {factory}, expected a function that makes an expert")
        expert = getattr(module, factory)()
        if not hasattr(expert, "get_action"):
            raise ValueError(
                f"{factory} of {path} made {_short(expert)}, expected an object with get_action(obs, info)"
            )
        return expert
    raise ValueError(f"there is no expert {spec!r}, expected {SPECS}")


def load_module(path: Path):
    """Run a file as a module, by path. Raises FileNotFoundError, or ValueError with what it raised."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Name the file of the expert, such as my_agent.py:make_expert")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses in it look themselves up there
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a run folder gets no __pycache__
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ValueError(f"{path} does not run: {describe(error)}") from error
    finally:
        sys.dont_write_bytecode = keep
    return module
