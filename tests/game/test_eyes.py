"""What the scripted players see, on pictures put together from the game's own sprites."""

import numpy as np
import pytest
from PIL import Image

from supertux_env.demonstrators import Eyes
from supertux_env.launch import DATA_DIR
from supertux_env.levels import TILE, Terrain

CREATURES = DATA_DIR / "images/creatures"
GROUND = 12  # row of the topmost solid tile


@pytest.mark.parametrize(("width", "height", "camera_y"), [(640, 480, 0), (800, 600, -60)])
def test_an_enemy_is_seen_where_it_stands(width, height, camera_y):
    """A level of 480 pixels lies in the middle of a higher screen, as the game draws it."""
    solid = np.zeros((15, 60), bool)
    solid[GROUND:] = True
    picture = Image.new("RGB", (width, height), (120, 170, 230))
    picture.paste((90, 120, 150), (0, GROUND * TILE - camera_y, width, height))
    tux_x, enemy_x, feet = 200, 360, GROUND * TILE

    def draw(sprite: str, x: int, y: int):
        with Image.open(CREATURES / sprite) as image:
            picture.paste(image.convert("RGBA"), (x, y - camera_y), image.convert("RGBA"))

    draw("tux/small/stand-0.png", tux_x - 8, feet - 32 - 16)
    draw("snowball/snowball-0.png", enemy_x - 5, feet - 32 - 8 - 1)
    eyes = Eyes(Terrain(solid, spawn_x=96.0, goal_x=1800.0))
    view = eyes.look(np.asarray(picture), (tux_x, feet - 32, 0.0, 0.0))
    assert eyes.camera == pytest.approx((0, camera_y), abs=2) and view.suit == "small" and view.on_ground
    assert [(e.x, e.y, e.vx) for e in view.enemies] == [(pytest.approx(enemy_x - tux_x, abs=3), 0, -80)]
