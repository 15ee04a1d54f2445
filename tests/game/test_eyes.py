"""What the scripted players see, on pictures put together from the game's own sprites."""

import numpy as np
import pytest
from PIL import Image

from supertux_env.demonstrators import Eyes
from supertux_env.launch import DATA_DIR
from supertux_env.levels import TILE, Terrain

CREATURES = DATA_DIR / "images/creatures"
GROUND = 12  # row of the topmost solid tile


def level() -> Terrain:
    solid = np.zeros((15, 60), bool)
    solid[GROUND:] = True
    return Terrain(solid, spawn_x=96.0, goal_x=1800.0)


def picture(width: int, height: int, camera_y: int, sprites: dict[str, tuple[int, int]]) -> np.ndarray:
    """A grey ground under a blue sky, and `sprites` at their places (x, y) in the level: uint8 (height, width, 3)."""
    image = Image.new("RGB", (width, height), (120, 170, 230))
    image.paste((90, 120, 150), (0, GROUND * TILE - camera_y, width, height))
    for path, (x, y) in sprites.items():
        with Image.open(CREATURES / path) as sprite:
            image.paste(sprite.convert("RGBA"), (x, y - camera_y), sprite.convert("RGBA"))
    return np.asarray(image)


@pytest.mark.parametrize(("width", "height", "camera_y"), [(640, 480, 0), (800, 600, -60)])
def test_an_enemy_is_seen_where_it_stands(width, height, camera_y):
    """A level of 480 pixels lies in the middle of a higher screen, as the game draws it."""
    tux_x, enemy_x, feet, eyes = 200, 360, GROUND * TILE, Eyes(level())
    sprites = {"tux/small/stand-0.png": (tux_x - 8, feet - 32 - 16)}
    sprites |= {"snowball/snowball-0.png": (enemy_x - 5, feet - 32 - 8 - 1)}
    view = eyes.look(picture(width, height, camera_y, sprites), (tux_x, feet - 32, 0.0, 0.0))
    assert eyes.camera == pytest.approx((0, camera_y), abs=2) and view.suit == "small" and view.on_ground
    assert [(e.x, e.y, e.vx) for e in view.enemies] == [(pytest.approx(enemy_x - tux_x, abs=3), 0, -80)]


def test_tux_is_found_again_after_he_was_lost():
    """He has grown and gone far between two pictures, as where some were dropped."""
    feet, eyes = GROUND * TILE, Eyes(level())
    small = picture(640, 480, 0, {"tux/small/stand-0.png": (100 - 8, feet - 32 - 16)})
    grown = picture(640, 480, 0, {"tux/fire/stand-0.png": (500 - 16, feet - 64 - 14)})
    assert eyes.look(small, (100, feet - 32, 0.0, 0.0)).suit == "small"
    eyes.look(grown, (500, feet - 64, 0.0, 0.0))
    assert eyes.look(grown, (500, feet - 64, 0.0, 0.0)).suit == "fire"
    assert eyes.tux_xy == pytest.approx((500, feet - 64), abs=3)
