"""The named milestones up to the first badge: what each one is, in order, and which of them a game has reached.

Detectors see a `memory.Snapshot` and the milestones completed before them. Flags and maps are those of Pokemon Emerald.
"""

from collections.abc import Callable
from typing import NamedTuple

from pokemon_env.memory import Snapshot

Place = tuple[int, int]


class Milestone(NamedTuple):
    id: str
    reached: Callable[[Snapshot, set[str]], bool]
    target: Place | None  # the map where it happens; None where that is anywhere, or depends


def flag(number: int):
    return lambda game, done: number in game.flags


def on_map(*place: int, after: str | None = None):
    return lambda game, done: game.started and game.map == place and (after is None or after in done)


def in_house(floor: int, own: bool):
    """Downstairs (0) or upstairs (1) in one's own house or the rival's. A boy lives in Brendan's, (1, 0) and (1, 1)."""
    return lambda game, done: game.started and game.map == (1, 2 * int((game.gender == 1) == own) + floor)


MILESTONES = (
    Milestone("GAME_RUNNING", lambda game, done: game.running, None),
    Milestone("PLAYER_NAME_SET", lambda game, done: game.name not in ("", "PLAYER"), None),
    Milestone("INTRO_CUTSCENE_COMPLETE", on_map(25, 40), (25, 40)),
    Milestone("LITTLEROOT_TOWN", flag(0x86F), (0, 9)),
    Milestone("PLAYER_HOUSE_ENTERED", in_house(0, own=True), None),
    Milestone("PLAYER_BEDROOM", in_house(1, own=True), None),
    Milestone("CLOCK_SET", flag(0x51), None),
    Milestone("RIVAL_HOUSE", in_house(0, own=False), None),
    Milestone("RIVAL_BEDROOM", in_house(1, own=False), None),
    Milestone("ROUTE_101", on_map(0, 16), (0, 16)),
    Milestone("STARTER_CHOSEN", flag(0x860), (0, 16)),
    Milestone("BIRCH_LAB_VISITED", on_map(1, 4, after="STARTER_CHOSEN"), (1, 4)),
    Milestone("OLDALE_TOWN", flag(0x870), (0, 10)),
    Milestone("ROUTE_103", on_map(0, 18), (0, 18)),
    Milestone("RECEIVED_POKEDEX", flag(0x861), (1, 4)),
    Milestone("ROUTE_102", on_map(0, 17), (0, 17)),
    Milestone("PETALBURG_CITY", flag(0x876), (0, 0)),
    Milestone("DAD_FIRST_MEETING", on_map(8, 1), (8, 1)),
    Milestone("GYM_EXPLANATION", lambda game, done: game.var(0x4085) >= 2, (8, 1)),
    Milestone("ROUTE_104_SOUTH", on_map(0, 19), (0, 19)),
    Milestone("PETALBURG_WOODS", on_map(24, 11), (24, 11)),
    Milestone("TEAM_AQUA_GRUNT_DEFEATED", flag(0x50A), (24, 11)),
    Milestone("ROUTE_104_NORTH", on_map(0, 19, after="TEAM_AQUA_GRUNT_DEFEATED"), (0, 19)),
    Milestone("RUSTBORO_CITY", flag(0x879), (0, 3)),
    Milestone("RUSTBORO_GYM_ENTERED", on_map(11, 3), (11, 3)),
    Milestone("ROXANNE_DEFEATED", flag(0x867), (11, 3)),
    Milestone("FIRST_GYM_COMPLETE", lambda game, done: 0x867 in game.flags and game.map != (11, 3), (0, 3)),
)

_IN_QUEST = """GAME_RUNNING PLAYER_NAME_SET LITTLEROOT_TOWN ROUTE_101 STARTER_CHOSEN BIRCH_LAB_VISITED OLDALE_TOWN
RECEIVED_POKEDEX PETALBURG_WOODS TEAM_AQUA_GRUNT_DEFEATED RUSTBORO_CITY RUSTBORO_GYM_ENTERED ROXANNE_DEFEATED
FIRST_GYM_COMPLETE""".split()
QUEST_MILESTONES = tuple(
    m._replace(target=(0, 10)) if m.id == "RECEIVED_POKEDEX" else m for m in MILESTONES if m.id in _IN_QUEST
)


class Tracker:
    """The milestones that one game reached, in the order it reached them."""

    def __init__(self, milestones: tuple[Milestone, ...]):
        self.milestones, self.completed, self.new = milestones, [], []

    def reset(self, game: Snapshot):
        """Start over. What holds already is completed, but not new."""
        self.completed = []
        self.update(game)
        self.new = []

    def update(self, game: Snapshot) -> list[str]:
        """Milestones that `game` completes, in the list's order."""
        done, self.new = set(self.completed), []
        if game.running:
            for milestone in self.milestones:
                if milestone.id not in done and milestone.reached(game, done):
                    done.add(milestone.id)
                    self.new.append(milestone.id)
        self.completed += self.new
        return self.new

    @property
    def next(self) -> Milestone | None:
        """The first one of the list that is not completed."""
        return next((m for m in self.milestones if m.id not in self.completed), None)

    def info(self) -> dict:
        after = self.next
        return {
            "completed": list(self.completed),
            "next": after and after.id,
            "total": len(self.milestones),
            "new": list(self.new),
        }


def distance_to(target: Place | None, game: Snapshot) -> int | None:
    """Cells, counted without walls, to the nearest exit of the current map that leads to the map `target`. None where
    no exit does, or the player is there already."""
    if target is None or not game.started or game.map == target:
        return None
    ways = [abs(game.x - x) + abs(game.y - y) for x, y, *place in game.events.warps if tuple(place) == target]
    edges = {
        "north": game.y + 1,
        "south": game.grid.height - game.y,
        "west": game.x + 1,
        "east": game.grid.width - game.x,
    }
    ways += [edges[side] for side, *place in game.events.connections if tuple(place) == target]
    return min(ways, default=None)
