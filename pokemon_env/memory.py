"""What the game's memory says: bytes of EWRAM, IWRAM and the ROM to a `Snapshot`, and from there to plain data.

Addresses are those of Pokemon Emerald (US); the quest in pokemon_env/quest keeps its state at the same ones. Structures
that move are found through their pointers. The table, and what was checked on the game, is in docs/pokemon_env.md.
"""

import itertools
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

SAVE_BLOCK_1, SAVE_BLOCK_2 = 0x03005D8C, 0x03005D90  # pointers into EWRAM; what they point to moves
CALLBACK_2, IN_BATTLE = 0x030022C4, 0x030026F9
LOCKED = 0x03000F2C
PARTY_COUNT, PARTY, ENEMY_COUNT, ENEMY = 0x020244E9, 0x020244EC, 0x020244EA, 0x02024744
OBJECTS, PLAYER_AVATAR = 0x02037350, 0x02037590
GRID = 0x03005DC0
MAP_HEADER = 0x02037318  # not checked on Emerald
BATTLE_TYPE = 0x02022FEC  # not checked on Emerald
ACTION_CURSOR, MOVE_CURSOR = 0x020244AC, 0x020244B0
QUEST_MENU, QUEST_ENEMY_KIND = 0x0203F000, 0x0203F001  # free memory in Emerald

OVERWORLD = 0x08085E5D  # callback 2 on the field
FLAGS, FLAG_BYTES, VARS, VAR_BYTES = 0x1270, 300, 0x139C, 512  # in save block 1
MEMBER, N_OBJECTS, OBJECT, MARGIN = 100, 16, 0x24, 7
MAX_CELLS = 0x2800
BADGES = range(0x867, 0x86F)
FACING = {1: "south", 2: "north", 3: "west", 4: "east"}
SIDES = {1: "south", 2: "north", 3: "west", 4: "east"}
MENUS = ("none", "message", "start", "choose", "action", "move")  # of the quest
LOCATIONS = {
    (25, 40): "MOVING VAN",
    (0, 9): "LITTLEROOT TOWN",
    (0, 10): "OLDALE TOWN",
    (0, 0): "PETALBURG CITY",
    (0, 3): "RUSTBORO CITY",
    (0, 16): "ROUTE 101",
    (0, 17): "ROUTE 102",
    (0, 18): "ROUTE 103",
    (0, 19): "ROUTE 104",
    (1, 0): "BRENDANS HOUSE 1F",
    (1, 1): "BRENDANS HOUSE 2F",
    (1, 2): "MAYS HOUSE 1F",
    (1, 3): "MAYS HOUSE 2F",
    (1, 4): "PROFESSOR BIRCHS LAB",
    (8, 1): "PETALBURG GYM",
    (11, 3): "RUSTBORO GYM",
    (24, 11): "PETALBURG WOODS",
}
ORDERS = list(itertools.permutations("GAEM"))  # of a member's four sub-blocks, by PID % 24
ITEM_SLOTS, BALL_SLOTS = (0x560, 30), (0x650, 16)  # two pockets of the bag in save block 1: where, how many slots
ITEMS = {  # by the game's number
    1: "master_ball",
    2: "ultra_ball",
    3: "great_ball",
    4: "poke_ball",
    13: "potion",
    14: "antidote",
    18: "paralyze_heal",
    22: "super_potion",
    86: "repel",
}
STATUS = ((0x07, "sleep"), (0x08, "poison"), (0x10, "burn"), (0x20, "freeze"), (0x40, "paralysis"), (0x80, "toxic"))


def _characters() -> list[str]:
    table = ["?"] * 256
    table[0x00] = " "
    for first, text in ((0xA1, "0123456789!?.-"), (0xB4, "'"), (0xB8, ","), (0xBA, "/"), (0xBB, "ABCDEFGHIJKLM")):
        table[first : first + len(text)] = text
    table[0xC8:0xD5], table[0xD5:0xEF] = "NOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
    return table


CHARACTERS = _characters()


class Memory(NamedTuple):
    """The three regions of a GBA that matter here, by address."""

    ewram: bytes  # 256 KiB at 0x02000000
    iwram: bytes  # 32 KiB at 0x03000000
    rom: bytes  # at 0x08000000

    def find(self, address: int, size: int) -> tuple[bytes, int] | None:
        """The region that holds `size` bytes from `address`, and where in it; None where none does."""
        region = {2: self.ewram, 3: self.iwram, 8: self.rom, 9: self.rom}.get(address >> 24)
        offset = address & (0x1FFFFFF if address >> 24 >= 8 else 0xFFFFFF)
        return (region, offset) if region is not None and offset + size <= len(region) else None

    def unpack(self, layout: str, address: int) -> tuple | None:
        """Little-endian values at `address` (struct's letters), None outside of memory."""
        found = self.find(address, struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, *found) if found else None

    def bytes(self, address: int, size: int) -> bytes | None:
        found = self.find(address, size)
        return found[0][found[1] : found[1] + size] if found else None


