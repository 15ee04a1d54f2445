"""The live loop without a desktop: which keys go out when, whose a key is, and what the latency report says."""

import enum
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import iql_reflex
import play_reflex as p
from common.desktop import Ledger, Listener, PynputKeyboard, Sender, UinputKeyboard
from common.sessions import FRAMES, INPUTS, KEY_CODES, load_session, read_table, write_table
from tests.synthetic import write_session
from tests.unit.test_play_reflex import KEYS, write_goal_model, write_model

H, W = 48, 64


class FakeKeyboard(Sender):
    def _send(self, name, down):
        pass


class FakeScreen:
    """Grey pictures of the levels given, then none at all."""

    def __init__(self, levels):
        self.levels, self.region, self.failure = list(levels), (0, 0, W, H), "it is gone"

    def grab(self, out):
        level = self.levels.pop(0) if self.levels else None
        if level is None:
            return None, p.time.monotonic_ns()
        out[:] = level
        return out, p.time.monotonic_ns()


class FakeListener(Listener):
    def __init__(self):
        super().__init__()
        self.thread = types.SimpleNamespace(is_alive=lambda: True)

    def hear(self, name, pressed, now_ns=None):
        self.heard.put((now_ns or p.time.monotonic_ns(), name, pressed))

    def close(self):
        pass


class Rows(list):
    """Stands in for the recorder."""

    def key(self, now_ns, name, state, source):
        self.append((name, state, source))


def make_runner(screen, keyboard, probabilities=None, **options) -> p.LiveRunner:
    """All three keys are wanted where a picture is brighter than 60, or as `probabilities` say."""
    rows = iter(probabilities) if probabilities is not None else None

    def policy(picture):
        return (next(rows) if rows else np.full(3, float(picture[0, 0, 0] > 60))), 0.5

    rule = p.DecisionRule(np.full(3, 0.5), debounce=1)
    options = {"allowed": np.ones(3, bool), "fps": 1000.0} | options
    return p.LiveRunner(policy, rule, KEYS, screen=screen, keyboard=keyboard, **options)


def steps(runner, n) -> list[p.Decision]:
    picture, decisions = np.empty((H, W, 3), np.uint8), []
    for _ in range(n):
        while runner.until_due() > 0:
            pass
        decisions.append(runner.step(picture))
    return decisions


# what goes out --------------------------------------------------------------------------------------------------------
def test_keys_follow_the_rule_and_a_dry_run_sends_none():
    levels, keyboard = [10, 90, 90, 10, 90], FakeKeyboard()
    decisions = steps(make_runner(FakeScreen(levels), keyboard), 5)
    assert [bool(d.held) for d in decisions] == [False, True, True, False, True]
    assert [d.still for d in decisions] == [False, False, True, False, False]
    assert [name for _, name, _ in keyboard.sent] == sorted(KEYS) * 3
    dry = steps(make_runner(FakeScreen(levels), None), 5)
    assert [d.active.all() for d in dry] == [bool(d.held) for d in decisions]
    assert not any(d.held for d in dry)
    for decision in decisions:
        times = decision[:7]
        assert list(times) == sorted(times)


def test_keys_outside_the_allow_list_never_go_out():
    keyboard = FakeKeyboard()
    steps(make_runner(FakeScreen([90] * 4), keyboard, allowed=np.array([True, False, True])), 4)
    assert {name for _, name, _ in keyboard.sent} == {KEYS[0], KEYS[2]}


def test_an_intent_named_often_enough_becomes_the_goal(tmp_path):
    model, keyboard = write_goal_model(tmp_path), FakeKeyboard()
    policy = p.Policy(model)
    policy.follow_goal(p.Live(model=model, auto_intent=True, intent_stability=2))
    rule, screen = p.DecisionRule(np.full(3, 0.5), debounce=1), FakeScreen([120, 120, 120, 20, 20, 20])
    decisions = steps(p.LiveRunner(policy, rule, KEYS, np.ones(3, bool), screen, keyboard, fps=1000.0), 6)
    expected = [set(), set(), {"KEY_X"}, {"KEY_X"}, {"KEY_X"}, {"KEY_RIGHT"}]
    assert [set(decision.held) for decision in decisions] == expected


