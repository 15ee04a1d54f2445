"""The quest ROM: it is what the source builds, its header is its own, and it runs and keeps its state as documented."""

import os
import shutil
import struct
import subprocess
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from pokemon_env.emulator import EWRAM, open_emulator

QUEST = Path(__file__).parents[2] / "pokemon_env" / "quest"
ROM = (QUEST / "quest.gba").read_bytes()
COMPILER = "12.2.1"  # Debian 12's; another version may order instructions differently
FIELD = 0x08085E5D
STEPS = {"UP": (0, -1), "DOWN": (0, 1), "LEFT": (-1, 0), "RIGHT": (1, 0)}
MESSAGE, START_MENU, CHOOSE = 1, 2, 3


# the file -------------------------------------------------------------------------------------------------------------
def test_the_source_builds_the_committed_file_byte_for_byte(tmp_path):
    promised = os.environ.get("CI") == "true"
    if not shutil.which("arm-none-eabi-gcc"):
        (pytest.fail if promised else pytest.skip)("arm-none-eabi-gcc missing: apt-get install gcc-arm-none-eabi")
    version = subprocess.run(["arm-none-eabi-gcc", "-dumpversion"], capture_output=True, text=True).stdout.strip()
    if version != COMPILER:
        pytest.skip(f"arm-none-eabi-gcc is {version}, expected {COMPILER}")
    subprocess.run([QUEST / "build.sh", "again.gba"], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "again.gba").read_bytes() == ROM
    assert [path.name for path in tmp_path.iterdir()] == ["again.gba"]


def test_the_header_names_the_quest_and_leaves_the_logo_empty():
    assert len(ROM) < 64 * 1024
    assert ROM[3] == 0xEA  # a branch: what emulators know a GBA program by
    assert ROM[0x04:0xA0] == bytes(0x9C)
    assert ROM[0xA0:0xAC] == b"QUEST".ljust(12, b"\0")
    assert ROM[0xAC:0xB0] == b"QEST"
    assert ROM[0xB2] == 0x96
    assert (sum(ROM[0xA0:0xBD]) + 0x19 + ROM[0xBD]) % 256 == 0


