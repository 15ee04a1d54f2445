"""What the player is about to do: the rules by hand, the look ahead against plain loops, and intent.parquet."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import precompute_labels
from common.sessions import EPISODES, INTENT, INTENT_NAMES, load_session, read_table, write_table
from common.video import grey
from session_labels import surroundings
from session_labels.intents import RULES, choose_intents, label_intents, look_ahead, signs_of
from tests.reference import naive_intents, naive_key_table
from tests.synthetic import write_session


def intent_of(labeler, *signs):
    shown = np.array([[sign in signs for sign in signs_of(RULES[labeler])]])
    return INTENT_NAMES[choose_intents(shown, RULES[labeler])[0]]


def test_rules_of_keys():
    assert intent_of("keys") == "WAIT"
    assert intent_of("keys", "KEY_LEFT") == intent_of("keys", "KEY_RIGHT") == "RUN"
    assert intent_of("keys", "KEY_RIGHT", "KEY_DOWN") == "EVADE"
    assert intent_of("keys", "KEY_RIGHT", "KEY_DOWN", "KEY_LEFTCTRL") == intent_of("keys", "KEY_C") == "ATTACK"
    assert intent_of("keys", "KEY_UP", "KEY_X") == "CLIMB"
    assert intent_of("keys", "KEY_UP", "KEY_SPACE", "KEY_RIGHT") == "LEAP"
    assert intent_of("keys", "KEY_E", "KEY_SPACE") == intent_of("keys", "KEY_ENTER") == "LOOT"


@pytest.mark.parametrize("labeler", RULES)
@pytest.mark.parametrize("horizon", [0, 1, 4, 300])
def test_intents_against_plain_loops(labeler, horizon):
    rng = np.random.default_rng(horizon)
    shown = rng.random((200, len(signs_of(RULES[labeler])))) < 0.01
    cuts = [0, 31, 60, 61, 150, 200]
    found = choose_intents(look_ahead(shown, horizon, cuts), RULES[labeler])
    assert [INTENT_NAMES[i] for i in found] == naive_intents(
        shown, signs_of(RULES[labeler]), RULES[labeler], horizon, cuts
    )
    assert len(set(found)) > 4


def test_a_look_ahead_ends_with_the_stretch_and_the_recording():
    shown = np.zeros((10, 1), bool)
    shown[[5, 9]] = True
    assert np.flatnonzero(look_ahead(shown, 2, [0])).tolist() == [3, 4, 5, 7, 8, 9]
    assert np.flatnonzero(look_ahead(shown, 2, [0, 5, 8])).tolist() == [5, 8, 9]
    assert np.flatnonzero(look_ahead(shown, 0, [0])).tolist() == [5, 9]
    assert shown.sum() == 2  # the argument stays as it was


@pytest.fixture
def dataset(tmp_path):
    """SPACE in the first 5 of every 40 frames, RIGHT in the frames 20 to 59; a death at frame 78."""
    frames = np.arange(120)
    keys = {"KEY_SPACE": frames % 40 < 5, "KEY_RIGHT": (frames >= 20) & (frames < 60)}
    folder = write_session(tmp_path / "data" / "run_0", 120, keys=keys, pictures=np.zeros((120, 48, 64, 3), np.uint8))
    columns = {"episode_id": [0, 1], "start_frame": [0, 110], "end_frame": [78, 119], "length": [79, 10]}
    columns |= {"outcome": ["DEATH", "INCOMPLETE"], "reward": [-1.0, 0.0]}
    write_table(folder / "episodes.parquet", columns, EPISODES)
    return tmp_path / "data"


def test_intents_of_a_session_that_has_labels(dataset, capsys):
    arguments = dict(data_dir=dataset, detect_events=False, labeler="keys", intent_horizon_s=0.6)
    before = (dataset / "run_0" / "returns.parquet").read_bytes()
    precompute_labels.main(precompute_labels.Args(**arguments))
    assert (dataset / "run_0" / "returns.parquet").read_bytes() == before
    session = load_session(dataset / "run_0")
    table = read_table(dataset / "run_0" / "intent.parquet", INTENT)
    shown = naive_key_table(session, signs_of(RULES["keys"]))[1]
    intents = table["intent"].to_pylist()
    assert intents == naive_intents(shown, signs_of(RULES["keys"]), RULES["keys"], 6, [0, 79, 110, 120])
    assert intents[33:36] == ["LEAP"] * 3 and intents[13] == "RUN" and intents[12] == "WAIT"
    assert intents[73:79] == ["WAIT"] * 6 and intents[79] == "LEAP"  # the jump comes after the death
    assert table["frame_idx"].to_pylist() == list(range(120))
    assert table["timestamp"].to_pylist() == session.timestamps.tolist()
    metadata = pq.read_schema(dataset / "run_0" / "intent.parquet").metadata
    assert metadata[b"labeler"] == b"keys" and metadata[b"intent_horizon_s"] == b"0.6"
    assert metadata[b"cuts"] == b"[0, 79, 110, 120]" and metadata[b"recording_frames"] == b"120"
    assert int(metadata[b"recording_bytes"]) == (dataset / "run_0" / "recording.mp4").stat().st_size
    shares = np.array([intents.count(name) for name in ("LEAP", "RUN", "WAIT")]) / 120
    assert "run_0: intents LEAP {:.0%}, RUN {:.0%}, WAIT {:.0%}".format(*shares) in capsys.readouterr().out
    precompute_labels.main(precompute_labels.Args(**arguments | {"intent_horizon_s": 0.0}))
    assert read_table(dataset / "run_0" / "intent.parquet", INTENT)["intent"].to_pylist()[33] == "RUN"
    assert "other episodes" not in capsys.readouterr().out
    precompute_labels.main(precompute_labels.Args(data_dir=dataset, detect_events=False, overwrite=True))
    assert "run_0: intent.parquet was made for other episodes, kept; --labeler" in capsys.readouterr().out
    assert not list(dataset.glob("run_0/.*"))


def test_a_game_names_its_own_keys(dataset, capsys):
    game = dataset / "game.toml"
    rule = '[DEATH]\nsprites = ["boom.png"]\nrule = "first"\nmin_gap_s = 1.0\n'
    game.write_text(f'name = "Hopper"\nrespawn_gap_s = 1.0\n{rule}[intents]\nCLIMB = ["KEY_RIGHT", "KEY_D"]\n')
    arguments = dict(data_dir=dataset, detect_events=False, labeler="keys", intent_horizon_s=0.0, game=game)
    precompute_labels.main(precompute_labels.Args(**arguments))
    right = naive_key_table(load_session(dataset / "run_0"), ["KEY_RIGHT"])[1][:, 0]
    found = read_table(dataset / "run_0" / "intent.parquet", INTENT)["intent"].to_pylist()
    assert 0 < right.sum() < 120 and found == ["CLIMB" if down else "WAIT" for down in right]
    game.write_text(game.read_text().replace('"KEY_RIGHT", ', ""))
    precompute_labels.main(precompute_labels.Args(**arguments))
    assert "run_0: none of KEY_D was there; [intents] of the --game file names others" in capsys.readouterr().out


def test_no_intents_unless_asked_for(dataset):
    precompute_labels.main(precompute_labels.Args(data_dir=dataset, detect_events=False, overwrite=True))
    assert not (dataset / "run_0" / "intent.parquet").exists()
    with pytest.raises(SystemExit, match="--intent-horizon-s is -1.0, expected 0 or more"):
        precompute_labels.main(precompute_labels.Args(data_dir=dataset, intent_horizon_s=-1.0))


def test_a_full_disk_keeps_the_older_intents(dataset, monkeypatch):
    folder, write = dataset / "run_0", pq.write_table
    label_intents(load_session(folder), "keys", 1.0, {"recording_frames": 120})
    before = (folder / "intent.parquet").read_bytes()

    def full(table, path, *args, **options):
        write(table, path, *args, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        label_intents(load_session(folder), "keys", 0.5, {"recording_frames": 120})
    assert (folder / "intent.parquet").read_bytes() == before and not list(folder.glob(".*"))


# --- what is near Tux ---


def test_rules_of_supertux():
    assert intent_of("supertux") == "WAIT"
    assert intent_of("supertux", "KEY_ENTER") == "LOOT" and intent_of("supertux", "KEY_ENTER", "KEY_LEFT") == "RUN"
    assert intent_of("supertux", "KEY_RIGHT", "COIN") == "LOOT"
    assert intent_of("supertux", "KEY_RIGHT", "COIN", "ENEMY") == intent_of("supertux", "KEY_DOWN", "COIN") == "EVADE"
    assert intent_of("supertux", "ENEMY", "SQUISHED") == "ATTACK"
    assert intent_of("supertux", "SQUISHED", "KEY_UP") == "CLIMB"
    assert intent_of("supertux", "KEY_SPACE", "KEY_UP", "SQUISHED") == "LEAP"
    assert intent_of("supertux", "KEY_SPACE", "KEY_X") == "ATTACK"


@pytest.fixture
def sprites(tmp_path):
    """Made-up pictures of 32x32 for every sprite."""
    rng = np.random.default_rng(0)
    for path in surroundings.ALL:
        (tmp_path / "sprites" / path).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((32, 32), Image.BICUBIC)
        picture.putalpha(255)
        picture.save(tmp_path / "sprites" / path)
    return tmp_path / "sprites"


def screen(sprites, **centres) -> np.ndarray:
    """A grey picture of 240x480 with sprites: {file's stem: (y, x) of its centre}."""
    picture = np.full((240, 480, 3), 90, np.uint8) + np.arange(480, dtype=np.uint8)[:, None] % 7
    for stem, (y, x) in centres.items():
        (path,) = [path for path in surroundings.ALL if path.endswith(f"{stem.replace('_', '-')}.png")][:1]
        picture[y - 16 : y + 16, x - 16 : x + 16] = np.asarray(Image.open(sprites / path))[..., :3]
    return picture


def test_what_is_near_is_within_96_pixels_of_tux(sprites):
    eyes = surroundings.open_eyes(sprites, 1.0, 0.85)
    pictures = {
        frozenset({"ENEMY"}): screen(sprites, walk_2=(120, 200), snowball_3=(120, 290), coin_2=(30, 300)),
        frozenset({"COIN", "SQUISHED"}): screen(sprites, jump_0=(17, 17), coin_0=(30, 90), mrs_squished_left=(80, 20)),
        frozenset(): screen(sprites, stand_0=(220, 460), smartball_0=(220, 360)),  # 100 pixels
        frozenset({"no Tux"}): screen(sprites, smartball_0=(100, 100), coin_0=(100, 140)),
    }
    frames = torch.from_numpy(np.stack(list(pictures.values()))).permute(0, 3, 1, 2)  # (N, 3, H, W)
    found = surroundings.look_around(grey(frames), eyes)
    assert found == [set(signs - {"no Tux"}) for signs in pictures]


def test_intents_with_surroundings(sprites, tmp_path, capsys):
    """Tux runs; an enemy is near in the frames 20 to 29, looked at in every fifth."""
    alone, beside = (screen(sprites, walk_0=(120, 200), **more) for more in ({}, {"snowball_0": (120, 260)}))
    pictures = np.stack([beside if 20 <= i < 30 else alone for i in range(40)])
    keys = {"KEY_RIGHT": np.ones(40, bool)}
    folder = write_session(tmp_path / "data" / "run_0", 40, keys=keys, pictures=pictures)
    arguments = dict(data_dir=tmp_path / "data", sprites=sprites, detect_events=False, device="cpu", event_stride=5)
    arguments |= dict(labeler="supertux", intent_horizon_s=0.3)
    precompute_labels.main(precompute_labels.Args(**arguments))
    table = read_table(folder / "intent.parquet", INTENT)
    assert table["intent"].to_pylist() == ["RUN"] * 17 + ["EVADE"] * 13 + ["RUN"] * 10
    assert table.schema.metadata[b"event_stride"] == b"5" and table.schema.metadata[b"labeler"] == b"supertux"
    assert "run_0: intents EVADE 32%, RUN 68%" in capsys.readouterr().out

    (sprites / surroundings.TUX[0]).unlink()
    with pytest.raises(SystemExit, match="no sprites: .*small/stand-0.png do not exist. Install the game"):
        precompute_labels.main(precompute_labels.Args(**arguments))