def test_a_key_held_too_long_goes_up_for_one_decision():
    keyboard = FakeKeyboard()
    decisions = steps(make_runner(FakeScreen([90] * 12), keyboard, fps=10.0, max_hold_s=0.35), 12)
    held = "".join("x" if d.held else "." for d in decisions)
    assert held == "xxxx.xxxx.xx"
    assert all(d.active.all() for d in decisions)  # the rule knows nothing of it


def test_without_leave_everything_is_released_and_the_rule_goes_on():
    keyboard, leave = FakeKeyboard(), iter([True, False, False, True])
    decisions = steps(make_runner(FakeScreen([90] * 4), keyboard, may_send=lambda: next(leave)), 4)
    assert [bool(d.held) for d in decisions] == [True, False, False, True]
    assert all(d.active.all() for d in decisions)


def test_no_picture_repeats_the_last_one_and_late_ticks_are_left_out():
    runner = make_runner(FakeScreen([90, None, 10]), None, fps=50.0)
    decisions = steps(runner, 2)
    p.time.sleep(0.07)  # three ticks pass
    decisions += steps(runner, 1)
    assert [d.grabbed for d in decisions] == [True, False, True]
    assert [d.active.all() for d in decisions] == [True, True, False]
    assert [round((d.due - decisions[0].due) / 2e7) for d in decisions] == [0, 1, 2]
    assert runner.dropped == runner.tick - 3 >= 1


def test_live_and_eval_decide_alike(tmp_path):
    """The pictures of a session, one by one through the live loop: the keys that `eval` writes down."""
    levels = np.random.default_rng(3).choice([40, 57, 63, 80], 60)
    pictures = np.broadcast_to(levels[:, None, None, None], (60, H, W, 3)).astype(np.uint8)
    keys = {"KEY_RIGHT": levels > 60}
    model, session = write_model(tmp_path), write_session(tmp_path / "plain", 60, keys=keys, pictures=pictures)
    args = p.Args(model=model, debounce=2, max_keys=2)
    result = p.main(p.Eval(model=model, session=session, debounce=2, max_keys=2, video=False))
    written = pq.read_table(tmp_path / "means_eval_plain/preds.parquet")
    policy, frames = p.Policy(model), np.arange(load_session(session).n_frames)
    pictures = [picture.copy() for picture in p.read_pictures(p.VideoReader(session / "recording.mp4"), frames)]

    class Screen:
        def grab(self, out):
            out[:] = pictures.pop(0)
            return out, p.time.monotonic_ns()

    keyboard = FakeKeyboard()
    rule = policy.decision_rule(args)
    decisions = steps(p.LiveRunner(policy, rule, KEYS, policy.allowed, Screen(), keyboard, 1000.0), len(frames))
    names = np.array(KEYS)
    assert [names[d.active].tolist() for d in decisions] == written["active"].to_pylist()
    assert [sorted(d.held) for d in decisions] == [sorted(row) for row in written["active"].to_pylist()]
    assert [names[d.pressed].tolist() for d in decisions] == written["pressed"].to_pylist()
    assert np.allclose([d.probability[0] for d in decisions], written["probability_KEY_RIGHT"].to_numpy())
    assert 0.05 < result["per_key"]["KEY_RIGHT"]["rate_policy"] < 0.95


# whose key it is ------------------------------------------------------------------------------------------------------
def test_ledger_takes_each_entry_once_within_50_ms():
    keyboard = FakeKeyboard()
    ledger = Ledger(keyboard)
    keyboard.hold({"KEY_A"})
    ledger.note()
    sent = keyboard.sent[0][0]
    assert not ledger.is_ours(sent + 200_000_000, "KEY_A", "down")  # too late
    assert not ledger.is_ours(sent, "KEY_A", "up") and not ledger.is_ours(sent, "KEY_B", "down")
    assert ledger.is_ours(sent + 40_000_000, "KEY_A", "down")
    assert ledger.is_ours(sent + 10**9, "KEY_A", "repeat")  # the server repeats what we hold
    assert not ledger.is_ours(sent, "KEY_A", "down")  # a second one is a person's
    assert not ledger.is_ours(sent + 10**9, "KEY_A", "repeat")
    assert not Ledger(None).is_ours(sent, "KEY_A", "down")


@pytest.fixture
def guard():
    args = p.Live(model=None, resume_after=0.1, max_stale=0.05, max_still=0.05)
    keyboard, screen = FakeKeyboard(), FakeScreen([])
    return p.Guard(args, None, screen, FakeListener(), keyboard, Rows())


