"""How well a policy's controls match those of a recording: every metric of docs/controls_transformer.md."""

import numpy as np

from motion_controls.sessions import (
    ACTION_COLUMNS,
    CONTROLS,
    CURRENT_SLOT,
    CURSOR_COLUMNS,
    HEAD_COLUMNS,
    HOTBAR_COLUMNS,
    INV_COLUMNS,
    LOOK_COLUMNS,
    LOOK_DEADZONE,
    PULSES,
    SCREEN_OPEN,
)

SCORE_WEIGHTS = {"action": 0.4, "look": 0.2, "hotbar": 0.1, "cursor": 0.1, "inv": 0.1, "idle": 0.1}
SCREEN_PIXELS = (1920, 1080)
NEAR = 3  # frames an event may be off


def combined_score(metrics: dict) -> float:
    """The specified score, 0..1, of avg_action_f1, look_mse, hotbar_accuracy, cursor_mse, avg_inv_f1, idle_accuracy."""
    return float(sum(SCORE_WEIGHTS[head] * part for head, part in _score_parts(metrics).items()))


def _score_parts(metrics: dict) -> dict:
    return {
        "action": metrics["avg_action_f1"],
        "look": max(0.0, 1 - metrics["look_mse"]),
        "hotbar": metrics["hotbar_accuracy"],
        "cursor": max(0.0, 1 - metrics["cursor_mse"]),
        "inv": metrics["avg_inv_f1"],
        "idle": metrics["idle_accuracy"],
    }


def f1_scores(predicted, true) -> np.ndarray:
    """F1 of each column, 0 where nothing is predicted and nothing true. (N, C) bool twice -> (C,)"""
    hits, wrong = (predicted & true).sum(0), (predicted != true).sum(0)
    return 2 * hits / np.maximum(2 * hits + wrong, 1)


def optimize_thresholds(probs, targets, idle_mask) -> np.ndarray:
    """Per control the threshold of 0.10, 0.15, ... 0.85 with the highest F1 - 0.5 * false positives per idle frame,
    the lowest of equals; 0.5 where none is above 0, as without positives. (N, C) twice, (N,) bool -> (C,)"""
    targets, idle = np.asarray(targets) > 0.5, np.asarray(idle_mask, bool)
    best, thresholds = np.zeros(targets.shape[1]), np.full(targets.shape[1], 0.5)
    for threshold in np.round(np.arange(0.1, 0.9, 0.05), 2):
        predicted = np.asarray(probs) > threshold
        score = f1_scores(predicted, targets) - 0.5 * (predicted[idle].mean(0) if idle.any() else 0)
        better = score > best
        best[better], thresholds[better] = score[better], threshold
    return thresholds


def outputs_of(controls) -> dict:
    """Controls (N, 28) in the form of the network's outputs, to score them as such."""
    names = {"action": "probs"}
    return {names.get(head, head): np.asarray(controls)[:, list(columns)] for head, columns in HEAD_COLUMNS.items()}