class Grid(NamedTuple):
    """The walkable part of the current map."""

    width: int
    height: int
    collision: tuple[str, ...]  # rows of '#' blocked and '.' free


class Events(NamedTuple):
    """How the current map is left."""

    warps: tuple[tuple[int, int, int, int], ...]  # (x, y, group, number)
    connections: tuple[tuple[str, int, int], ...]  # (side, group, number)


NO_GRID, NO_EVENTS = Grid(0, 0, ()), Events((), ())


@dataclass(slots=True)
class Snapshot:
    """One moment of the game. Before it set up its memory `running` is false and all else empty or zero."""

    running: bool = False
    field: bool = False  # on the field rather than in a battle, a menu over the whole screen or an intro
    name: str = ""
    gender: int = 0  # 0 boy, 1 girl
    x: int = 0
    y: int = 0
    facing: str | None = None
    map: tuple[int, int] | None = None  # (group, number)
    party: tuple[dict, ...] = ()
    money: int = 0
    items: tuple[tuple[str, int], ...] = ()  # (name, how many)
    flags: frozenset[int] = frozenset()
    flag_list: tuple[int, ...] = ()
    variables: bytes = bytes(VAR_BYTES)
    grid: Grid = NO_GRID
    events: Events = NO_EVENTS
    people: tuple[tuple[int, int], ...] = ()
    locked: bool = False
    battle: dict | None = None
    menu: str | None = None

    @property
    def started(self) -> bool:
        """A game is on: before that, zeros would read as a place."""
        return self.running and self.name != ""

    @property
    def free(self) -> bool:
        """On the field with the controls free."""
        return self.started and self.field and not self.locked and self.menu in (None, "none")

    def var(self, number: int) -> int:
        """The game's variable 0x4000 + n."""
        return struct.unpack_from("<H", self.variables, 2 * (number - 0x4000))[0]

    def info(self) -> dict:
        """The parts of `info` that come from memory, as fresh plain data."""
        return {
            "player": {
                "name": self.name,
                "x": self.x,
                "y": self.y,
                "facing": self.facing,
                "map": list(self.map) if self.map else None,
                "location": location(self.map) if self.started and self.map else "TITLE",
            },
            "party": [dict(member) for member in self.party],
            "money": self.money,
            "items": dict(self.items),
            "badges": [flag in self.flags for flag in BADGES],
            "flags": list(self.flag_list),
            "map": {
                "width": self.grid.width,
                "height": self.grid.height,
                "collision": list(self.grid.collision),
                "warps": [list(warp) for warp in self.events.warps],
                "connections": {side: [group, number] for side, group, number in self.events.connections},
                "objects": [list(cell) for cell in self.people],
            },
            "dialogue": self.locked and self.battle is None,
            "locked": self.locked,
            "battle": self.battle and self.battle | {"enemy": dict(self.battle["enemy"])},
            "menu": self.menu,
        }


class Reader:
    """Memory images to snapshots. What changes rarely (map, party, flags) is kept with the bytes it came from."""

    def __init__(self, rom: bytes, quest: bool = False):
        self.rom, self.quest = rom, quest
        self.kept: dict[str, tuple] = {}  # part -> (raw bytes, what they say)
        self.events: dict[tuple, Events] = {}  # (map header, size of the map) -> its exits

    def read(self, ewram: bytes, iwram: bytes) -> Snapshot:
        memory = Memory(ewram, iwram, self.rom)
        blocks = save_blocks(memory)
        if blocks is None:
            return Snapshot()
        at1, at2 = (block - 0x02000000 for block in blocks)  # offsets in EWRAM
        x, y, group, number = struct.unpack_from("<hhbb", ewram, at1)
        flags = ewram[at1 + FLAGS : at1 + FLAGS + FLAG_BYTES]
        flag_list, flag_set = self.keep("flags", flags, lambda raw: _flags(raw))
        locked, battling = iwram[LOCKED & 0xFFFF] == 1, bool(iwram[IN_BATTLE & 0xFFFF] & 2)
        facing, people = read_objects(memory)
        snapshot = Snapshot(
            running=True,
            field=iwram[0x22C4:0x22C8] == OVERWORLD.to_bytes(4, "little"),
            name=self.keep("name", ewram[at2 : at2 + 8], decode_text),
            gender=ewram[at2 + 8],
            x=x,
            y=y,
            facing=facing,
            map=(group, number),
            party=self.keep("party", _party_bytes(ewram, PARTY_COUNT, PARTY), read_members),
            money=read_money(memory, *blocks),
            items=self.keep("items", _bag_bytes(memory, *blocks), read_items),
            flags=flag_set,
            flag_list=flag_list,
            variables=ewram[at1 + VARS : at1 + VARS + VAR_BYTES],
            people=people,
            locked=locked,
            menu=_quest_menu(ewram) if self.quest else None,
        )
        raw = _grid_bytes(memory)
        if raw:
            snapshot.grid = self.keep("grid", raw, read_grid)
            key = memory.bytes(MAP_HEADER, 16), snapshot.grid.width, snapshot.grid.height
            if key not in self.events:  # they lie in the ROM: nothing moves
                self.events[key] = read_events(memory, snapshot.grid)
            snapshot.events = self.events[key]
        if battling:
            enemies = self.keep("enemies", _party_bytes(ewram, ENEMY_COUNT, ENEMY), read_members)
            snapshot.battle = read_battle(memory, enemies, snapshot.menu)
        return snapshot

    def keep(self, part: str, raw: bytes, decode):
        if part not in self.kept or self.kept[part][0] != raw:
            self.kept[part] = raw, decode(raw)
        return self.kept[part][1]