def test_a_persons_key_pauses_until_some_time_after_its_release(guard):
    assert guard.may_send()
    guard.keyboard.hold({"KEY_RIGHT"})
    guard.note()
    guard.listener.hear("KEY_RIGHT", True)
    assert guard.may_send()  # it was ours
    guard.listener.hear("KEY_UP", True)
    assert not guard.may_send()
    p.time.sleep(0.15)
    assert not guard.may_send()  # still held
    guard.listener.hear("KEY_UP", False)
    assert not guard.may_send()
    p.time.sleep(0.12)
    assert guard.may_send()
    guard.keyboard.hold(set())
    guard.close()
    expected = [("KEY_RIGHT", "down", "policy"), ("KEY_UP", "down", "human"), ("KEY_UP", "up", "human")]
    assert guard.recorder == [*expected, ("KEY_RIGHT", "up", "policy")]
    assert guard.presses == 1 and guard.names == {"KEY_RIGHT", "KEY_UP"}


def test_a_persons_key_releases_ours_before_the_next_decision(guard):
    runner = make_runner(FakeScreen([90] * 3), guard.keyboard, fps=2.0, may_send=guard.may_send)
    steps(runner, 1)
    guard.note()
    guard.listener.hear("KEY_UP", True)
    start = p.time.monotonic()
    guard.keyboard.hold = lambda names, hold=guard.keyboard.hold: (hold(names), released.append(p.time.monotonic()))
    released = []
    guard.wait(runner)
    assert released and released[0] - start < 0.1 < p.time.monotonic() - start
    assert guard.keyboard.held == set()
    guard.close()


def test_the_panic_key_ends_the_play_and_is_not_recorded(guard):
    runner = make_runner(FakeScreen([90]), guard.keyboard, fps=2.0, may_send=guard.may_send)
    steps(runner, 1)
    guard.note()
    guard.listener.hear("KEY_F12", True)
    guard.wait(runner)
    assert guard.keyboard.held == set()
    assert guard.why == "the panic key" and not guard.may_send()
    guard.close()
    assert all(name != "KEY_F12" for name, _, _ in guard.recorder)


def test_keys_that_a_person_holds_at_the_start_are_written_at_both_ends(guard):
    guard.persons.add("KEY_LEFT")
    guard.listener.held.add("KEY_LEFT")
    guard.begin_rows(5)
    assert not guard.may_send()
    guard.close()
    assert guard.recorder == [("KEY_LEFT", "down", "human"), ("KEY_LEFT", "up", "human")]


@pytest.mark.parametrize(
    "levels, why",
    [
        ([90], "no picture could be taken for 0.05 s: it is gone"),
        ([90] * 99, "the picture did not change for 0.05 s"),
    ],
)
def test_pictures_that_do_not_come_or_change_end_the_play(guard, levels, why):
    runner = make_runner(FakeScreen(levels), None, fps=50.0)
    n = 0
    while not guard.why and n < 20:
        guard.judge(steps(runner, 1)[0])
        n += 1
    assert guard.why == why and 2 <= n <= 6
    guard.close()


def test_the_end_of_the_listener_ends_the_play(guard):
    guard.listener.thread.is_alive = lambda: False
    assert not guard.may_send() and guard.why == "the X server ended"
    guard.close()


# corrections ----------------------------------------------------------------------------------------------------------
def play_with_corrections(folder: Path, dry_run: str = "false") -> Path:
    """RIGHT by the policy, from frame 20 on LEFT by a person until frame 30, at frame 32 once more; the policy goes on
    a second later."""
    write_session(folder, 80, keys={"KEY_RIGHT": np.arange(80) % 80 < 20})
    session = load_session(folder)
    ms = session.timestamps
    rows = [(0, "KEY_RIGHT", "down", "policy"), (20, "KEY_RIGHT", "up", "policy"), (20, "KEY_LEFT", "down", "human")]
    rows += [(22, "KEY_SPACE", "down", "human"), (24, "KEY_SPACE", "up", "human"), (30, "KEY_LEFT", "up", "human")]
    rows += [(32, "KEY_LEFT", "down", "human"), (33, "KEY_LEFT", "up", "human"), (50, "KEY_RIGHT", "down", "policy")]
    table = [
        dict(timestamp=ms[i] - 5, event_type="key", key_code=1, key_name=name, state=state, source=source)
        for i, name, state, source in rows
    ]
    metadata = session.metadata | {"dry_run": dry_run, "resume_after": "1"}
    write_table(folder / "inputs.parquet", pa.Table.from_pylist(table, INPUTS), INPUTS, metadata)
    write_table(folder / "frames.parquet", read_table(folder / "frames.parquet", FRAMES), FRAMES, metadata)
    return folder