# the game -------------------------------------------------------------------------------------------------------------
class Game:
    """The quest on an emulator, with what these tests read of it, each at its address."""

    def __init__(self):
        self.emulator = open_emulator(QUEST / "quest.gba")

    def read(self, address: int, form: str):
        ewram, iwram = self.emulator.memory()
        region = ewram if address >> 24 == EWRAM >> 24 else iwram
        values = struct.unpack_from("<" + form, region, address & 0xFFFFFF)
        return values if len(values) > 1 else values[0]

    def start(self, wait: int):
        """Power on, wait, press START; the controls must be free within 30 frames."""
        self.emulator.reset()
        self.emulator.run((), 30 + wait)
        assert self.read(0x03005D8C, "I") == 0  # the title screen: no game yet
        self.emulator.run(("START",), 4)
        for _ in range(26):
            self.emulator.run((), 1)
            if not self.locked and self.read(0x030022C4, "I") == FIELD:
                return
        pytest.fail("the field does not take keys 30 frames after START")

    def press(self, *buttons: str):
        for button in buttons:
            self.emulator.run((button,), 12)
            self.emulator.run((), 48)

    @property
    def locked(self) -> bool:
        return bool(self.read(0x03000F2C, "B"))

    @property
    def menu(self) -> int:
        return self.read(0x0203F000, "B")

    @property
    def place(self) -> tuple[tuple[int, int], tuple[int, int]]:
        x, y, group, number = self.read(self.read(0x03005D8C, "I"), "hhbb")
        return (group, number), (x, y)

    def flag(self, number: int) -> bool:
        return bool(self.read(self.read(0x03005D8C, "I") + 0x1270 + number // 8, "B") >> number % 8 & 1)

    @property
    def money(self) -> int:
        key = self.read(self.read(0x03005D90, "I") + 0xAC, "I")
        assert key
        return self.read(self.read(0x03005D8C, "I") + 0x490, "I") ^ key

    def people(self) -> list[tuple[int, int]]:
        objects = [self.read(0x02037350 + 0x24 * i, "B15x2h") for i in range(1, 16)]
        return [(x - 7, y - 7) for active, x, y in objects if active & 1]

    def blocked(self) -> np.ndarray:
        """(height + 14, width + 15) bool: the cells that cannot be entered, people included."""
        width, height, pointer = self.read(0x03005DC0, "3I")
        cells = np.array(self.read(pointer, f"{width * height}H")).reshape(height, width) >> 10 & 3 != 0
        for x, y in self.people():
            cells[y + 7, x + 7] = True
        return cells

    def go(self, goal: tuple[int, int], limit: int = 80):
        """Walk to a cell of this map, or one cell beyond its edge; people who stand in the way are waited out."""
        world = self.place[0]
        for _ in range(limit):
            if self.place[0] != world or self.place[1] == goal:
                return
            while self.locked:
                self.press("DOWN", "RIGHT", "A") if self.read(0x030026F9, "B") & 2 else self.press("A")
            self.press(first_step(self.blocked(), self.place[1], goal) or "B")
        pytest.fail(f"no way to {goal} on map {world}")


def first_step(blocked: np.ndarray, start: tuple[int, int], goal: tuple[int, int]) -> str | None:
    queue, seen = deque([goal]), {goal}
    while queue:
        x, y = queue.popleft()
        for button, (dx, dy) in STEPS.items():
            cell = (x - dx, y - dy)
            if cell == start:
                return button
            inside = 0 <= cell[1] + 7 < blocked.shape[0] and 0 <= cell[0] + 7 < blocked.shape[1]
            if inside and cell not in seen and not blocked[cell[1] + 7, cell[0] + 7]:
                seen.add(cell)
                queue.append(cell)
    return None


@pytest.fixture(scope="module")
def game():
    game = Game()
    yield game
    game.emulator.close()


def test_waits_lead_to_many_start_cells_and_moving_pointers(game):
    cells, blocks, facings = set(), set(), set()
    for wait in range(80):
        game.start(wait)
        world, cell = game.place
        assert world == (0, 9) and not game.blocked()[cell[1] + 7, cell[0] + 7]
        assert first_step(game.blocked(), cell, (9, -1)), f"no way out of town from {cell}"
        first, second, _ = game.read(0x03005D8C, "3I")
        assert first == 0x02025A00 + first % 64 and second == 0x02024A54 + first % 64
        cells.add(cell), blocks.add(first), facings.add(game.read(0x02037368, "B") & 15)
    assert len(cells) >= 64
    assert len(blocks) == 16
    assert facings == {1, 2, 3, 4}


def test_a_new_game_has_its_name_its_flag_and_no_money(game):
    game.start(7)
    name = game.read(game.read(0x03005D90, "I"), "8B")
    assert bytes(name) == bytes(0xBB + ord(c) - ord("A") for c in "ROBIN") + b"\xff" * 3
    assert game.flag(0x86F) and not game.flag(0x860) and game.money == 0
    assert game.read(0x0203F004, "I") == struct.unpack("<I", b"QEST")[0]
    assert game.read(0x020244E9, "B") == 0
    assert game.read(0x03005DC0, "3I") == (20 + 15, 16 + 14, 0x02032318)
    layout, events, _, connections = game.read(0x02037318, "4I")
    assert struct.unpack_from("<2i", ROM, layout - 0x08000000) == (20, 16)
    assert ROM[events - 0x08000000 : events - 0x08000000 + 2] == bytes((2, 2))  # people, warps
    count, way = struct.unpack_from("<2I", ROM, connections - 0x08000000)
    assert (count, ROM[way - 0x08000000], ROM[way - 0x08000000 + 8 : way - 0x08000000 + 10]) == (1, 2, bytes((0, 16)))


def test_the_processor_halts_in_every_frame(game):
    game.start(3)
    for button in (None, "RIGHT", "START", "A"):  # standing, walking, in a menu, in a message
        for _ in range(30):
            game.emulator.run((button,) if button else (), 1)
            counter = struct.unpack_from("<I", game.emulator.state(), 0x5C)[0]  # r15 in mGBA's state
            assert ROM[counter - 4 - 0x08000000 : counter - 2 - 0x08000000] == b"\x02\xdf"  # right behind swi 2


def test_a_press_turns_and_then_walks_one_cell(game):
    game.start(0)
    game.go((9, 8))
    for button, facing in (("UP", 2), ("LEFT", 3), ("RIGHT", 4), ("DOWN", 1)):
        x, y = game.place[1]
        game.press(button)
        dx, dy = STEPS[button]
        assert game.place[1] == (x + dx, y + dy)
        assert game.read(0x02037368, "B") & 15 == facing
    x, y = game.place[1]
    game.emulator.run(("UP",), 4)  # too short to walk
    game.emulator.run((), 56)
    assert game.place[1] == (x, y) and game.read(0x02037368, "B") & 15 == 2


def test_the_start_menu_locks_and_a_alone_leaves_it(game):
    game.start(11)
    for leave in (("B",), ("START",), ("A", "A"), ("DOWN", "A", "A"), ("DOWN", "DOWN", "A")):
        game.press("START")
        assert game.locked and game.menu == START_MENU
        game.press(*leave)
        assert not game.locked and game.menu == 0, leave


def test_permit_money_and_guard(game):
    """The story up to the guard: he stops who comes without the permit, and is gone for who has it."""
    game.start(5)
    game.go((9, -1))
    assert game.place[0] == (0, 16)
    assert (7, 2) in game.people() and first_step(game.blocked(), game.place[1], (7, -1)) is None
    game.go((5, 8))
    game.press("LEFT", "A")  # the table
    assert game.locked and game.menu == CHOOSE
    game.press("RIGHT", "A", "A")
    assert not game.locked and game.flag(0x860)
    assert game.read(game.read(0x03005D8C, "I") + 0x139C + 2 * 0x23, "H") == 1
    assert game.read(0x020244E9, "B") == 1

    pid, owner = game.read(0x020244EC, "2I")
    plain = struct.pack("<12I", *(word ^ pid ^ owner for word in game.read(0x020244EC + 0x20, "12I")))
    assert sum(struct.unpack("<24H", plain)) % 65536 == game.read(0x020244EC + 0x1C, "H") != 0
    orders = [(a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4)]
    orders = [order for order in orders if sorted(order) == [0, 1, 2, 3]]
    assert struct.unpack_from("<H", plain, 12 * orders[pid % 24].index(0)) == (502,)

    game.go((7, 18))
    game.go((14, 5))
    assert game.place == ((1, 4), (4, 7))
    game.go((5, 4))
    game.press("UP", "A")
    assert game.locked and game.menu == MESSAGE and game.read(0x020375BC, "B") and game.read(0x03000E38, "B") == 0
    game.press("A", "A", "A")
    assert not game.locked and not game.read(0x020375BC, "B") and game.read(0x03000E38, "B") == 2
    assert game.flag(0x74) and game.money == 1000
    game.go((4, 8))
    game.go((9, -1))
    assert (7, 2) not in game.people()
    game.go((7, -1))
    assert game.place[0] == (0, 10) and game.flag(0x870)
