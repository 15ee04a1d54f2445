"""The simulated recordings: their format, what causes what in them, and the scores that bound a policy on them."""

import json

import numpy as np
import pytest

import controls_transformer
from benchmarks import make_control_sessions as simulator

SECONDS = 60


@pytest.fixture(scope="module")
def sessions() -> list[dict]:
    return [simulator.simulate(simulator.make_person(1, i), 1, i, SECONDS) for i in range(3)]


def rows_of(sessions: list[dict], key: str) -> np.ndarray:
    return np.concatenate([session[key] for session in sessions])


def onsets(column: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(np.r_[0, column]) > 0)


def test_format(sessions):
    N = SECONDS * 30
    for session in sessions:
        assert {key: (session[key].shape, session[key].dtype.name) for key in list(session)[:6]} == {
            "frames": ((N, 260), "float32"),
            "controls": ((N, 28), "float32"),
            "game_state": ((N, 46), "float32"),
            "timestamps": ((N,), "float64"),
            "fps": ((), "float32"),
            "version": ((), "int32"),
        }
        assert session["version"] == 2 and abs(session["fps"] - 30) < 0.1
        assert str(session["session_type"]) == "mixed" and str(session["person"]).startswith("person_")
        assert all(np.isfinite(array).all() for array in session.values() if array.dtype.kind == "f")
        assert (np.diff(session["timestamps"]) > 0).all()
        frames, state = session["frames"], session["game_state"]
        assert set(np.unique(frames[:, 225:227])) == {0, 1}
        assert frames[:, 227:].min() >= 0 and frames[:, 227:].max() <= 1
        assert np.abs(frames[:, :225]).max() < 2  # metres
        assert np.abs(frames[:, 69:75]).max() < 0.25  # the hips are near the middle
        assert (state[:, :7].sum(1) == 1).all() and (state[:, 7:11].sum(1) == 1).all()
        assert np.abs(state).max() <= 1


def test_controls_follow_the_rules_of_the_format(sessions):
    controls, state = rows_of(sessions, "controls"), rows_of(sessions, "game_state")
    screen = state[:, 38] > 0
    binary = [c for c in range(28) if c not in (9, 10, 23, 24)]
    assert set(np.unique(controls[:, binary])) == {0, 1}
    assert np.abs(controls[:, 9:11]).max() <= 1 and controls[:, 23:25].min() >= 0 and controls[:, 23:25].max() <= 1
    assert (controls[~screen, 23:] == 0).all()
    playing = [c for c in range(23) if c != 13]  # open_inventory also closes the screen
    assert (controls[screen][:, playing] == 0).all()
    assert controls[:, 14:23].sum(1).max() == 1
    assert not (controls[:, 0] * controls[:, 1]).any() and not (controls[:, 2] * controls[:, 3]).any()


def test_every_head_has_support(sessions):
    for session in sessions:
        controls, screen = session["controls"], session["game_state"][:, 38] > 0
        idle = ~screen & (controls[:, simulator.ACTIONS] == 0).all(1)
        assert 0.05 < screen.mean() < 0.4 and 0.2 < idle.mean() < 0.6
        assert (np.abs(controls[~screen, 9:11]) > 0.08).any(1).mean() > 0.15
        assert (controls[:, 25:28].sum(0) > 0).all()
    controls, screen = rows_of(sessions, "controls"), rows_of(sessions, "game_state")[:, 38] > 0
    assert all(len(onsets(controls[:, c] * ~screen)) >= 5 for c in simulator.ACTIONS)
    assert (controls[:, 14:23].sum(0) > 0).all()


def test_rows_repeat_as_the_game_is_slower_than_the_camera(sessions):
    for session in sessions:
        looks = session["controls"][:, 9:11]
        moving = (looks[1:] != 0).any(1)
        same = (looks[1:] == looks[:-1]).all(1)[moving].mean()
        assert 0.25 < same < 0.45  # 20 of 30


def test_everything_follows_from_the_seed(tmp_path):
    short = dict(sessions=2, minutes=0.25, persons=2)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        simulator.write_sessions(simulator.Args(output=tmp_path / name, seed=seed, **short))
    for file in ("session_001.npz", "session_002.npz"):
        one, same, other = ((tmp_path / name / file).read_bytes() for name in ("one", "same", "other"))
        assert one == same != other
    first, second = (np.load(tmp_path / "one" / f"session_00{i}.npz")["controls"] for i in (1, 2))
    assert (first != second).any()


def test_persons_differ_but_share_the_gestures(sessions):
    def directions(index: int) -> np.ndarray:
        return simulator.make_person(1, index).directions

    assert (directions(0) == directions(0)).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        one, other = directions(a), directions(b)
        cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        assert (cosine > 0.6).all() and (cosine < 0.9999).any()
        assert abs(np.linalg.norm(one) / np.linalg.norm(other) - 1) > 0.005
    delays = [simulator.make_person(1, i).delay for i in range(10)]
    assert len(set(delays)) == 10 and min(delays) > 0
    sessions = [simulator.simulate(simulator.make_person(1, 0), 1, i, 15) for i in (0, 1)]  # one person, two sessions
    assert (sessions[0]["person"] == sessions[1]["person"]).all()
    assert (sessions[0]["controls"] != sessions[1]["controls"]).any()
    other_seed = simulator.simulate(simulator.make_person(1, 0), 2, 0, 15)
    assert (sessions[0]["controls"] != other_seed["controls"]).any()


def test_gestures_tell_controls_apart():
    person = simulator.make_person(1, 0)
    added = np.zeros((len(simulator.GESTURES), 225))
    for row, gesture in enumerate(simulator.GESTURES.values()):
        for freedom, amount in gesture.items():
            added[row] += amount * person.directions[simulator.D[freedom]]
    added /= np.linalg.norm(added, axis=1, keepdims=True)
    likeness = added @ added.T - np.eye(len(added))
    assert likeness.max() < 0.995  # neighbouring slots differ by one finger