def test_a_persons_part_of_a_play_is_what_training_uses(tmp_path):
    folder = play_with_corrections(tmp_path / "play")
    theirs = np.flatnonzero(iql_reflex.person_plays(load_session(folder)))
    assert theirs.tolist() == list(range(20, 43))  # the release before frame 33, and a second
    recording = iql_reflex.load_recording(folder, ["KEY_LEFT", "KEY_RIGHT"], 2)
    assert np.flatnonzero(recording.usable).tolist() == list(range(18, 41))  # decisions whose label is the person's
    assert not recording.keys[recording.usable][:, 1].any() and recording.keys[recording.usable][:, 0].any()
    dry = play_with_corrections(tmp_path / "dry", "true")  # there a person plays all the time
    assert iql_reflex.person_plays(load_session(dry)).all()
    assert iql_reflex.person_plays(load_session(write_session(tmp_path / "plain", 20))).all()


def test_a_policys_play_is_left_out_unless_asked_for(tmp_path, capsys):
    for name in ("run_1", "heldout_1"):
        write_session(tmp_path / name, 60)
    play_with_corrections(tmp_path / "run_play")
    settings = dict(
        data_dir=str(tmp_path), run_root=str(tmp_path / "runs"), max_updates=1, backbone="cnn", image_size=32,
        batch_size=8, bootstrap=1, video_seconds=0.0, workers=0, val_fraction=0.0, keys=("KEY_RIGHT",), device="cpu",
    )  # fmt: skip
    train = {}
    for mix in (False, True):
        result = iql_reflex.main(iql_reflex.Args(mix_corrections=mix, **settings))
        train[mix] = json.loads((Path(result["run_dir"]) / "split.json").read_text())["train"]
    assert train == {False: ["run_1"], True: ["run_1", "run_play"]}
    assert capsys.readouterr().out.count("left out what a policy played: run_play") == 1
    for name in ("run_1", "heldout_1"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(SystemExit, match="holds only sessions that a policy played. Train with --mix-corrections"):
        iql_reflex.main(iql_reflex.Args(**settings))


# keyboards of other systems: modules of their shape stand in ----------------------------------------------------------
def test_pynput_gets_its_own_names(monkeypatch):
    class Controller(list):
        def press(self, key):
            self.append(("press", key))

        def release(self, key):
            self.append(("release", key))

    keyboard = types.ModuleType("pynput.keyboard")
    keyboard.Controller, keyboard.Key = Controller, enum.Enum("Key", "space right ctrl_l ctrl alt f9 caps_lock")
    monkeypatch.setitem(sys.modules, "pynput", types.ModuleType("pynput"))
    monkeypatch.setitem(sys.modules, "pynput.keyboard", keyboard)
    sender = PynputKeyboard()
    sender.hold({"KEY_RIGHT", "KEY_SPACE", "KEY_A", "KEY_LEFTCTRL"})
    sender.hold({"KEY_7"})
    sender.close()
    down = ["a", keyboard.Key.ctrl, keyboard.Key.right, keyboard.Key.space]
    expected = [*(("press", key) for key in down), *(("release", key) for key in down)]
    assert sender.controller == [*expected, ("press", "7"), ("release", "7")]
    assert sender.held == set() and [state for _, _, state in sender.sent].count("down") == 5


def test_uinput_gets_the_kernels_codes(monkeypatch):
    class Device(list):
        def __init__(self, keys, name):
            assert set(KEY_CODES.values()) == set(keys[1])

        def write(self, *event):
            self.append(event)

        def syn(self):
            self.append("syn")

        def close(self):
            self.append("closed")

    evdev = types.ModuleType("evdev")
    evdev.ecodes, evdev.UInput, evdev.UInputError = types.SimpleNamespace(EV_KEY=1), Device, type("E", (Exception,), {})
    monkeypatch.setitem(sys.modules, "evdev", evdev)
    sender = UinputKeyboard()
    sender.hold({"KEY_RIGHT", "KEY_SPACE"})
    sender.hold({"KEY_RIGHT", "KEY_SPACE"})
    sender.close()
    right, space = KEY_CODES["KEY_RIGHT"], KEY_CODES["KEY_SPACE"]
    assert sender.device == [(1, right, 1), (1, space, 1), "syn", (1, right, 0), (1, space, 0), "syn", "closed"]
    evdev.UInput = lambda *_, **__: (_ for _ in ()).throw(OSError("no access"))
    with pytest.raises(PermissionError, match="/dev/uinput cannot be used"):
        UinputKeyboard()


# the report -----------------------------------------------------------------------------------------------------------
def test_latency_by_hand():
    ms = 1_000_000
    rows = []
    for n, (inference, held) in enumerate(zip([4, 4, 4, 95, 4], ["", "AB", "AB", "AB", "A"], strict=True)):
        due = 1000 * ms + 100 * n * ms
        started = due + ms
        send = 5 if n == 4 else 3
        stages = np.cumsum([started, 0, 2 * ms, inference * ms, ms, send * ms]).tolist()
        flags = (n != 1, n == 2)
        rows.append(p.Decision(due, *stages, *flags, np.zeros(1), 0.0, *[np.zeros(1, bool)] * 3, frozenset(held)))
    columns = p.Decision(*map(np.array, zip(*rows, strict=True)))
    result = p.latency(columns, [5.0, 4.0, 6.0], 10.0, dropped=3)
    assert result["ms"]["capture"] == {"p50": 2, "p90": 2, "p99": 2, "max": 2}
    assert result["ms"]["inference"]["p50"] == 4 and result["ms"]["inference"]["max"] == 95
    assert result["ms"]["send"]["p50"] == 4 and result["ms"]["send"]["max"] == 5  # keys changed twice
    assert result["ms"]["end to end"]["p50"] == 10 and result["ms"]["tick to sent"]["max"] == 102
    assert result["within_frame"] == pytest.approx(0.8) and result["late"] == 1
    assert (result["stale"], result["still"], result["left_out"]) == (1, 1, 3)
    assert result["end_to_end_over_bare"] == pytest.approx(2.0)
    assert p.latency(columns, [], 10.0, 0)["end_to_end_over_bare"] is None


# flags ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields, words",
    [
        ({"debounce": 0}, "--debounce 0 .* expected at least 1"),
        ({"resume_after": -1.0}, "--resume-after -1 .* expected 0 or more"),
        ({"max_stale": 0.0}, "--max-stale above 0"),
        ({"panic_key": "KEY_SPACE"}, "--panic-key KEY_SPACE: expected a key that no game plays with"),
        ({"fps": 30.0}, "--fps 30: the model was trained at 10 frames a second"),
        ({"fps": 5.0}, "--fps 5: the model was trained at 10"),
        ({"auto_intent": True}, "means.onnx takes no goal, which --goal-intent and --auto-intent give it"),
        ({"auto_intent": True, "goal_intent": "LEAP"}, "expected a fixed goal or --auto-intent"),
    ],
)
def test_flags_that_cannot_be_met_are_named(tmp_path, fields, words):
    model = write_model(tmp_path)
    with pytest.raises(SystemExit, match=words):
        p.main(p.Live(model=model, output=tmp_path / "plays", **fields))
    assert not (tmp_path / "plays").exists()


def test_keys_are_sent_to_a_named_window_only(tmp_path, monkeypatch):
    monkeypatch.setattr(p.sys, "platform", "linux")
    with pytest.raises(SystemExit, match="--send-keys needs --window"):
        p.main(p.Live(model=write_model(tmp_path), send_keys=True, output=tmp_path / "plays"))
    monkeypatch.setattr(p.sys, "platform", "darwin")
    with pytest.raises(SystemExit, match="windows are found on X11 only"):
        p.main(p.Live(model=tmp_path / "means.onnx", window="game", output=tmp_path / "plays"))


def test_a_play_is_never_overwritten(tmp_path):
    (tmp_path / "plays/one").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is there already and is never overwritten"):
        p.main(p.Live(model=write_model(tmp_path), output=tmp_path / "plays", name="one"))
    assert (tmp_path / "plays/one").exists()