def save_blocks(memory: Memory) -> tuple[int, int] | None:
    """Addresses of the two save blocks; None while the game has not set their pointers."""
    one, two = struct.unpack_from("<II", memory.iwram, SAVE_BLOCK_1 & 0xFFFF)
    in_place = 0x02000000 <= one <= 0x02040000 - VARS - VAR_BYTES and 0x02000000 <= two <= 0x02040000 - 0xB0
    return (one, two) if in_place and one % 4 == two % 4 == 0 else None


def read_money(memory: Memory, block1: int, block2: int) -> int:
    """The amount in save block 1 with the key of save block 2 taken off."""
    return memory.unpack("I", block1 + 0x490)[0] ^ memory.unpack("I", block2 + 0xAC)[0]


def _bag_bytes(memory: Memory, block1: int, block2: int) -> bytes:
    """The low half of the key, then the slots of both pockets: (item, quantity under the key)."""
    slots = (memory.bytes(block1 + first, 4 * n) for first, n in (ITEM_SLOTS, BALL_SLOTS))
    return memory.bytes(block2 + 0xAC, 2) + b"".join(slots)


def read_items(raw: bytes) -> tuple[tuple[str, int], ...]:
    """(name, how many); items that `ITEMS` does not name by their number. One item may fill several slots."""
    key, *slots = np.frombuffer(raw, "<u2").tolist()
    count = Counter()
    for item, n in zip(slots[::2], slots[1::2], strict=True):
        if item:
            count[ITEMS.get(item, f"item_{item}")] += n ^ key
    return tuple(count.items())


