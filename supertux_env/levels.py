"""Levels that tell the truth: generated from a seed, or a copy of a stock level with scripts put in.

The scripts print lines that `supertux_env.launch.Game` reads; nothing is drawn on the screen. Generated levels are this
project's own (MIT) and only name pictures of the installed game.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from supertux_env.launch import APT, DATA_DIR

TILE = 32  # pixels
ROWS = 15  # a generated level is one screen high, so the camera only moves sideways
FLOWERS = 0.5  # of the generated levels have a fire flower at the start
STOCK = {name: DATA_DIR / f"levels/world1/{name}.stl" for name in ("welcome_antarctica", "journey_begins")}
ENEMIES = (
    "snowball smartball mriceblock mrbomb jumpy flyingsnowball bouncingsnowball spiky captainsnowball fish "
    "kamikazesnowball sspiky walkingleaf zeekling"
).split()

# Runs once per life. The first position is printed before the intro screen, the rest in play, one per game step.
TRUTH_SCRIPT = """
print("T start\\n");
local coins = -1;
while(true) {
  local tux = sector.Tux;
  print("T pos " + tux.get_x() + " " + tux.get_y() + " " + tux.get_velocity_x() + " " + tux.get_velocity_y() + "\\n");
  if(tux.get_coins() != coins) { coins = tux.get_coins(); print("T coins " + coins + "\\n"); }
  wait(0);
}
"""
KILL_SCRIPT = 'print("T kill {kind} " + sector.Tux.get_velocity_y() + "\\n");'
WIN_SCRIPT = 'print("T win\\n");'


@dataclass
class Terrain:
    """What stands where. Row and column times TILE is a place in the level."""

    solid: np.ndarray  # (rows, columns) bool
    spawn_x: float  # pixels
    goal_x: float


def generate_level(seed: int, path: Path, tiles: int = 260) -> Path:
    """Write a level of about `tiles` columns: snowballs, pits of 2 to 4 tiles, walls and steps of 1 to 3, a goal."""
    rng = np.random.default_rng(seed)
    ground = np.full(tiles + 40, ROWS - 3)  # (columns,) row of the topmost solid tile, ROWS where there is a pit
    enemies, column, row = [], 14, ROWS - 3
    kinds = rng.permutation(np.repeat(["enemies", "pit", "wall", "step", "clear"], [7, 4, 2, 3, 2])).tolist()
    while column < tiles - 40:
        kind = kinds.pop(0)
        kinds.append(kind)
        length = 0
        if kind == "enemies":
            count = int(rng.integers(1, 4))
            length = 12 + 10 * count
            places = column + 10 + 10 * np.arange(count) + rng.integers(-1, 2, count)
            enemies += [(rng.choice(["snowball", "smartball"], p=[0.7, 0.3]), int(p), row) for p in places]
        elif kind == "pit":
            width = int(rng.integers(2, 5))
            length = width + 12
            ground[column : column + length] = row
            ground[column + 3 : column + 3 + width] = ROWS
        elif kind == "wall":
            length = 14
            ground[column : column + length] = row
            ground[column + 4 : column + 4 + int(rng.integers(1, 3))] = row - int(rng.integers(1, 4))
        elif kind == "step":
            height = int(rng.choice([h for h in (-3, -2, -1, 1, 2, 3) if ROWS - 7 <= row - h <= ROWS - 2]))
            row, length = row - height, 10
        else:
            length = int(rng.integers(10, 16))
        if kind not in ("pit", "wall"):
            ground[column : column + length] = row
        column += length
    ground[column:] = row
    ground = ground[: max(tiles, column + 12)]  # room for the goal
    tiles = len(ground)
    solid = np.arange(ROWS)[:, None] >= ground  # (ROWS, columns)
    goal = column + 4
    scenery = np.zeros((ROWS, tiles), int)
    scenery[row - 6 : row, [goal - 1, goal + 1]] = 129  # two poles
    for first in range(3, tiles - 6, 11):
        top = int(rng.integers(1, 4))
        if rng.random() < 0.6:
            scenery[top : top + 2, first : first + 4] = np.arange(85, 93).reshape(2, 4)  # a cloud
    objects = [
        f'({kind} (direction "left") (x {x * TILE}) (y {(r - 1) * TILE}) {_dead_script(kind)})'
        for kind, x, r in enemies
    ]
    flower = '(sprite "images/powerups/fireflower/fireflower.sprite")'
    objects += [
        f"(powerup {flower} (x {x * TILE}) (y {(ROWS - 4) * TILE}))" for x in [9] * bool(rng.random() < FLOWERS)
    ]
    objects += [
        _trigger("sequencetrigger", '(sequence "endsequence")', goal * TILE),
        _trigger("sequencetrigger", '(sequence "stoptux")', min(goal + 20, tiles - 3) * TILE),
        _trigger("scripttrigger", f"(script {_quote(WIN_SCRIPT)}) (button #f)", goal * TILE),
        f'(spawnpoint (name "main") (x {3 * TILE}) (y {(ROWS - 4) * TILE}))',
    ]
    text = f"""(supertux-level (version 3) (name "generated {seed}") (author "this project") (license "MIT")
(sector (name "main") (init-script {_quote(TRUTH_SCRIPT)}) (ambient-light (color 1 1 1))
(background (color 1 1 1) (alignment "bottom") (speed 0.35) (image "images/background/arctis2.png") (z-pos -200))
(gradient (top_color 0.4 0.6 1) (bottom_color 1 1 1)) (camera (name "Camera") (mode "normal"))
{chr(10).join(objects)}
{_tilemap(_snow(solid), solid=True, z=0)}
{_tilemap(scenery, solid=False, z=-100)}
))
"""
    return _write(path, text)


def instrument_level(stock: Path, path: Path) -> Path:
    """Write a copy of a stock level with the truth scripts in it. FileNotFoundError where it is missing."""
    text = _read(stock)
    text = re.sub(
        r'\(sector\s*\(name "main"\)', lambda m: f"{m[0]}\n(init-script {_quote(TRUTH_SCRIPT)})", text, count=1
    )
    for kind in ENEMIES:
        script = _dead_script(kind)
        text = re.sub(rf"\({kind}(?=\s)(?!\s*\(dead-script)", lambda m, script=script: f"{m[0]}\n{script}", text)

    def add_trigger(match):
        place = "".join(re.findall(r"\((?:x|y|width|height) -?[\d.]+\)", match[0]))
        return f"{match[0]}\n(scripttrigger (script {_quote(WIN_SCRIPT)}) (button #f) {place})"

    text, goals = re.subn(r'\(sequencetrigger\s*\(sequence "endsequence"\)(?:\s*\([^()]*\))*\s*\)', add_trigger, text)
    if "init-script" not in text or goals == 0:
        raise ValueError(f"{stock} has no sector main or no endsequence trigger. Choose one of {sorted(STOCK)}.")
    return _write(path, text)


def make_level(name: str, seed: int, path: Path) -> Path:
    """`generated`, from the seed, or one of STOCK."""
    if name == "generated":
        return generate_level(seed, path)
    if name not in STOCK:
        raise ValueError(f"level {name!r} is not known, expected generated or one of {sorted(STOCK)}")
    return instrument_level(STOCK[name], path)


def move_spawn(path: Path, pixels: float) -> Path:
    """Rewrite a level with its spawn point that far to the right. The ground there has to be flat."""
    place = re.compile(r'(\(spawnpoint\s*\(name "main"\)\s*\(x )([\d.]+)')
    return _write(path, place.sub(lambda m: f"{m[1]}{float(m[2]) + pixels:.1f}", _read(path), count=1))


def read_terrain(path: Path) -> Terrain:
    """The solid tiles of a level's main tile map, its spawn point and its goal."""
    text = _read(path)
    maps = re.findall(r"\(tilemap\s*\(solid #t\)(.*?)\(tiles([\d\s]*)\)", text, re.DOTALL)
    width, tiles = max(
        ((int(re.search(r"\(width (\d+)\)", head)[1]), np.array(body.split(), int)) for head, body in maps),
        key=lambda item: len(item[1]),
    )
    solid = np.isin(tiles, list(solid_tiles())).reshape(-1, width)
    spawn = re.search(r'\(spawnpoint\s*\(name "main"\)\s*\(x ([\d.]+)\)', text)
    goal = re.search(r'\(sequence "endsequence"\).*?\(x ([\d.]+)\)', text, re.DOTALL)
    return Terrain(solid, float(spawn[1]), float(goal[1]))


