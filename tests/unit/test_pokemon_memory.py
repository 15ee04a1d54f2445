"""The reader of the game's memory on images made by hand: places, party, money, map, battle, and every milestone."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from pokemon_env import emulator, gym_env, memory, milestones
from pokemon_env.memory import Reader
from pokemon_env.milestones import MILESTONES, QUEST_MILESTONES, Tracker, distance_to

ROOT = Path(__file__).parents[2]
# the 24 orders of a party member's sub-blocks (growth, attacks, effort, misc) as the game numbers them
ORDERS = """GAEM GAME GEAM GEMA GMAE GMEA AGEM AGME AEGM AEMG AMGE AMEG
EGAM EGMA EAGM EAMG EMGA EMAG MGAE MGEA MAGE MAEG MEGA MEAG""".split()
ALPHABET = {c: 0xBB + i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")} | {
    c: 0xD5 + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")
}


def text(words: str, size: int) -> bytes:
    return bytes([0xA1 + int(c) if c.isdigit() else ALPHABET.get(c, 0) for c in words]).ljust(size, b"\xff")


def member(pid=1, trainer=0x12345678, species=277, nickname="TREE", level=5, hp=20, max_hp=21, status=0) -> bytes:
    """100 bytes as the game writes them."""
    blocks = {letter: bytes(range(i, i + 12)) for i, letter in enumerate("AEM")}
    blocks["G"] = struct.pack("<H10s", species, b"0123456789")
    plain = b"".join(blocks[letter] for letter in ORDERS[pid % 24])
    checksum = sum(struct.unpack("<24H", plain)) & 0xFFFF
    secret = b"".join(struct.pack("<I", word ^ pid ^ trainer) for word in struct.unpack("<12I", plain))
    head = struct.pack("<II10s2s8sHH", pid, trainer, text(nickname, 10), b"", b"", checksum, 0)
    return (head + secret + struct.pack("<IBBHH", status, level, 0, hp, max_hp)).ljust(100, b"\0")


class Image:
    """Memory of a game that has just begun in the home town: 20 x 16 cells, a wall around, two ways out."""

    def __init__(self, block1=0x02025A08, block2=0x02024A54, key=0xCAFE1234, size=(20, 16)):
        self.ewram, self.iwram, self.rom = bytearray(0x40000), bytearray(0x8000), bytearray(0x1000)
        self.block1, self.block2, self.key = block1, block2, key
        self.put(0x03005D8C, "II", block1, block2)
        self.put(0x030022C4, "I", 0x08085E5D)
        self.put(block2, "8s", text("ANNA", 8))
        self.put(block2 + 0xAC, "I", key)
        self.money(3000)
        self.place(0, 9, 4, 5)
        self.put(0x02037590 + 5, "B", 2)
        self.object(2, 4, 5, facing=1)
        width, height = size
        self.put(0x03005DC0, "iiI", width + 15, height + 14, 0x02032318)
        for y in range(-7, height + 7):
            for x in range(-7, width + 8):
                self.cell(x, y, not (0 < x < width - 1 and 0 < y < height - 1), width)
        # events at 0x100, one warp to the lab; connections at 0x200, north to the route
        self.put(0x02037318, "IIII", 0x08000080, 0x08000100, 0, 0x08000200)
        self.put(0x08000100, "BBBBII", 0, 1, 0, 0, 0, 0x08000120)
        self.put(0x08000120, "hhBBBB", 14, 5, 3, 0, 4, 1)
        self.put(0x08000200, "iI", 1, 0x08000220)
        self.put(0x08000220, "BxxxIBBxx", 2, 0, 0, 16)

    def put(self, address: int, layout: str, *values):
        region = {2: self.ewram, 3: self.iwram, 8: self.rom}[address >> 24]
        struct.pack_into("<" + layout, region, address & 0xFFFFFF, *values)

    def cell(self, x, y, wall, width=20):
        collision = (1 + (x + y) % 3 if wall else 0) << 10  # any of the three is a wall
        self.put(0x02032318 + 2 * ((y + 7) * (width + 15) + x + 7), "H", 0x3001 | collision)

    def place(self, group, number, x, y):
        self.put(self.block1, "hhbb", x, y, group, number)

    def money(self, amount):
        self.put(self.block1 + 0x490, "I", amount ^ self.key)

    def flag(self, number, value=True):
        at = self.block1 + 0x1270 + (number >> 3)
        bit = 1 << (number & 7)
        self.put(at, "B", self.ewram[at & 0xFFFFFF] & ~bit | bit * value)

    def var(self, number, value):
        self.put(self.block1 + 0x139C + 2 * (number - 0x4000), "H", value)

    def object(self, slot, x, y, facing=1, active=1):
        at = 0x02037350 + 0x24 * slot
        self.put(at, "B", active)
        self.put(at + 0x10, "hh", x + 7, y + 7)
        self.put(at + 0x18, "B", facing | 0x30)

    def party(self, *members, at=0x020244EC, count=0x020244E9):
        self.put(count, "B", len(members))
        for i, raw in enumerate(members):
            self.put(at + 100 * i, "100s", raw)

    def battle(self, trainer=False, *enemies):
        self.put(0x030026F9, "B", 2)
        self.put(0x03000F2C, "B", 1)
        self.put(0x02022FEC, "I", 8 * trainer | 4)
        self.party(*enemies, at=0x02024744, count=0x020244EA)

    def snapshot(self, reader=None, quest=False):
        reader = reader or Reader(bytes(self.rom), quest)
        return reader.read(bytes(self.ewram), bytes(self.iwram))

    def info(self, quest=False):
        return self.snapshot(quest=quest).info()


# places ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "block1, block2", [(0x02025A08, 0x02024A54), (0x02025A7C, 0x02024B00), (0x02030000, 0x0203F000)]
)
def test_blocks_are_found_through_their_pointers(block1, block2):
    image = Image(block1, block2)
    image.flag(0x86F)
    info = image.info()
    assert info["player"] == {
        "name": "ANNA",
        "x": 4,
        "y": 5,
        "facing": "south",
        "map": [0, 9],
        "location": "LITTLEROOT TOWN",
    }
    assert (info["money"], info["flags"]) == (3000, [0x86F])


@pytest.mark.parametrize("pointers", [(0, 0), (0x02025A08, 0), (0x08000000, 0x02024A54), (0x0203FFF0, 0x02024A54)])
def test_no_pointers_no_game(pointers):
    image = Image()
    image.put(0x03005D8C, "II", *pointers)
    snapshot = image.snapshot()
    assert not snapshot.running and not snapshot.free
    assert snapshot.info()["player"]["location"] == "TITLE"
    assert snapshot.info().keys() == Image().info().keys()


def test_negative_coordinates_and_unknown_maps():
    image = Image()
    image.place(26, 5, -1, -2)
    player = image.info()["player"]
    assert (player["x"], player["y"], player["location"]) == (-1, -2, "MAP 26.5")


@pytest.mark.parametrize("value, facing", [(1, "south"), (2, "north"), (3, "west"), (4, "east"), (0, None)])
def test_facing(value, facing):
    image = Image()
    image.object(2, 4, 5, value)
    assert image.info()["player"]["facing"] == facing


def test_people_are_active_objects_without_the_player():
    image = Image()
    image.object(0, 9, 3)
    image.object(5, 7, 7, active=0)
    image.object(15, -2, 20)
    assert image.info()["map"]["objects"] == [[9, 3], [-2, 20]]


def test_text():
    assert memory.decode_text(text("Bo2 Z", 8)) == "Bo2 Z"
    assert memory.decode_text(bytes(8)) == ""
    assert memory.decode_text(b"\xff" * 8) == ""


# money, flags, party --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", [0, 1, 0xFFFFFFFF, 0x80000001])
@pytest.mark.parametrize("amount", [0, 3300, 999_999])
def test_money_key(key, amount):
    image = Image(key=key)
    image.money(amount)
    assert image.info()["money"] == amount


@pytest.mark.parametrize("key", [0, 0xCAFE1234])
def test_items_of_two_pockets(key):
    image = Image(key=key)
    empty = [0, key & 0xFFFF] * 28
    image.put(image.block1 + 0x560, "60H", 13, 3 ^ key & 0xFFFF, 300, 1 ^ key & 0xFFFF, *empty)
    image.put(image.block1 + 0x650, "HH", 4, 12 ^ key & 0xFFFF)
    assert image.info()["items"] == {"potion": 3, "item_300": 1, "poke_ball": 12}


def test_flags_badges_and_variables():
    image = Image()
    numbers = [0x51, 0x74, 0x50A, 0x867, 0x86E, 0x86F, 0x95F]
    for number in numbers:
        image.flag(number)
    image.var(0x4085, 2)
    image.var(0x40FF, 0xABCD)
    snapshot = image.snapshot()
    assert snapshot.info()["flags"] == numbers
    assert snapshot.info()["badges"] == [True] + [False] * 6 + [True]
    assert (snapshot.var(0x4085), snapshot.var(0x4084), snapshot.var(0x40FF)) == (2, 0, 0xABCD)


@pytest.mark.parametrize("order", range(24))
@pytest.mark.parametrize("trainer", [0, 0xDEADBEEF])
def test_party_of_all_orders(order, trainer):
    image = Image()
    image.party(member(pid=0xF0000000 - 0xF0000000 % 24 + order, trainer=trainer, species=280 + order))
    assert image.info()["party"] == [
        {"species": 280 + order, "nickname": "TREE", "level": 5, "hp": 20, "max_hp": 21, "status": "ok"}
    ]


def test_party_of_six_and_its_states():
    words = {0: "ok", 3: "sleep", 8: "poison", 16: "burn", 32: "freeze", 64: "paralysis", 0x80: "toxic"}
    image = Image()
    image.party(*[member(pid=i, species=i + 1, status=status) for i, status in enumerate(list(words)[:6])])
    assert [m["status"] for m in image.info()["party"]] == list(words.values())[:6]
    assert [m["species"] for m in image.info()["party"]] == [1, 2, 3, 4, 5, 6]
    image.put(0x020244E9, "B", 200)  # no team has more than six
    assert len(image.info()["party"]) == 6
    assert memory.read_member(member(status=0x80))["status"] == "toxic"


def test_broken_checksum_has_no_species():
    raw = bytearray(member())
    raw[0x30] ^= 1
    assert memory.read_member(bytes(raw))["species"] is None
    assert memory.read_member(bytes(raw))["level"] == 5


# map ------------------------------------------------------------------------------------------------------------------
def test_grid_without_its_margin():
    image = Image()
    image.cell(3, 2, wall=True)
    grid = image.info()["map"]
    assert (grid["width"], grid["height"]) == (20, 16)
    assert grid["collision"] == ["#" * 20, "#" + "." * 18 + "#", "#..#" + "." * 15 + "#"] + [
        "#" + "." * 18 + "#"
    ] * 12 + ["#" * 20]


def test_a_changed_cell_is_seen_by_the_same_reader():
    image = Image()
    reader = Reader(bytes(image.rom))
    before = image.snapshot(reader).info()["map"]["collision"]
    image.cell(6, 7, wall=True)
    after = image.snapshot(reader).info()["map"]["collision"]
    assert (before[7][6], after[7][6]) == (".", "#")
    image.party(member())
    image.flag(0x860)
    info = image.snapshot(reader).info()
    assert (len(info["party"]), info["flags"]) == (1, [0x860])


def test_exits():
    info = Image().info()["map"]
    assert info["warps"] == [[14, 5, 1, 4]]
    assert info["connections"] == {"north": [0, 16]}


def test_exits_of_another_map_are_read_again():
    image = Image()
    image.put(0x08000300, "BBBBII", 0, 0, 0, 0, 0, 0)
    reader = Reader(bytes(image.rom))
    assert image.snapshot(reader).info()["map"]["warps"]
    image.put(0x02037318, "IIII", 0x08000080, 0x08000300, 0, 0)
    after = image.snapshot(reader).info()["map"]
    assert (after["warps"], after["connections"]) == ([], {})


@pytest.mark.parametrize(
    "address, layout, values",
    [
        (0x02037318, "IIII", (0, 0, 0, 0)),
        (0x02037318, "IIII", (0, 0x02000000, 0, 0x03000000)),
        (0x02037318, "IIII", (0, 0x09FFFFFF, 0, 0x08FFFFF0)),  # behind the ROM's end
    ],
)
def test_a_header_without_sense_has_no_exits(address, layout, values):
    image = Image()
    image.put(address, layout, *values)
    assert (image.info()["map"]["warps"], image.info()["map"]["connections"]) == ([], {})


def test_warps_outside_of_the_map_are_not_believed():
    image = Image()
    image.put(0x08000120, "hhBBBB", 20, 5, 3, 0, 4, 1)
    assert image.info()["map"]["warps"] == []


def test_sides_and_dives():
    image = Image()
    sides = [(1, 0, 1), (5, 24, 3), (3, 0, 2), (4, 0, 3), (3, 0, 9)]
    image.put(0x08000200, "iI", len(sides), 0x08000220)
    for i, (side, group, number) in enumerate(sides):
        image.put(0x08000220 + 12 * i, "BxxxIBBxx", side, 0, group, number)
    assert image.info()["map"]["connections"] == {"south": [0, 1], "west": [0, 2], "east": [0, 3]}


@pytest.mark.parametrize("header", [(0, 0, 0), (35, 30, 0x09000000), (4000, 4000, 0x02032318), (-5, 30, 0x02032318)])
def test_a_grid_without_sense_is_empty(header):
    image = Image()
    image.put(0x03005DC0, "iiI", *header)
    assert image.info()["map"] == {
        "width": 0,
        "height": 0,
        "collision": [],
        "warps": [],
        "connections": {},
        "objects": [],
    }


def test_info_is_plain_and_fresh():
    image = Image()
    image.battle(True, member())
    image.party(member())
    reader = Reader(bytes(image.rom))
    info = image.snapshot(reader).info()
    copy = json.loads(json.dumps(info))
    assert copy == info
    for part in (info["party"][0], info["battle"]["enemy"], info["map"]["connections"]):
        part.clear()
    info["map"]["collision"].clear(), info["map"]["warps"][0].clear(), info["flags"].clear()
    assert image.snapshot(reader).info() == copy


# dialogue and battle --------------------------------------------------------------------------------------------------
def test_dialogue_is_a_lock_outside_of_battle():
    image = Image()
    assert (image.info()["locked"], image.info()["dialogue"], image.info()["battle"]) == (False, False, None)
    image.put(0x03000F2C, "B", 1)
    assert (image.info()["locked"], image.info()["dialogue"]) == (True, True)
    image.battle(False, member())
    assert (image.info()["locked"], image.info()["dialogue"]) == (True, False)


@pytest.mark.parametrize("trainer", [False, True])
def test_battle(trainer):
    image = Image()
    image.battle(trainer, member(hp=0, species=1), member(hp=9, max_hp=30, species=2, level=12))
    image.put(0x020244AC, "B", 3)
    battle = image.info()["battle"]
    assert battle == {
        "trainer": trainer,
        "enemy": {"species": 2, "level": 12, "hp": 9, "max_hp": 30},
        "menu": None,
        "cursor": 3,
        "kind": None,
    }


@pytest.mark.parametrize(
    "value, menu, in_battle", [(4, "action", "action"), (5, "move", "move"), (1, "message", "message")]
)
def test_battle_menus_of_the_quest(value, menu, in_battle):
    image = Image()
    image.battle(True, member())
    image.put(0x0203F000, "BB", value, value & 1)
    image.put(0x020244AC, "B4xB", 2, 1)  # the cursors of the two menus, but for three bytes
    image.put(0x020244B0, "B", 1)
    info = image.info(quest=True)
    assert (info["menu"], info["battle"]["menu"]) == (menu, in_battle)
    assert info["battle"]["cursor"] == (1 if menu == "move" else 2)
    assert info["battle"]["kind"] == ("tide" if value & 1 else "leaf")


@pytest.mark.parametrize("value, menu", list(enumerate(["none", "message", "start", "choose", "action", "move"])))
def test_menus_of_the_quest(value, menu):
    image = Image()
    image.put(0x0203F000, "B", value)
    assert image.info(quest=True)["menu"] == menu
    assert image.snapshot(quest=True).free == (menu == "none")
    assert image.info()["menu"] is None


# milestones -----------------------------------------------------------------------------------------------------------
BADGE = 0x867
REACHED = {  # id -> what makes it true: a map, flags, variables, and milestones that come before by rule
    "GAME_RUNNING": {},
    "PLAYER_NAME_SET": {},
    "INTRO_CUTSCENE_COMPLETE": {"map": (25, 40)},
    "LITTLEROOT_TOWN": {"flags": [0x86F]},
    "PLAYER_HOUSE_ENTERED": {"map": (1, 0)},
    "PLAYER_BEDROOM": {"map": (1, 1)},
    "CLOCK_SET": {"flags": [0x51]},
    "RIVAL_HOUSE": {"map": (1, 2)},
    "RIVAL_BEDROOM": {"map": (1, 3)},
    "ROUTE_101": {"map": (0, 16)},
    "STARTER_CHOSEN": {"flags": [0x860]},
    "BIRCH_LAB_VISITED": {"map": (1, 4), "before": [0x860]},
    "OLDALE_TOWN": {"flags": [0x870]},
    "ROUTE_103": {"map": (0, 18)},
    "RECEIVED_POKEDEX": {"flags": [0x861]},
    "ROUTE_102": {"map": (0, 17)},
    "PETALBURG_CITY": {"flags": [0x876]},
    "DAD_FIRST_MEETING": {"map": (8, 1)},
    "GYM_EXPLANATION": {"vars": {0x4085: 2}},
    "ROUTE_104_SOUTH": {"map": (0, 19)},
    "PETALBURG_WOODS": {"map": (24, 11)},
    "TEAM_AQUA_GRUNT_DEFEATED": {"flags": [0x50A]},
    "ROUTE_104_NORTH": {"map": (0, 19), "before": [0x50A]},
    "RUSTBORO_CITY": {"flags": [0x879]},
    "RUSTBORO_GYM_ENTERED": {"map": (11, 3)},
    "ROXANNE_DEFEATED": {"flags": [BADGE], "at": (11, 3)},
    "FIRST_GYM_COMPLETE": {"map": (0, 3), "before": [BADGE], "at": (11, 3)},
}


def test_the_list():
    assert [m.id for m in MILESTONES] == list(REACHED)
    assert len(MILESTONES) == 27
    assert [m.id for m in QUEST_MILESTONES] == [
        "GAME_RUNNING",
        "PLAYER_NAME_SET",
        "LITTLEROOT_TOWN",
        "ROUTE_101",
        "STARTER_CHOSEN",
        "BIRCH_LAB_VISITED",
        "OLDALE_TOWN",
        "RECEIVED_POKEDEX",
        "PETALBURG_WOODS",
        "TEAM_AQUA_GRUNT_DEFEATED",
        "RUSTBORO_CITY",
        "RUSTBORO_GYM_ENTERED",
        "ROXANNE_DEFEATED",
        "FIRST_GYM_COMPLETE",
    ]


@pytest.mark.parametrize("name", list(REACHED)[2:])
def test_each_milestone(name):
    """Before the one thing that makes it true it is not reached, with it it is, and nothing else is."""
    how, image = REACHED[name], Image()
    image.place(*how.get("at", (0, 9)), 4, 5)
    for number in how.get("before", ()):
        image.flag(number)
    tracker = Tracker(MILESTONES)
    tracker.reset(image.snapshot())
    assert name not in tracker.completed and tracker.new == []
    if "map" in how:
        image.place(*how["map"], 4, 5)
    for number in how.get("flags", ()):
        image.flag(number)
    for number, value in how.get("vars", {}).items():
        image.var(number, value)
    also = {"ROUTE_104_NORTH": ["ROUTE_104_SOUTH"]}.get(name, [])
    assert tracker.update(image.snapshot()) == [*also, name]
    assert tracker.completed[-1] == name
    assert tracker.update(image.snapshot()) == []  # once only


def test_game_running_and_name():
    image, tracker = Image(), Tracker(MILESTONES)
    image.put(0x03005D8C, "II", 0, 0)
    image.place(25, 40, 0, 0)
    assert tracker.update(image.snapshot()) == []
    image.put(0x03005D8C, "II", image.block1, image.block2)
    image.put(image.block2, "8s", b"\xff" * 8)
    assert tracker.update(image.snapshot()) == ["GAME_RUNNING"]
    image.put(image.block2, "8s", text("PLAYER", 8))
    image.place(0, 9, 0, 0)
    assert tracker.update(image.snapshot()) == []
    image.put(image.block2, "8s", text("ANNA", 8))
    assert tracker.update(image.snapshot()) == ["PLAYER_NAME_SET"]


@pytest.mark.parametrize("gender, own, rival", [(0, (1, 0), (1, 2)), (1, (1, 2), (1, 0))])
def test_houses_by_gender(gender, own, rival):
    for place, names in ((own, ["PLAYER_HOUSE_ENTERED"]), (rival, ["RIVAL_HOUSE"])):
        image, tracker = Image(), Tracker(MILESTONES)
        image.put(image.block2 + 8, "B", gender)
        tracker.reset(image.snapshot())
        image.place(*place, 4, 5)
        assert tracker.update(image.snapshot()) == names
        image.place(place[0], place[1] + 1, 4, 5)
        assert tracker.update(image.snapshot()) == [
            {"PLAYER_HOUSE_ENTERED": "PLAYER_BEDROOM"}.get(names[0], "RIVAL_BEDROOM")
        ]


@pytest.mark.parametrize(
    "name, place, flags",
    [
        ("BIRCH_LAB_VISITED", (1, 4), []),  # no starter yet
        ("ROUTE_104_NORTH", (0, 19), []),  # the woods are not cleared
        ("FIRST_GYM_COMPLETE", (11, 3), [BADGE]),  # still in the gym
        ("FIRST_GYM_COMPLETE", (0, 3), [0x868]),  # another badge
        ("LITTLEROOT_TOWN", (0, 9), []),  # there, and the game has not noted it
    ],
)
def test_what_does_not_count(name, place, flags):
    image, tracker = Image(), Tracker(MILESTONES)
    image.place(*place, 4, 5)
    for number in flags:
        image.flag(number)
    tracker.update(image.snapshot())
    assert name not in tracker.completed


def test_a_tracker_belongs_to_one_game():
    image, first, second = Image(), Tracker(QUEST_MILESTONES), Tracker(QUEST_MILESTONES)
    image.flag(0x86F)
    first.reset(image.snapshot())
    assert first.info() == {
        "completed": ["GAME_RUNNING", "PLAYER_NAME_SET", "LITTLEROOT_TOWN"],
        "next": "ROUTE_101",
        "total": 14,
        "new": [],
    }
    assert second.info()["completed"] == []
    image.flag(0x870)  # out of order is fine
    assert first.update(image.snapshot()) == ["OLDALE_TOWN"]
    assert first.info()["next"] == "ROUTE_101"


def test_no_milestones():
    tracker = Tracker(())
    assert tracker.update(Image().snapshot()) == []
    assert tracker.info() == {"completed": [], "next": None, "total": 0, "new": []}


def test_distance_to_the_exit():
    image = Image()
    game = image.snapshot()
    assert distance_to((1, 4), game) == 10  # the door at (14, 5) from (4, 5)
    assert distance_to((0, 16), game) == 6  # over the northern edge from row 5
    assert distance_to((0, 9), game) is None
    assert distance_to((0, 3), game) is None
    assert distance_to(None, game) is None


@pytest.mark.parametrize("side, cells", [(1, 11), (2, 6), (3, 5), (4, 16)])
def test_distance_over_each_edge(side, cells):
    image = Image()
    image.put(0x08000220, "BxxxIBBxx", side, 0, 0, 16)
    assert distance_to((0, 16), image.snapshot()) == cells


# ROMs, states, colours ------------------------------------------------------------------------------------------------
def rom_with(code: bytes) -> bytes:
    return bytes(0xAC) + code + bytes(0x50)


def test_roms_are_told_apart(monkeypatch, tmp_path):
    path = tmp_path / "some.gba"
    assert gym_env.identify_rom(rom_with(b"QEST"), path) == "quest"
    with pytest.warns(UserWarning, match="SHA-1") as caught:
        assert gym_env.identify_rom(rom_with(b"BPEE"), path) == "other"
    assert "some.gba" in str(caught[0].message) and gym_env.EMERALD_SHA1 in str(caught[0].message)
    found = str(caught[0].message).split("SHA-1 ")[1][:40]
    monkeypatch.setattr(gym_env, "EMERALD_SHA1", found)
    assert gym_env.identify_rom(rom_with(b"BPEE"), path) == "emerald"


@pytest.mark.parametrize("rom", [rom_with(b"BPRE"), b"", bytes(300), b"PK\x03\x04 not a ROM"])
def test_another_game_is_refused(rom, tmp_path):
    with pytest.raises(ValueError, match=r"some\.gba.*'BPEE'.*'QEST'.*another ROM"):
        gym_env.identify_rom(rom, tmp_path / "some.gba")


def test_missing_roms_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Emerald-GBAdvance/rom\.gba is missing.*Quest-v0"):
        gym_env.choose_rom("Emerald-GBAdvance/rom.gba")
    monkeypatch.setattr(gym_env, "QUEST_ROM", tmp_path / "quest.gba")
    with pytest.raises(FileNotFoundError, match=r"quest\.gba is missing.*build\.sh"):
        gym_env.choose_rom(None)
    (tmp_path / "quest.gba").write_bytes(b"1")
    assert gym_env.choose_rom(None) == tmp_path / "quest.gba"
    (tmp_path / "Emerald-GBAdvance").mkdir()
    (tmp_path / "Emerald-GBAdvance" / "rom.gba").write_bytes(b"1")
    assert gym_env.choose_rom(None) == Path("Emerald-GBAdvance/rom.gba")
    assert "quest.gba" in capsys.readouterr().err


ROM = rom_with(b"QEST")


def state(version=2, rom=ROM, size=0x61000) -> bytes:
    return struct.pack("<III", 0x01000000 + version, 0, zlib.crc32(rom)).ljust(size, b"\0")


def test_states_that_fit():
    emulator.check_state(state(), state(), ROM, "a.state", "core")
    emulator.check_state(state(2), state(7), ROM, "a.state", "core")  # newer cores read older states
    emulator.check_state(state(7, size=0x81000), state(7), ROM, "a.state", "core")


@pytest.mark.parametrize(
    "bad, words",
    [
        (state(7), r"a\.state.*07 00 00 01.*version 7.*core.*version 2.*02 00 00 01.*newer mGBA core"),
        (state(rom=b"other"), r"a\.state.*CRC-32.*Give the ROM"),
        (b"\x1f\x8b" + state()[2:], r"a\.state begins with 1f 8b.*expected 02 00 00 01.*Unpack"),
        (state(size=5000), r"a\.state has 5,000 bytes, expected 397,312.*cut off"),
        (b"", r"a\.state begins with"),
    ],
)
def test_states_that_do_not(bad, words):
    with pytest.raises(ValueError, match=words):
        emulator.check_state(bad, state(), ROM, "a.state", "core")


def test_canonical_colour():
    values = np.arange(256, dtype=np.uint8)
    picture = np.broadcast_to(values[:, None, None], (256, 4, 3)).copy()
    expected = [(v & 0xF8) | (v >> 5) for v in range(256)]
    assert emulator.canonical_colour(picture)[:, 0, 0].tolist() == expected
    assert (picture == np.array(expected, np.uint8)[:, None, None]).all()
    assert sorted(set(expected)) == [(v << 3) | (v >> 2) for v in range(32)]


def test_imports_are_light():
    code = "import sys, pokemon_env.gym_env, pokemon_env.milestones; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"stable_retro", "libretro", "pygame", "torch", "av", "PIL", "ale_py", "matplotlib"}
    assert heavy & set(loaded.split()) == set()
    assert milestones.MILESTONES is MILESTONES
