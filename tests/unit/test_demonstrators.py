"""What the scripted players press, on views made by hand. No game is needed."""

import numpy as np
import pytest

from supertux_env.demonstrators import ACTION, JUMP, LEFT, RIGHT, SKILLS, Enemy, View, choose
from supertux_env.levels import TILE, Terrain

GROUND = 12  # row of the topmost solid tile


def terrain(pits=(), walls=()) -> Terrain:
    solid = np.zeros((15, 60), bool)
    solid[GROUND:] = True
    solid[:, list(pits)] = False
    solid[GROUND - 2 : GROUND, list(walls)] = True
    return Terrain(solid, spawn_x=96.0, goal_x=1800.0)


def view(**changes) -> View:
    at_rest = dict(
        x=320.0, feet=GROUND * TILE, vx=0.0, vy=0.0, suit="small", on_ground=True, enemies=[], right_edge=900.0
    )
    return View(**at_rest | changes)


def keys(of: View, skill: str = "skilled", **ground) -> set[str]:
    return choose(of, terrain(**ground), SKILLS[skill])


@pytest.mark.parametrize("skill", ["skilled", "sloppy"])
def test_walks_where_nothing_is_in_the_way(skill):
    assert keys(view(), skill) == {RIGHT}


def test_jumps_over_what_is_near_and_not_what_is_far():
    for ground in ({"pits": (12, 13)}, {"walls": (12,)}):
        assert keys(view(), **ground) == {RIGHT, JUMP}
    for ground in ({"pits": (16, 17)}, {"walls": (16,)}):
        assert keys(view(), **ground) == {RIGHT}


def test_sees_nothing_beyond_the_edge_of_the_screen():
    assert keys(view(right_edge=340.0), pits=(11, 12)) == {RIGHT}
    assert keys(view(right_edge=900.0), pits=(11, 12)) == {RIGHT, JUMP}


def test_allows_for_its_delay_or_not():
    fast = view(vx=320.0)
    assert keys(fast, "skilled", pits=(14, 15)) == {RIGHT, JUMP}  # 96 px away, 86 of them are gone before the key acts
    assert keys(fast, "sloppy", pits=(14, 15)) == {RIGHT}


def test_brakes_waits_and_jumps_by_the_distance_of_an_enemy():
    def pressed(distance, vx, walks=-80.0):
        return keys(view(vx=vx, enemies=[Enemy(distance, 0.0, walks)]))

    assert pressed(400, 320) == {RIGHT}
    assert pressed(300, 320) == {LEFT}  # too fast to meet it
    assert pressed(200, 100) == set()  # slow enough: let it come
    assert pressed(100, 0) == {JUMP}  # while he is in the air it comes to his feet
    assert pressed(150, 320) == {JUMP}  # he cannot stop any more: over it
    assert pressed(300, 320, walks=80.0) == {RIGHT}
    assert pressed(200, 320, walks=80.0) == {RIGHT, JUMP}  # from behind


def test_jump_straight_up_comes_down_on_the_enemy():
    """From the first frame that says jump, by the game's own figures: 520 px/s up, gravity 1000, an enemy 32 high."""
    for x in range(250, 32, -1):
        if JUMP in keys(view(enemies=[Enemy(x, 0.0, -80.0)])):
            break
    flight_s = 0.52 + np.sqrt(2 * (0.52**2 * 500 - 32) / 1000)
    assert abs(x - 80 * (0.27 + flight_s)) < 32  # boxes of 32 pixels overlap


def test_a_jump_once_decided_is_kept_while_he_brakes():
    """A key let go of in the rise cuts the jump to a third, and he comes down in front of the enemy."""
    for start in range(160, 400, 5):
        x, vx, jumping = start, 320.0, False
        while vx > 0 and x > 40:
            pressed = keys(view(vx=vx, enemies=[Enemy(x, 0.0, -80.0)]))
            assert JUMP in pressed or not jumping, (start, x, vx)
            jumping = jumping or JUMP in pressed
            x, vx = x - (vx + 80) / 10, vx - 60  # the next frame
    assert keys(view(feet=340.0, vy=-400.0, on_ground=False, enemies=[Enemy(100, 44.0, -80.0)])) == {JUMP}


def test_ignores_enemies_that_cannot_come():
    assert keys(view(enemies=[Enemy(60, -150.0, -80.0)])) == {RIGHT}  # it walks far above
    assert keys(view(enemies=[Enemy(200, 0.0, -80.0)]), pits=(14, 15)) == {RIGHT}  # a pit lies between
    assert keys(view(enemies=[Enemy(-60, 0.0, -80.0)])) == {RIGHT}  # he has passed it


def test_fire_is_used():
    assert keys(view(suit="fire", enemies=[Enemy(150, 0.0, -80.0)])) == {ACTION}
    assert keys(view(suit="fire", enemies=[Enemy(250, 0.0, -80.0)])) == {ACTION, RIGHT}
    assert keys(view(suit="fire", enemies=[Enemy(450, 0.0, -80.0)])) == {RIGHT}


def test_steers_in_the_air_by_the_place_where_it_comes_down():
    falling = dict(feet=300.0, vx=320.0, vy=100.0, on_ground=False)
    assert keys(view(**falling)) == {RIGHT}
    assert keys(view(**falling), pits=(15, 16)) == {LEFT}  # it would land just before a pit
    assert keys(view(**falling, enemies=[Enemy(40, 84.0, -80.0)])) == {LEFT}  # it would land beyond the enemy
    assert keys(view(feet=300.0, vx=320.0, vy=-300.0, on_ground=False), pits=(12, 13)) == {RIGHT, JUMP}