def baseline_outputs(controls, before) -> dict[str, dict]:
    """What players put out who do nothing (which is also the majority's choice), do everything at once, repeat the
    recording's last row, and do what the player does at another time, so as often and in the same rhythm. (N, 28) and
    the rows before them (N, 28), zeros where a session begins."""
    nothing = np.zeros_like(controls)
    nothing[:, list(CURSOR_COLUMNS)] = 0.5
    everything = np.ones_like(controls) - nothing
    everything[:, list(LOOK_COLUMNS)] = 0
    players = {"do_nothing": nothing, "always_on": everything, "repeat_last": before}
    players["random"] = np.roll(controls, len(controls) // 2, axis=0)
    return {name: outputs_of(controls) for name, controls in players.items()}


def onsets(down, begins) -> np.ndarray:
    """Frames on which a control goes down. (N, C) bool, (N,) bool: rows that begin a session -> (N, C) bool"""
    before = np.roll(down, 1, axis=0) & ~begins[:, None]
    return down & ~before


def event_f1(predicted, true, session, early: int = NEAR, late: int = NEAR) -> float:
    """F1 of events, each matched with at most one of the other side, in the same session, up to `early` frames before
    and `late` after it. (N,) bool twice, (N,) number of a row's session, which rises"""
    apart = np.arange(len(true)) + session * (early + late + 1)  # frames, with room between two sessions
    mine, theirs = apart[predicted], apart[true]
    hits = nxt = 0
    for t in theirs:
        while nxt < len(mine) and mine[nxt] < t - early:
            nxt += 1
        if nxt < len(mine) and mine[nxt] <= t + late:
            hits, nxt = hits + 1, nxt + 1
    return 2 * hits / max(1, len(mine) + len(theirs))


def control_metrics(
    outputs: dict, controls, game_state, thresholds=None, inv_thresholds=None, begins=None, fps: float = 30.0
) -> dict:
    """Every metric, as floats. `outputs`: probs (N, 12), look (N, 2), hotbar (N, 9) probabilities (a row of zeros names
    no slot), cursor (N, 2), inv (N, 3) probabilities. `begins` (N,) bool: rows before which time is interrupted; None
    is row 0 alone, and where all are, there are no events. Empty cases: F1, pixel error, drift 0; look and cursor MSE
    0; direction, hotbar and idle accuracy 1. Outputs that are not finite have no score, NaN."""
    controls, state = np.asarray(controls), np.asarray(game_state)
    begins = np.arange(len(controls)) == 0 if begins is None else np.asarray(begins)
    screen = state[:, SCREEN_OPEN] > 0
    gameplay, true = ~screen, outputs_of(controls)
    action, action_true = outputs["probs"] > (0.5 if thresholds is None else thresholds), true["probs"] > 0.5
    inv, inv_true = outputs["inv"] > (0.5 if inv_thresholds is None else inv_thresholds), true["inv"] > 0.5
    looks = (np.abs(true["look"]) > LOOK_DEADZONE).any(1)
    active, still = gameplay & looks, gameplay & ~looks
    changed = (true["hotbar"] > 0.5).any(1)
    idle = gameplay & ~action_true.any(1)
    slot, slot_true = outputs["hotbar"].argmax(1), true["hotbar"].argmax(1)

    action_f1 = f1_scores(action[gameplay], action_true[gameplay])
    inv_f1 = f1_scores(inv[screen], inv_true[screen])
    look_error = (outputs["look"] - true["look"])[active]
    sign_known = true["look"][active] != 0  # the other axis may rest
    cursor_error = (outputs["cursor"] - true["cursor"])[screen]
    metrics = {
        "avg_action_f1": action_f1.mean(),
        "look_mse": np.square(look_error).mean() if active.any() else 0.0,
        "look_direction_accuracy": (np.sign(outputs["look"]) == np.sign(true["look"]))[active][sign_known].mean()
        if active.any()
        else 1.0,
        "hotbar_accuracy": ((slot == slot_true) & (outputs["hotbar"].max(1) > 0))[changed].mean()
        if changed.any()
        else 1.0,
        "cursor_mse": np.square(cursor_error).mean() if screen.any() else 0.0,
        "cursor_pixel_error": np.linalg.norm(cursor_error * SCREEN_PIXELS, axis=1).mean() if screen.any() else 0.0,
        "avg_inv_f1": inv_f1.mean(),
        "idle_accuracy": (~action[idle].any(1)).mean() if idle.any() else 1.0,
        "look_drift": np.abs(outputs["look"][still]).mean() if still.any() else 0.0,
    }
    names = [CONTROLS[c] for c in ACTION_COLUMNS + INV_COLUMNS]
    metrics |= {f"f1_{name}": f1 for name, f1 in zip(names, [*action_f1, *inv_f1], strict=True)}

    # over the heads and controls that the data show
    shown, inv_shown = action_true[gameplay].any(0), inv_true[screen].any(0)
    support = {"action": shown.any(), "look": active.any(), "hotbar": changed.any()}
    support |= {"cursor": screen.any(), "inv": inv_shown.any(), "idle": idle.any()}
    parts = _score_parts(metrics) | {"action": action_f1[shown].sum() / max(1, shown.sum())}
    parts["inv"] = inv_f1[inv_shown].sum() / max(1, inv_shown.sum())
    weight = sum(SCORE_WEIGHTS[head] for head in SCORE_WEIGHTS if support[head])
    present = sum(SCORE_WEIGHTS[head] * part for head, part in parts.items() if support[head])
    metrics |= {"score": combined_score(metrics), "score_present": present / max(weight, 1e-9)}
    if not all(np.isfinite(output).all() for output in outputs.values()):
        metrics |= {"score": np.nan, "score_present": np.nan}
    if not begins.all():
        predicted = {"action": action, "inv": inv, "slot": slot, "sure": outputs["hotbar"].max(1) > 0.5}
        metrics |= _event_metrics(predicted, controls, state, begins, fps)
    return {name: float(metric) for name, metric in metrics.items()}


def _event_metrics(predicted: dict, controls, state, begins, fps: float) -> dict:
    """What only consecutive rows can tell: pulses as events, and the frames on which an action changes."""
    session, gameplay = np.cumsum(begins), state[:, SCREEN_OPEN] <= 0
    names = [CONTROLS[c] for c in ACTION_COLUMNS + INV_COLUMNS]
    where = np.stack([gameplay] * len(ACTION_COLUMNS) + [~gameplay] * len(INV_COLUMNS), 1)  # (N, 15)
    down = np.concatenate([predicted["action"], predicted["inv"]], 1) & where
    true = (controls[:, list(ACTION_COLUMNS + INV_COLUMNS)] > 0.5) & where
    down_onsets, true_onsets = onsets(down, begins), onsets(true, begins)
    pulses = [names.index(name) for name in PULSES]
    pairs = {i: (down_onsets[:, i], true_onsets[:, i], session) for i in pulses}
    metrics = {f"event_f1_{names[i]}": event_f1(*pair) for i, pair in pairs.items()}
    shown = [i for i in pulses if true_onsets[:, i].any()]
    metrics["event_f1"] = np.mean([metrics[f"event_f1_{names[i]}"] for i in shown]) if shown else 0.0
    metrics["event_f1_in_time"] = np.mean([event_f1(*pairs[i], late=0) for i in shown]) if shown else 0.0

    changes = true[:, :12] != np.roll(true[:, :12], 1, axis=0)
    changes &= (gameplay & np.roll(gameplay, 1) & ~begins)[:, None]
    pressed, should = down[:, :12][changes], true[:, :12][changes]
    metrics["change_f1"] = f1_scores(pressed[:, None], should[:, None])[0]
    metrics["change_accuracy"] = (pressed == should).mean() if changes.any() else 0.0

    slots = controls[:, list(HOTBAR_COLUMNS)] > 0.5
    near = np.convolve(slots.any(1), np.ones(2 * NEAR + 1))[NEAR : NEAR + len(slots)] > 0  # of a true change
    other = predicted["slot"] != np.round(8 * state[:, CURRENT_SLOT])
    fires = predicted["sure"] & other & gameplay & ~near
    metrics["false_hotbar_per_minute"] = onsets(fires[:, None], begins).sum() / max(gameplay.sum() / fps / 60, 1e-9)
    sure_true = predicted["sure"] & gameplay
    fired = {s: onsets((sure_true & (predicted["slot"] == s))[:, None], begins)[:, 0] for s in range(9)}
    used = [s for s in range(9) if slots[:, s].any()]
    metrics["event_f1_hotbar"] = np.mean([event_f1(fired[s], slots[:, s], session) for s in used]) if used else 0.0
    return metrics
