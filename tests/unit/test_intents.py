"""What the player is about to do: the rules by hand, the look ahead against plain loops, and intent.parquet."""

import numpy as np
import pyarrow.parquet as pq
import pytest

import precompute_labels
from common.sessions import EPISODES, INTENT, INTENT_NAMES, load_session, read_table, write_table
from session_labels.intents import RULES, choose_intents, label_intents, look_ahead, signs_of
from tests.reference import naive_intents, naive_key_table
from tests.synthetic import write_session


def intent_of(labeler, *signs):
    shown = np.array([[sign in signs for sign in signs_of(labeler)]])
    return INTENT_NAMES[choose_intents(shown, labeler)[0]]


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
    shown = rng.random((200, len(signs_of(labeler)))) < 0.01
    cuts = [0, 31, 60, 61, 150, 200]
    found = choose_intents(look_ahead(shown, horizon, cuts), labeler)
    assert [INTENT_NAMES[i] for i in found] == naive_intents(shown, signs_of(labeler), RULES[labeler], horizon, cuts)
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
    shown = naive_key_table(session, signs_of("keys"))[1]
    intents = table["intent"].to_pylist()
    assert intents == naive_intents(shown, signs_of("keys"), RULES["keys"], 6, [0, 79, 110, 120])
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
    assert not list(dataset.glob("run_0/.*"))


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
