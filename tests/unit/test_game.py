"""Game files: a game of one's own needs no code, and a file that is wrong is explained."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.sessions import EPISODES, EVENTS, read_table
from precompute_labels import Args, main
from session_labels.game import load_game
from tests.synthetic import write_session

GAME = """
name = "Hopper"
folders = ["pictures"]
respawn_gap_s = 1.0

[DEATH]
sprites = ["boom.png"]
rule = "first"
min_gap_s = 1.5

[ATTACK]
sprites = ["wreck.png"]
mirror = true
rule = "track"
stays_s = 0.8
camera_speed = 300

[WIN]
sprites = ["flag.png"]
rule = "first"
min_gap_s = 1
"""
SHOWN = {"boom": [(20, 28)], "wreck": [(42, 50), (57, 65)], "flag": [(80, 90)]}  # frames, from and to


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """A game that nobody else plays: three drawn sprites on a level that stands still, one session of 10 s."""
    folder, rng = tmp_path_factory.mktemp("hopper"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    pictures = np.full((100, 96, 128, 3), 90, np.uint8) + rng.integers(0, 30, (96, 128, 3), np.uint8)
    for number, (name, times) in enumerate(SHOWN.items()):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        drawn = np.asarray(small.resize((30, 24), Image.BICUBIC))
        Image.fromarray(drawn).save(folder / "pictures" / f"{name}.png")  # has no alpha: all of it counts
        for again, (start, stop) in enumerate(times):
            seen = drawn[:, ::-1] if again else drawn  # the second wreck looks the other way
            pictures[start:stop, 30:54, 10 + 38 * number :][:, :, :30] = seen
    keys = {"KEY_RIGHT": np.arange(100) % 20 < 10}
    write_session(folder / "data" / "run_1", 100, pictures=pictures, keys=keys, labels=False)
    (folder / "hopper.toml").write_text(GAME)
    return folder


def label(hopper, **changes):
    options = {"game": hopper / "hopper.toml", "device": "cpu", "overwrite": True, "sprite_scales": ("1",)}
    main(Args(hopper / "data", **options | changes))
    return read_table(hopper / "data" / "run_1" / "events.parquet", EVENTS).to_pylist()


def test_a_game_of_ones_own_is_a_file(hopper):
    events = label(hopper)
    expected = [("DEATH", 20), ("ATTACK", 42), ("ATTACK", 57), ("WIN", 80)]
    assert [(e["event"], e["frame_idx"]) for e in events] == expected and min(e["confidence"] for e in events) > 0.85
    episodes = read_table(hopper / "data" / "run_1" / "episodes.parquet", EPISODES).to_pylist()
    bounds = [(e["start_frame"], e["end_frame"], e["outcome"]) for e in episodes]
    assert bounds == [(0, 20, "DEATH"), (30, 80, "WIN"), (90, 99, "INCOMPLETE")], "a gap of 1 s, as the file says"
    metadata = pq.read_schema(hopper / "data" / "run_1" / "events.parquet").metadata
    game = load_game(hopper / "hopper.toml")
    assert (metadata[b"game"].decode(), metadata[b"game_digest"].decode()) == ("Hopper", game.digest)
    assert metadata[b"sprite_threshold"] == b"0.85" and metadata[b"death_min_gap_s"] == b"1.5"


def test_flags_beat_the_game_file(hopper):
    assert len(label(hopper, template_thresholds=("wreck=0.9999",))) == 2
    assert len(label(hopper, sprite_threshold=0.9999)) == 0
    label(hopper, respawn_gap_s=3.0)
    episodes = read_table(hopper / "data" / "run_1" / "episodes.parquet", EPISODES)
    assert episodes["start_frame"].to_pylist() == [0, 50]


def test_a_single_sprite_has_a_threshold_of_its_own(hopper):
    strict = hopper / "strict.toml"
    strict.write_text(GAME + "\n[template_thresholds]\nwreck = 0.9999\n")
    assert [e["event"] for e in label(hopper, game=strict)] == ["DEATH", "WIN"]
    assert len(label(hopper, game=strict, template_thresholds=("wreck=0.85",))) == 4


def test_progress_counts_in_the_games_own_width(hopper):
    narrow = hopper / "narrow.toml"
    narrow.write_text("sprite_width = 16\n" + GAME)
    label(hopper, game=narrow, progress_reward=0.1)
    assert pq.read_schema(hopper / "data" / "run_1" / "progress.parquet").metadata[b"sprite_width"] == b"16.0"


def test_only_what_the_file_says_counts(tmp_path):
    (tmp_path / "a.toml").write_text(GAME)
    (tmp_path / "b.toml").write_text("# my game\n" + GAME.replace("1.5", "1.50"))
    (tmp_path / "c.toml").write_text("sprite_scales = [1, 1.4]\n" + GAME)
    a, b, c = (load_game(tmp_path / f"{name}.toml").digest for name in "abc")
    assert a == b != c and load_game(tmp_path / "c.toml").sprite_scales == ("1", "1.4")


def test_a_game_may_have_one_event(hopper, tmp_path):
    text = (hopper / "hopper.toml").read_text()
    for only in ("DEATH", "WIN"):
        start = text.index(f"[{only}]")
        end = text.find("\n[", start)
        one = hopper / f"{only}.toml"
        one.write_text(text[: text.index("[DEATH]")] + text[start : end if end > 0 else None])
        assert [row["event"] for row in label(hopper, game=one)] == [only]


WRONG = {
    'name = "Hopper"\n': ("", "game.toml: name is missing, expected a text. Add it"),
    "mirror = true": ("miror = true", r"game.toml: \[ATTACK\] miror = true is not known here, did you mean mirror\?"),
    "stays_s = 0.8": ('stays_s = "0.8"', r'\[ATTACK\] stays_s is "0.8", expected a number above 0'),
    "min_gap_s = 1.5": ("", r"\[DEATH\] min_gap_s is missing, expected a number, 0 or more"),
    "min_gap_s = 1\n": ("stays_s = 1\n", r"\[WIN\] stays_s = 1 is not known here"),
    'rule = "track"': ('rule = "tracker"', r'\[ATTACK\] rule is "tracker", expected a rule: "first" or "track"'),
    '["boom.png"]': ('"boom.png"', r'\[DEATH\] sprites is "boom.png", expected a list of texts'),
    'sprites = ["flag.png"]': ('key = "KEY_BACKSLSH"', r'\[WIN\] key is "KEY_BACKSLSH", expected an evdev key name'),
    "respawn_gap_s = 1.0\n": (
        'respawn_gap_s = 1.0\n[intents]\nLEEP = ["KEY_W"]\n',
        r'\[intents\] LEEP = \["KEY_W"\] is not known here, did you mean LEAP',
    ),
    "[ATTACK]\n": ('[intents]\nLEAP = "w"\n[ATTACK]\n', r'\[intents\] LEAP is "w", expected a list of key names'),
    "[DEATH]": ("[DAETH]", "game.toml: DAETH = .* is not known here, did you mean DEATH"),
    "min_gap_s = 1.5\n": (
        "min_gap_s = 1.5\nmin_sightings = 3\nof_frames = 2\n",
        r"of_frames is 2, expected min_s.*\(3\)",
    ),
    "respawn_gap_s = 1.0": ("respawn_gap_s = true", "respawn_gap_s is true, expected a number"),
    "[DEATH]\n": ('sprite_scales = ["big"]\n[DEATH]\n', r'sprite_scales is \["big"\], expected a list of numbers'),
    '"pictures"]': ('"pictures"', "game.toml is no TOML file: "),
    "[WIN]": (
        "[template_thresholds]\nbang = 1\n[WIN]",
        r"\[template_thresholds\] bang = 1 .* expected boom, wreck, flag",
    ),
    "[ATTACK]": ("[template_thresholds]\nboom = 85\n[ATTACK]", r"\[template_thresholds\] boom is 85, expected a score"),
}


@pytest.mark.parametrize("old", WRONG)
def test_what_is_wrong_in_a_game_file_is_named(tmp_path, old):
    new, why = WRONG[old]
    assert old in GAME
    (tmp_path / "game.toml").write_text(GAME.replace(old, new))
    with pytest.raises(ValueError, match=why):
        load_game(tmp_path / "game.toml")


def test_a_game_that_cannot_be_labelled_is_explained_before_the_work(hopper, tmp_path):
    def fails(match, **changes):
        with pytest.raises(SystemExit, match=match):
            label(hopper, **changes)

    fails("--game .*no.toml cannot be read .*Name a game's TOML file", game=tmp_path / "no.toml")
    elsewhere = tmp_path / "hopper.toml"
    elsewhere.write_text(GAME)
    fails("no sprites: .*pictures/boom.png.*Install the game, or name its folder.*--sprites", game=elsewhere)
    elsewhere.write_text('name = "keys only"\nrespawn_gap_s = 1\n[WIN]\nkey = "KEY_F1"\n')
    fails(r"names no sprites. Add a table \[DEATH\], \[ATTACK\] or \[WIN\]", game=elsewhere)
    elsewhere.write_text(GAME[: GAME.index("[ATTACK]")])
    fails("--attack-threshold: .*hopper.toml has no sprites of ATTACK", game=elsewhere, attack_threshold=0.9)


def test_the_game_that_is_here_needs_no_flag():
    game = load_game(Args.game)
    assert game.name == "SuperTux" and list(game.rules) == ["DEATH", "ATTACK"] and game.win["key"] == "KEY_BACKSLASH"
    assert Path(Args.game).is_absolute()