def test_the_body_follows_the_intention(sessions):
    for session in sessions:
        lean = session["intent_freedoms"][:, simulator.D["lean_front"]]
        intended = session["intent_controls"][:, 0]
        begins = [
            i for i in onsets(intended) if i > 15 and not intended[i - 15 : i].any() and intended[i : i + 15].all()
        ]
        before = np.array([lean[i - 3 : i].mean() for i in begins])
        after = np.array([lean[i + 6 : i + 15].mean() for i in begins])
        assert len(begins) and np.median(after - before) > 0.6
        at_once = np.array([lean[i] for i in begins])
        assert np.median(at_once - before) < 0.4
        labels = onsets(session["controls"][:, 0] * (session["game_state"][:, 38] == 0))
        lateness = [min(abs(labels - i)) for i in begins]  # the game's tick, and the camera's frame
        assert max(lateness) <= 2


def test_the_state_does_not_answer_for_the_policy(sessions):
    for session in sessions:
        controls, slot = session["controls"], np.round(8 * session["game_state"][:, 44]).astype(int)
        rows, slots = np.nonzero(controls[:, 14:23])
        inside = rows < len(slot) - 4
        assert (slot[rows] != slots).all()
        assert (slot[rows[inside] + 3] == slots[inside]).mean() > 0.9  # but for changes that follow at once
        assert all(len(np.unique(session["game_state"][:, c])) == 1 for c in (14, 20, 21, 24, 25, 26, 27))


def test_lost_hands_are_held_and_then_absent(sessions):
    losses = 0
    for session in sessions:
        frames = session["frames"]
        for flag, columns in ((225, slice(99, 162)), (226, slice(162, 225))):
            absent = frames[:, flag] == 0
            assert (frames[absent, columns] == 0).all()
            frozen = np.r_[False, (frames[1:, columns] == frames[:-1, columns]).all(1)] & ~absent
            for i in onsets(absent):
                losses += 1
                assert frozen[i - simulator.HELD : i].all() and not frozen[i - simulator.HELD - 1]
    assert losses >= 3


def test_the_scores_leave_room(sessions):
    outputs = [simulator.best_reachable(session) for session in sessions]
    together = {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
    reachable = simulator.tuned_metrics(together, sessions)
    nothing = simulator.tuned_metrics(simulator.do_nothing(len(together["probs"])), sessions)
    assert 0.85 <= reachable["score"] < 1 and nothing["score"] <= 0.55
    assert reachable["idle_accuracy"] > 0.95
    for worse in ("look_mse", "cursor_mse"):
        assert reachable[worse] < 0.6 * nothing[worse]
    for better in ("avg_action_f1", "hotbar_accuracy", "avg_inv_f1"):
        assert reachable[better] > 0.8 > nothing[better]
    assert reachable["avg_action_f1"] < 0.99  # onsets are not all certain


def test_the_filter_sees_no_future(sessions):
    session, cut = sessions[0], 900
    changed = session | {"frames": session["frames"].copy()}
    changed["frames"][cut:, :225] = np.random.default_rng(0).normal(0, 0.3, changed["frames"][cut:, :225].shape)
    one, other = simulator.best_reachable(session), simulator.best_reachable(changed)
    for key in ("probs", "inv", "hotbar"):
        assert np.allclose(one[key][:cut], other[key][:cut])
    assert not np.allclose(one["probs"], other["probs"])


def test_the_filter_without_frames_knows_nothing(sessions):
    session = sessions[0]
    blind = session | {"frames": np.random.default_rng(0).permutation(session["frames"])}
    metrics = simulator.tuned_metrics(simulator.best_reachable(blind), [blind])
    assert metrics["avg_action_f1"] < 0.4


def test_scripts_commands(tmp_path, capsys):
    folder = tmp_path / "recordings"
    settings = dict(sessions=3, minutes=0.5, persons=2)
    simulator.main(simulator.Args(output=folder, **settings))
    assert [path.name for path in sorted(folder.iterdir())] == [f"session_00{i}.npz" for i in (1, 2, 3)]
    loaded = [controls_transformer.load_session(path) for path in controls_transformer.find_sessions(folder)]
    assert [session["person"] for session in loaded] == ["person_01", "person_02", "person_01"]
    assert all(session["frames"].shape == (900, 260) for session in loaded)
    with pytest.raises(FileExistsError, match="session_001.npz.*--overwrite"):
        simulator.main(simulator.Args(output=folder, **settings))
    simulator.main(simulator.Args(output=folder, overwrite=True, sessions=2, minutes=0.5))
    assert len(list(folder.iterdir())) == 2

    scores = simulator.main(simulator.Args(score=folder, heldout=("session_002",), results=tmp_path / "scores.json"))
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert scores == simulator.score_sessions(folder, ("session_002.npz",))
    assert "best reachable" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="session_009.npz is missing"):
        simulator.main(simulator.Args(score=folder, heldout=("session_009",)))
    with pytest.raises(FileNotFoundError, match="make_control_sessions.py"):
        simulator.main(simulator.Args(score=tmp_path / "empty"))
    np.savez(tmp_path / "session_001.npz", controls=np.zeros((9, 28)))
    with pytest.raises(ValueError, match="session_001.npz has no intent_directions"):
        simulator.main(simulator.Args(score=tmp_path))
    with pytest.raises(ValueError, match="--minutes 0.1"):
        simulator.main(simulator.Args(output=tmp_path / "short", minutes=0.1))