@cache
def solid_tiles() -> frozenset[int]:
    """Numbers of the tiles that stop Tux, from the game's own table: attribute bit 0, or (solid #t)."""
    text, solid = _read(DATA_DIR / "images/tiles.strf"), set()
    for ids, attributes in re.findall(r"\(ids([\d\s]*)\)\s*\(attributes([\d\s]*)\)", text):
        solid |= {int(i) for i, a in zip(ids.split(), attributes.split(), strict=False) if int(a) & 1}
    for block in re.split(r"\n\s*\(tile\s*\n", text)[1:]:
        if "(solid #t)" in block.split("(tiles")[0]:
            solid.add(int(re.search(r"\(id (\d+)\)", block)[1]))
    return frozenset(solid - {0})


def _snow(solid: np.ndarray) -> np.ndarray:
    """Snow tiles for a solid map (rows, columns): a cap above the top, the top, what is inside; left, middle, right."""
    padded = np.pad(solid, ((0, 1), (1, 1)), mode="edge")
    left, right = ~padded[:-1, :-2], ~padded[:-1, 2:]
    column = np.where(left, 0, np.where(right, 2, 1))
    above = np.vstack([np.zeros((1, solid.shape[1]), bool), solid[:-1]])
    tiles = np.where(solid, np.where(above, 10, 13) + column, 0)
    below = np.vstack([solid[1:], np.zeros((1, solid.shape[1]), bool)])
    cap_column = np.vstack([column[1:], column[-1:]])
    return np.where(~solid & below, 7 + cap_column, tiles)


def _tilemap(tiles: np.ndarray, solid: bool, z: int) -> str:
    rows = "\n".join(" ".join(map(str, row)) for row in tiles)
    height, width = tiles.shape
    return f"(tilemap (solid #{'t' if solid else 'f'}) (z-pos {z}) (width {width}) (height {height}) (tiles\n{rows}\n))"


def _trigger(kind: str, what: str, x: int) -> str:
    return f"({kind} {what} (width {TILE}) (height {ROWS * TILE}) (x {x}) (y 0))"


def _dead_script(kind: str) -> str:
    return f"(dead-script {_quote(KILL_SCRIPT.replace('{kind}', kind))})"


def _quote(script: str) -> str:
    escaped = script.strip().replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _read(path: Path) -> str:
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing. If it belongs to the game, install that: {APT}") from None


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return path