def _flags(raw: bytes) -> tuple[tuple[int, ...], frozenset[int]]:
    numbers = np.flatnonzero(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")).tolist()
    return tuple(numbers), frozenset(numbers)


def decode_text(raw: bytes) -> str:
    """The game's character set up to its end mark, 0xFF. Memory that was never written (zeros) is empty."""
    text = raw.split(b"\xff")[0]
    return "".join(CHARACTERS[c] for c in text) if any(text) else ""


def _party_bytes(ewram: bytes, count: int, first: int) -> bytes:
    """The members' raw bytes, as many as the count says, at most six."""
    n, start = min(ewram[count & 0xFFFFFF], 6), first & 0xFFFFFF
    return ewram[start : start + MEMBER * n]


def read_members(raw: bytes) -> tuple[dict, ...]:
    """100 bytes each to species (the game's internal number), nickname, level, HP and status."""
    return tuple(read_member(raw[i : i + MEMBER]) for i in range(0, len(raw), MEMBER))


def read_member(raw: bytes) -> dict:
    """One member. `species` is None where the checksum does not hold: the game was just writing it."""
    status, level, _, hp, max_hp = struct.unpack_from("<IBBHH", raw, 0x50)
    return {
        "species": decrypt_species(raw),
        "nickname": decode_text(raw[8:18]),
        "level": level,
        "hp": hp,
        "max_hp": max_hp,
        "status": next((word for bits, word in STATUS if status & bits), "ok"),
    }


def decrypt_species(raw: bytes) -> int | None:
    """The 48 bytes at 0x20 are XORed with PID ^ OT id; the first number of sub-block G, whose place PID % 24 says, is
    the species. Their sum is the checksum at 0x1C."""
    pid, trainer = struct.unpack_from("<II", raw)
    words = np.frombuffer(raw, "<u4", 12, 0x20) ^ np.uint32(pid ^ trainer)
    values = words.view("<u2")
    if int(values.sum(dtype=np.uint32)) & 0xFFFF != struct.unpack_from("<H", raw, 0x1C)[0]:
        return None
    return int(values[6 * ORDERS[pid % 24].index("G")])


_OBJECTS = struct.Struct("<" + "B15xhh4xB11x" * N_OBJECTS)


def read_objects(memory: Memory) -> tuple[str | None, tuple[tuple[int, int], ...]]:
    """(where the player looks, cells (x, y) of all other active objects)."""
    values = _OBJECTS.unpack_from(memory.ewram, OBJECTS & 0xFFFFFF)
    player, facing, people = memory.ewram[(PLAYER_AVATAR + 5) & 0xFFFFFF], None, []
    for i in range(N_OBJECTS):
        active, x, y, look = values[4 * i : 4 * i + 4]
        if active & 1:
            if i == player:
                facing = FACING.get(look & 15)
            else:
                people.append((x - MARGIN, y - MARGIN))
    return facing, tuple(people)


def _grid_bytes(memory: Memory) -> bytes | None:
    """Width, height and cells of the map with its margin; None where the header makes no sense."""
    width, height, cells = struct.unpack_from("<iiI", memory.iwram, GRID & 0xFFFF)
    if not (width > 15 and height > 14 and width * height <= MAX_CELLS):
        return None
    raw = memory.bytes(cells, 2 * width * height)
    return raw and struct.pack("<ii", width, height) + raw


def read_grid(raw: bytes) -> Grid:
    """Collision bits (10 and 11) of the map without its margin of 7 cells (8 on the right)."""
    width, height = struct.unpack_from("<ii", raw)
    cells = np.frombuffer(raw, "<u2", offset=8).reshape(height, width)[MARGIN : height - 7, MARGIN : width - 8]
    rows = np.where(cells & 0x0C00, ord("#"), ord(".")).astype(np.uint8)
    return Grid(width - 15, height - 14, tuple(row.tobytes().decode() for row in rows))


def read_events(memory: Memory, grid: Grid) -> Events:
    """Warps and connections through the map header's ROM pointers; none where they make no sense."""
    _, events, _, connections = memory.unpack("IIII", MAP_HEADER)
    return Events(_warps(memory, events, grid), _connections(memory, connections))


def _warps(memory: Memory, events: int, grid: Grid) -> tuple[tuple[int, int, int, int], ...]:
    found = memory.unpack("BBBBII", events) if events >> 24 in (8, 9) else None
    if found is None or found[5] >> 24 not in (8, 9):
        return ()
    raw = memory.bytes(found[5], 8 * found[1]) or b""
    warps = tuple((x, y, group, number) for x, y, _, _, number, group in struct.iter_unpack("<hhBBBB", raw))
    return warps if all(0 <= x < grid.width and 0 <= y < grid.height for x, y, _, _ in warps) else ()


def _connections(memory: Memory, address: int) -> tuple[tuple[str, int, int], ...]:
    found = memory.unpack("iI", address) if address >> 24 in (8, 9) else None
    if found is None or not 0 < found[0] <= 8 or found[1] >> 24 not in (8, 9):
        return ()
    raw = memory.bytes(found[1], 12 * found[0]) or b""
    sides = {}
    for side, group, number in struct.iter_unpack("<B7xBB2x", raw):
        if side in SIDES:  # 5 and 6 are dives
            sides.setdefault(SIDES[side], (group, number))  # the first of two on one side
    return tuple((side, *target) for side, target in sides.items())


def _quest_menu(ewram: bytes) -> str:
    value = ewram[QUEST_MENU & 0xFFFFFF]
    return MENUS[value] if value < len(MENUS) else "none"


def read_battle(memory: Memory, enemies: tuple[dict, ...], menu: str | None) -> dict:
    """The battle: whom against, and on the quest which of its menus is up. The enemy is the first one standing."""
    enemy = next((e for e in enemies if e["hp"] > 0), enemies[0] if enemies else {})
    cursor = MOVE_CURSOR if menu == "move" else ACTION_CURSOR
    return {
        "trainer": bool(memory.unpack("I", BATTLE_TYPE)[0] & 8),
        "enemy": {key: enemy.get(key) for key in ("species", "level", "hp", "max_hp")},
        "menu": menu if menu in ("action", "move", "message") else None,
        "cursor": memory.ewram[cursor & 0xFFFFFF],
        "kind": None if menu is None else "tide" if memory.ewram[QUEST_ENEMY_KIND & 0xFFFFFF] else "leaf",
    }


@cache
def location(place: tuple[int, int]) -> str:
    """The map's name where it is known, else its numbers."""
    return LOCATIONS.get(place, f"MAP {place[0]}.{place[1]}")
