"""Functions of controls_transformer.py against hand-worked cases and plain loops in float64."""

import json
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import controls_transformer as ct
from motion_controls import metrics as motion_metrics
from motion_controls import sessions as motion_sessions

ACTIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13)
LOSSES = ("action", "look", "hotbar", "cursor", "inv", "idle")
WEIGHTS = {"action": 1.0, "look": 0.5, "hotbar": 0.3, "cursor": 0.5, "inv": 0.3, "idle": 0.3}
COLUMN = {name: column for column, name in enumerate(ct.CONTROLS)}


# layout ---------------------------------------------------------------------------------------------------------------
def test_columns_and_sizes():
    assert len(ct.CONTROLS) == len(set(ct.CONTROLS)) == ct.CONTROL_DIM == 28
    assert tuple(ct.ACTION_COLUMNS) == ACTIONS and tuple(motion_sessions.LOOK_COLUMNS) == (9, 10)
    assert tuple(ct.HOTBAR_COLUMNS) == tuple(range(14, 23))
    assert tuple(motion_sessions.CURSOR_COLUMNS) == (23, 24) and tuple(ct.INV_COLUMNS) == (25, 26, 27)
    assert (ct.FRAME_DIM, ct.STATE_DIM, ct.WINDOW, ct.HISTORY, ct.SCREEN_OPEN) == (260, 46, 30, 5, 38)
    assert ct.INPUT_DIM == 260 + 225 + 46 + 5 * 28 == 671
    named = {0: "move_forward", 5: "sneak", 6: "jump", 8: "use_item", 9: "look_yaw", 10: "look_pitch", 11: "drop_item"}
    named |= {12: "swap_offhand", 13: "open_inventory", 14: "hotbar_slot_1", 22: "hotbar_slot_9", 23: "cursor_x"}
    named |= {25: "inv_left_click", 26: "inv_right_click", 27: "inv_shift_held"}
    assert {column: ct.CONTROLS[column] for column in named} == named
    assert {"jump", "attack", "drop_item", "swap_offhand", "open_inventory"} <= set(ct.PULSES) <= set(ct.CONTROLS)
    assert not {"move_forward", "sprint", "sneak", "use_item", "look_yaw", "cursor_x", "inv_shift_held"} & set(
        ct.PULSES
    )


# losses ---------------------------------------------------------------------------------------------------------------
def cross_entropy(logit: float, target: float, weight: float) -> float:
    """Binary, from the logit; `weight` multiplies the positive part."""
    return weight * target * math.log1p(math.exp(-logit)) + (1 - target) * math.log1p(math.exp(logit))


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def make_batch(kind: str) -> dict[str, torch.Tensor]:
    """Outputs and targets of B frames; a frame is either gameplay or has a screen open."""
    g = torch.Generator().manual_seed(len(kind))
    B = 1 if kind.startswith("single") else 24
    screen = torch.rand(B, generator=g) < 0.4
    if kind in ("no screen", "all idle", "single gameplay frame"):
        screen[:] = False
    elif kind in ("no gameplay", "single screen frame"):
        screen[:] = True
    actions = (torch.rand(B, 12, generator=g) < 0.1).float()
    actions[::3] = 0  # idle frames
    look = torch.rand(B, 2, generator=g) * 2 - 1
    look[1::2] *= 0.05  # below the deadzone
    hotbar = torch.where(torch.rand(B, generator=g) < 0.3, torch.randint(0, 9, (B,), generator=g), -1)
    inv = (torch.rand(B, 3, generator=g) < 0.3).float()
    if kind in ("all idle", "no positive"):
        actions[:] = 0
    if kind == "no positive":
        look[:], hotbar[:], inv[:] = 0, -1, 0
    return {
        "gameplay": ~screen,
        "screen": screen,
        "actions": actions,
        "action_logits": torch.randn(B, 12, generator=g) * 3,
        "look_targets": look,
        "look": torch.rand(B, 2, generator=g) * 4 - 2,  # beyond [-1, 1], so that both branches of the Huber loss count
        "hotbar_targets": hotbar,
        "hotbar_logits": torch.randn(B, 9, generator=g) * 3,
        "cursor_targets": torch.rand(B, 2, generator=g),
        "cursor": torch.rand(B, 2, generator=g),
        "inv_targets": inv,
        "inv_logits": torch.randn(B, 3, generator=g) * 3,
        "pos_weights": torch.rand(12, generator=g) * 50 + 0.5,
        "inv_pos_weights": torch.rand(3, generator=g) * 50 + 0.5,
    }


KINDS = ["mixed", "all idle", "no gameplay", "no screen", "no positive", "single gameplay frame", "single screen frame"]


def script_losses(b: dict) -> dict[str, torch.Tensor]:
    return {
        "action": ct.action_loss(b["action_logits"], b["actions"], b["gameplay"], b["pos_weights"]),
        "look": ct.look_loss(b["look"], b["look_targets"], b["gameplay"]),
        "hotbar": ct.hotbar_loss(b["hotbar_logits"], b["hotbar_targets"]),
        "cursor": ct.cursor_loss(b["cursor"], b["cursor_targets"], b["screen"]),
        "inv": ct.inv_loss(b["inv_logits"], b["inv_targets"], b["screen"], b["inv_pos_weights"]),
        "idle": ct.idle_loss(b["action_logits"], b["actions"], b["gameplay"]),
    }


def naive_losses(b: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The six losses as specified, and the plain mean of each over its frames and columns (0 where there are none)."""
    b = {name: values.tolist() for name, values in b.items()}
    frames = range(len(b["gameplay"]))
    sums, rows = dict.fromkeys(LOSSES, 0.0), {name: 0 for name in LOSSES}
    for i in frames:
        if b["gameplay"][i]:
            rows["action"] += 1
            for c in range(12):
                sums["action"] += cross_entropy(b["action_logits"][i][c], b["actions"][i][c], b["pos_weights"][c])
            if any(abs(axis) > 0.08 for axis in b["look_targets"][i]):
                rows["look"] += 1
                sums["look"] += sum(huber(b["look"][i][a] - b["look_targets"][i][a]) for a in range(2))
            if sum(b["actions"][i]) == 0:
                rows["idle"] += 1
                sums["idle"] += sum(1 / (1 + math.exp(-logit)) for logit in b["action_logits"][i])
        if b["screen"][i]:
            rows["cursor"] += 1
            rows["inv"] += 1
            sums["cursor"] += sum((b["cursor"][i][a] - b["cursor_targets"][i][a]) ** 2 for a in range(2))
            for c in range(3):
                sums["inv"] += cross_entropy(b["inv_logits"][i][c], b["inv_targets"][i][c], b["inv_pos_weights"][c])
        if b["hotbar_targets"][i] >= 0:
            rows["hotbar"] += 1
            logits = b["hotbar_logits"][i]
            sums["hotbar"] += math.log(sum(map(math.exp, logits))) - logits[b["hotbar_targets"][i]]
    specified = {name: sums[name] / max(rows[name], 1) for name in LOSSES}
    specified["action"] = sums["action"] / (12 * len(frames))
    specified["idle"] = sums["idle"] / max(12 * rows["idle"], 1)
    columns = {"action": 12, "look": 2, "hotbar": 1, "cursor": 2, "inv": 3, "idle": 12}
    return specified, {name: sums[name] / max(rows[name] * columns[name], 1) for name in LOSSES}


def fractions_of(b: dict) -> dict[str, torch.Tensor]:
    masks = {"gameplay": b["gameplay"], "hotbar": b["hotbar_targets"] >= 0, "screen": b["screen"]}
    return {name: mask.float().mean() for name, mask in masks.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_plain_loops(kind):
    b = make_batch(kind)
    losses, (expected, _) = script_losses(b), naive_losses(b)
    for name in LOSSES:
        assert losses[name].shape == () and losses[name].item() == pytest.approx(expected[name], rel=1e-5, abs=1e-7), (
            name
        )


def test_losses_by_hand():
    """Two frames: the first is gameplay with forward pressed and a look to the right, the second has a screen open."""
    gameplay, screen = torch.tensor([True, False]), torch.tensor([False, True])
    targets = torch.zeros(2, 12)
    targets[0, 0] = 1
    logits = torch.zeros(2, 12)
    # 11 columns at ln 2, one at 2 ln 2; the mean also counts the masked frame
    action = ct.action_loss(logits, targets, gameplay, torch.full((12,), 2.0))
    assert action.item() == pytest.approx(13 * math.log(2) / 24)
    look = ct.look_loss(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([[0.5, 0.0], [1.0, 1.0]]), gameplay)
    assert look.item() == pytest.approx(0.125)
    hotbar = ct.hotbar_loss(torch.zeros(2, 9), torch.tensor([-1, 4]))
    assert hotbar.item() == pytest.approx(math.log(9))
    cursor = ct.cursor_loss(torch.tensor([[1.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.0, 0.0], [0.1, 0.8]]), screen)
    assert cursor.item() == pytest.approx(0.16 + 0.09)
    inv = ct.inv_loss(torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [1, 0, 0]]), screen, torch.full((3,), 3.0))
    assert inv.item() == pytest.approx(5 * math.log(2))
    assert (
        ct.idle_loss(logits, targets, gameplay).item() == 0
    )  # the gameplay frame is not idle, the idle one has a screen
    assert ct.idle_loss(logits, targets * 0, gameplay).item() == pytest.approx(0.5)
    losses = dict(zip(LOSSES, (action, look, hotbar, cursor, inv, torch.tensor(0.5)), strict=True))
    half = dict.fromkeys(("gameplay", "hotbar", "screen"), 0.5)
    expected = 0.5 * 13 * math.log(2) / 24 + 0.5 * 0.5 * 0.125 + 0.3 * 0.5 * math.log(9)
    expected += 0.5 * 0.5 * 0.25 + 0.3 * 0.5 * 5 * math.log(2) + 0.3 * 0.5
    assert float(ct.combined_loss(losses, half, WEIGHTS)) == pytest.approx(expected)


def test_the_deadzone_of_the_look_loss_is_per_axis_and_strict():
    gameplay, output = torch.ones(3, dtype=torch.bool), torch.zeros(3, 2)
    targets = torch.tensor([[0.07, 0.07], [0.08, -0.08], [0.0, -0.09]])  # the first is longer than 0.08 but no axis is
    assert ct.look_loss(output, targets, gameplay).item() == pytest.approx(0.5 * 0.09**2, rel=1e-4)
    assert ct.look_loss(output, targets, gameplay, deadzone=0.5).item() == 0


def test_masked_frames_do_not_count():
    b = make_batch("mixed")
    changed = {name: values.clone() for name, values in b.items()}
    for name in ("action_logits", "look"):
        changed[name][b["screen"]] += 7
    for name in ("cursor", "inv_logits"):
        changed[name][b["gameplay"]] += 7
    changed["hotbar_logits"][b["hotbar_targets"] < 0] += 7
    before, after = script_losses(b), script_losses(changed)
    assert all(torch.equal(before[name], after[name]) for name in LOSSES)


@pytest.mark.parametrize("kind", KINDS)
def test_combined_loss_in_both_norms(kind):
    b = make_batch(kind)
    losses, fractions, (specified, means) = script_losses(b), fractions_of(b), naive_losses(b)
    g, h, s = (float(fractions[name]) for name in ("gameplay", "hotbar", "screen"))
    factor = {"action": g, "look": g, "hotbar": h, "cursor": s, "inv": s, "idle": 1.0}
    expected = sum(WEIGHTS[name] * factor[name] * specified[name] for name in LOSSES)
    assert float(ct.combined_loss(losses, fractions, WEIGHTS)) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(
        ct.combined_loss(losses, fractions, WEIGHTS, "seed"), ct.combined_loss(losses, fractions, WEIGHTS)
    )
    plain = ct.masked_means(losses, fractions)
    assert {name: float(loss) for name, loss in plain.items()} == pytest.approx(means, rel=1e-5, abs=1e-7)
    expected = sum(WEIGHTS[name] * means[name] for name in LOSSES)
    assert float(ct.combined_loss(losses, fractions, WEIGHTS, "masked-mean")) == pytest.approx(expected, rel=1e-5)
    as_floats = {name: float(share) for name, share in fractions.items()}
    torch.testing.assert_close(
        ct.combined_loss(losses, as_floats, WEIGHTS), ct.combined_loss(losses, fractions, WEIGHTS)
    )


@pytest.mark.parametrize("norm", ["seed", "masked-mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_whatever_is_in_the_batch(kind, norm):
    b = make_batch(kind)
    outputs = [b[name].requires_grad_() for name in ("action_logits", "look", "hotbar_logits", "cursor", "inv_logits")]
    ct.combined_loss(script_losses(b), fractions_of(b), WEIGHTS, norm).backward()
    assert all(output.grad is None or output.grad.isfinite().all() for output in outputs)
    assert any(output.grad is not None and output.grad.abs().sum() > 0 for output in outputs)


def test_pos_weights_by_hand():
    targets, mask = torch.zeros(400, 4), torch.ones(400, dtype=torch.bool)
    mask[300:] = False
    targets[:200, 0] = 1  # 300 / (2 * 200)
    targets[:10, 1] = 1  # 300 / 20
    targets[0, 2] = 1  # 300 / 2, capped
    targets[300:, 3] = 1  # only outside the mask: as if there were one
    torch.testing.assert_close(
        torch.as_tensor(ct.pos_weights(targets, mask)).float(), torch.tensor([0.75, 15.0, 50.0, 50.0])
    )
    torch.testing.assert_close(
        torch.as_tensor(ct.pos_weights(targets, mask, cap=10.0)).float(), torch.tensor([0.75, 10.0, 10.0, 10.0])
    )
    targets, mask = targets[:10], mask[:10]
    torch.testing.assert_close(
        torch.as_tensor(ct.pos_weights(targets, mask)).float(), torch.tensor([0.5, 0.5, 5.0, 5.0])
    )


@pytest.mark.parametrize("rows", [0, 1])
def test_pos_weights_of_an_empty_mask_are_finite(rows):
    weights = torch.as_tensor(ct.pos_weights(torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.bool)))
    assert weights.shape == (3,) and weights.isfinite().all() and (weights >= 0).all() and (weights <= 50).all()


# score and thresholds -------------------------------------------------------------------------------------------------
def test_combined_score_by_hand():
    names = ("avg_action_f1", "look_mse", "hotbar_accuracy", "cursor_mse", "avg_inv_f1", "idle_accuracy")
    metrics = dict(zip(names, (0.5, 0.25, 0.75, 0.1, 0.6, 0.9), strict=True))
    assert ct.combined_score(metrics) == pytest.approx(0.2 + 0.15 + 0.075 + 0.09 + 0.06 + 0.09)
    assert ct.combined_score(dict(zip(names, (1, 0, 1, 0, 1, 1), strict=True))) == pytest.approx(1.0)
    assert ct.combined_score(dict(zip(names, (0, 4, 0, 1, 0, 0), strict=True))) == 0  # 1 - 4 counts as 0
    assert ct.combined_score(dict(zip(names, (0, 0, 1, 0, 0, 1), strict=True))) == pytest.approx(0.5)  # doing nothing


def naive_f1(predicted, target) -> float:
    pairs = list(zip(np.asarray(predicted).tolist(), np.asarray(target).tolist(), strict=True))
    hits = sum(bool(p) and t > 0.5 for p, t in pairs)
    wrong, missed = sum(bool(p) and t <= 0.5 for p, t in pairs), sum(not p and t > 0.5 for p, t in pairs)
    return 2 * hits / (2 * hits + wrong + missed) if hits else 0.0


def naive_thresholds(probs, targets, idle) -> list[float]:
    chosen = []
    for column in range(probs.shape[1]):
        best, best_threshold = 0.0, 0.5
        for step in range(16):
            threshold = round(0.1 + 0.05 * step, 2)
            predicted = [float(p) > threshold for p in probs[:, column]]
            false = [p for p, i in zip(predicted, idle, strict=True) if i]
            score = naive_f1(predicted, targets[:, column]) - 0.5 * (sum(false) / len(false) if false else 0)
            if score > best:
                best, best_threshold = score, threshold
        chosen.append(best_threshold)
    return chosen


@pytest.mark.parametrize("idle_share", [0.0, 0.4, 1.0])
def test_thresholds_equal_a_plain_loop(idle_share):
    rng = np.random.default_rng(3)
    targets = (rng.random((300, 6)) < [0.5, 0.3, 0.1, 0.05, 0.01, 0.0]).astype(np.float32)
    probs = np.clip(targets * 0.4 + rng.random((300, 6)) * 0.7 - 0.1, 0, 1).astype(np.float32)
    idle = (rng.random(300) < idle_share) | (idle_share == 1)
    thresholds = ct.optimize_thresholds(probs, targets, idle)
    assert np.asarray(thresholds).tolist() == pytest.approx(naive_thresholds(probs, targets, idle))
    assert thresholds[5] == 0.5  # no positives


def test_thresholds_by_hand():
    targets = np.array([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    # column 0: every threshold from 0.20 to 0.60 is perfect, the lowest wins; 1: 0.85 is the highest there is;
    # 2: nothing to find; 3: finding it would raise half the idle frames and more
    probs = np.array([[0.62, 0.9, 0.9, 0.3], [0.7, 0.95, 0.9, 0.9], [0.18, 0.84, 0.9, 0.9], [0.0, 0.0, 0.9, 0.9]])
    idle = np.array([False, False, True, True])
    thresholds = ct.optimize_thresholds(probs.astype(np.float32), targets, idle)
    assert np.asarray(thresholds).tolist() == [0.2, 0.85, 0.5, 0.5]
    # without idle frames the F1 alone decides
    assert ct.optimize_thresholds(probs.astype(np.float32), targets, idle & False)[3] == 0.1


@pytest.mark.parametrize("rows", [0, 1])
def test_thresholds_without_positives_stay(rows):
    none = np.zeros((rows, 12), np.float32)
    assert np.asarray(ct.optimize_thresholds(none + 0.9, none, np.ones(rows, bool))).tolist() == [0.5] * 12


# metrics --------------------------------------------------------------------------------------------------------------
def frames_of(n: int, screen=()) -> tuple[np.ndarray, np.ndarray]:
    """Controls (n, 28) and game states (n, 46) in which nothing happens; a screen is open at `screen`."""
    controls, state = np.zeros((n, 28), np.float32), np.zeros((n, 46), np.float32)
    state[list(screen), 38] = 0.33  # the inventory: lower than any screen but none
    return controls, state


def nothing(n: int) -> dict[str, np.ndarray]:
    """The outputs of a policy that does nothing."""
    zeros = {"probs": 12, "look": 2, "inv": 3}
    outputs = {name: np.zeros((n, width), np.float32) for name, width in zeros.items()}
    return outputs | {"hotbar": np.full((n, 9), 1 / 9, np.float32), "cursor": np.full((n, 2), 0.5, np.float32)}


def naive_metrics(outputs, controls, state, thresholds, inv_thresholds) -> dict[str, float]:
    screen = [row[38] > 0 for row in state]
    gameplay = [i for i, is_open in enumerate(screen) if not is_open]
    opened = [i for i, is_open in enumerate(screen) if is_open]
    metrics = {}
    for c, column in enumerate(ACTIONS):
        predicted = [outputs["probs"][i, c] > thresholds[c] for i in gameplay]
        metrics[f"f1_{ct.CONTROLS[column]}"] = naive_f1(predicted, [controls[i, column] for i in gameplay])
    for c in range(3):
        predicted = [outputs["inv"][i, c] > inv_thresholds[c] for i in opened]
        metrics[f"f1_{ct.CONTROLS[25 + c]}"] = naive_f1(predicted, [controls[i, 25 + c] for i in opened])
    metrics["avg_action_f1"] = sum(metrics[f"f1_{ct.CONTROLS[c]}"] for c in ACTIONS) / 12
    metrics["avg_inv_f1"] = sum(metrics[f"f1_{ct.CONTROLS[c]}"] for c in (25, 26, 27)) / 3
    active = [i for i in gameplay if abs(controls[i, 9]) > 0.08 or abs(controls[i, 10]) > 0.08]
    pairs = [(outputs["look"][i, a], controls[i, 9 + a]) for i in active for a in range(2)]
    metrics["look_mse"] = sum((p - t) ** 2 for p, t in pairs) / max(1, len(pairs))
    metrics["look_direction_accuracy"] = sum(np.sign(p) == np.sign(t) for p, t in pairs) / len(pairs) if pairs else 1
    changed = [i for i in range(len(controls)) if max(controls[i, 14:23]) > 0.5]
    right = sum(np.argmax(outputs["hotbar"][i]) == np.argmax(controls[i, 14:23]) for i in changed)
    metrics["hotbar_accuracy"] = right / len(changed) if changed else 1
    offsets = [outputs["cursor"][i].astype(float) - controls[i, 23:25] for i in opened]
    metrics["cursor_mse"] = sum(x**2 + y**2 for x, y in offsets) / max(1, 2 * len(opened))
    pixels = [math.hypot(x * 1920, y * 1080) for x, y in offsets]
    metrics["cursor_pixel_error"] = sum(pixels) / max(1, len(pixels))
    idle = [i for i in gameplay if all(controls[i, c] == 0 for c in ACTIONS)]
    quiet = sum(all(outputs["probs"][i, c] <= thresholds[c] for c in range(12)) for i in idle)
    metrics["idle_accuracy"] = quiet / len(idle) if idle else 1
    m = metrics
    metrics["score"] = 0.4 * m["avg_action_f1"] + 0.2 * max(0, 1 - m["look_mse"]) + 0.1 * m["hotbar_accuracy"]
    metrics["score"] += 0.1 * max(0, 1 - m["cursor_mse"]) + 0.1 * m["avg_inv_f1"] + 0.1 * m["idle_accuracy"]
    return metrics


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_equal_plain_loops(kind, tuned):
    b = {name: values.numpy() for name, values in make_batch(kind).items()}
    n = len(b["gameplay"])
    controls, state = frames_of(n, np.flatnonzero(b["screen"]))
    controls[:, list(ACTIONS)], controls[:, 9:11] = b["actions"], b["look_targets"]
    controls[:, 23:25], controls[:, 25:28] = b["cursor_targets"] * b["screen"][:, None], b["inv_targets"]
    for i, slot in enumerate(b["hotbar_targets"]):
        controls[i, 14 + slot] = float(slot >= 0) if slot >= 0 else controls[i, 14 + slot]
    softmax = np.exp(b["hotbar_logits"]) / np.exp(b["hotbar_logits"]).sum(1, keepdims=True)
    outputs = {"probs": 1 / (1 + np.exp(-b["action_logits"])), "look": np.clip(b["look"], -1, 1), "hotbar": softmax}
    outputs |= {"cursor": b["cursor"], "inv": 1 / (1 + np.exp(-b["inv_logits"]))}
    rng = np.random.default_rng(0)
    thresholds = rng.uniform(0.1, 0.9, 12).astype(np.float32) if tuned else None
    inv_thresholds = rng.uniform(0.1, 0.9, 3).astype(np.float32) if tuned else None
    metrics = ct.control_metrics(outputs, controls, state, thresholds, inv_thresholds)
    expected = naive_metrics(
        outputs, controls, state, thresholds if tuned else [0.5] * 12, inv_thresholds if tuned else [0.5] * 3
    )
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["score"] == pytest.approx(ct.combined_score(metrics))


def test_metrics_where_nothing_happens():
    """Empty masks: errors are 0, accuracies 1, but the F1 of clicks that could not be made is 0."""
    controls, state = frames_of(40)
    metrics = ct.control_metrics(nothing(40), controls, state)
    expected = {"avg_action_f1": 0, "look_mse": 0, "look_direction_accuracy": 1, "hotbar_accuracy": 1, "cursor_mse": 0}
    expected |= {"avg_inv_f1": 0, "idle_accuracy": 1, "score": 0.5, "look_drift": 0, "false_hotbar_per_minute": 0}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_perfect_policy_scores_one():
    controls, state = frames_of(120, range(60, 120))
    for i, column in enumerate(ACTIONS):
        controls[4 * i + 4, column] = 1
    controls[30:40, 9], controls[50, 14 + 3] = -0.5, 1
    controls[60:, 23:25], controls[70, 25], controls[80, 26], controls[90:95, 27] = (0.2, 0.7), 1, 1, 1
    outputs = nothing(120)
    outputs |= {"probs": controls[:, list(ACTIONS)] * 0.9, "look": controls[:, 9:11], "inv": controls[:, 25:28] * 0.9}
    outputs["cursor"] = controls[:, 23:25]
    outputs["hotbar"][50] = np.eye(9)[3] * 0.8 + 0.2 / 9
    metrics = ct.control_metrics(outputs, controls, state)
    assert metrics["score"] == pytest.approx(1) and metrics["score_present"] == pytest.approx(1)
    assert metrics["look_drift"] == 0 and metrics["cursor_pixel_error"] == 0
    for name in ("jump", "attack", "drop_item", "swap_offhand", "open_inventory"):
        assert metrics[f"event_f1_{name}"] == 1


def test_score_over_what_the_data_show():
    """No screen, no hotbar change, one action of twelve: what is left is weighed as before, 0.4, 0.2 and 0.1."""
    controls, state = frames_of(60)
    controls[:20, 0], controls[10:30, 10] = 1, 0.6
    outputs = nothing(60)
    outputs["probs"][:10, 0] = 0.9
    m = ct.control_metrics(outputs, controls, state)
    assert m["look_mse"] == pytest.approx(0.18) and m["avg_action_f1"] == pytest.approx(2 / 3 / 12)
    assert m["score_present"] == pytest.approx((0.4 * 2 / 3 + 0.2 * (1 - 0.18) + 0.1) / 0.7)


def test_look_drift_is_measured_where_the_look_is_at_rest():
    controls, state = frames_of(50, range(40, 50))
    controls[:20, 9] = 0.5
    outputs = nothing(50)
    outputs["look"][:20], outputs["look"][20:30], outputs["look"][40:] = 0.5, -0.2, 0.9
    assert ct.control_metrics(outputs, controls, state)["look_drift"] == pytest.approx(0.1)  # half of frames 20 to 39


# events ---------------------------------------------------------------------------------------------------------------
def event_f1(true: list[int], predicted: list[int], name: str = "jump") -> float:
    controls, state = frames_of(100)
    outputs = nothing(100)
    controls[true, COLUMN[name]] = 1
    outputs["probs"][predicted, ACTIONS.index(COLUMN[name])] = 0.9
    return ct.control_metrics(outputs, controls, state)[f"event_f1_{name}"]


@pytest.mark.parametrize("name", ["jump", "attack", "drop_item", "swap_offhand", "open_inventory"])
def test_events_match_within_three_frames(name):
    assert event_f1([20, 50], [17, 53], name=name) == 1
    assert event_f1([20, 50], [16, 53], name=name) == pytest.approx(0.5)
    assert event_f1([20, 50], [24, 46], name=name) == 0


def test_an_event_is_matched_once():
    assert event_f1([20], [19, 22]) == pytest.approx(2 / 3)
    assert event_f1([19, 22], [20]) == pytest.approx(2 / 3)
    assert event_f1([20, 24], [22, 26]) == 1
    assert event_f1([20, 23], [17, 20]) == 1  # nearest first would leave 17 and 23 alone


def test_a_held_key_is_one_event():
    """However long it is held, by the player or by the policy: what counts is when it goes down."""
    controls, state = frames_of(100)
    outputs = nothing(100)
    controls[20:30, 6], controls[60, 6] = 1, 1
    outputs["probs"][22, 6], outputs["probs"][58:80, 6] = 0.9, 0.9
    assert ct.control_metrics(outputs, controls, state)["event_f1_jump"] == 1
    outputs["probs"][24:28, 6] = 0.9  # again, while the player still holds it
    assert ct.control_metrics(outputs, controls, state)["event_f1_jump"] == pytest.approx(4 / 5)


def test_events_that_never_happen():
    assert event_f1([], []) == 0 and event_f1([10], []) == 0 and event_f1([], [10]) == 0
    assert event_f1([0, 99], [3, 96]) == 1


# model ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return ct.ControlTransformer().eval()


def test_parameter_counts(network):
    assert sum(p.numel() for p in network.parameters()) == 3_510_428
    assert sum(p.numel() for p in ct.ControlTransformer(learnable_decay=True).parameters()) == 3_510_429


def test_outputs(network):
    x, mask = torch.randn(4, 30, 671) * 5, torch.ones(4, 30, dtype=torch.bool)
    with torch.no_grad():
        outputs = network(x, mask)
    shapes = {
        "action_logits": (4, 12),
        "look": (4, 2),
        "hotbar_logits": (4, 9),
        "cursor": (4, 2),
        "inv_click_logits": (4, 3),
    }
    assert {name: tuple(values.shape) for name, values in outputs.items()} == shapes
    assert outputs["look"].abs().max() <= 1 and 0 <= outputs["cursor"].min() and outputs["cursor"].max() <= 1


def test_every_layer_starts_with_its_own_weights(network):
    """nn.TransformerEncoder copies one layer six times."""
    layers = [module for module in network.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    assert len(layers) == 6
    for name, first in layers[0].named_parameters():
        if first.dim() > 1:
            for a in range(6):
                for b in range(a):
                    one, other = dict(layers[a].named_parameters())[name], dict(layers[b].named_parameters())[name]
                    assert not torch.equal(one, other), name
        assert first.isfinite().all()
    assert all(layer.norm_first is False and layer.linear1.out_features == 512 for layer in layers)
    assert {layer.self_attn.num_heads for layer in layers} == {8}


def test_padding_is_ignored(network):
    x, mask = torch.randn(3, 30, 671), torch.ones(3, 30, dtype=torch.bool)
    mask[0, :29], mask[1, :12] = False, False
    other = torch.where(mask[..., None], x, 100 * torch.randn_like(x))
    with torch.no_grad():
        before, after = network(x, mask), network(other, mask)
        changed = network(torch.cat([x[:, :-1], x[:, -1:] + 1], 1), mask)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before[name], changed[name], atol=1e-4)


def test_a_frame_does_not_depend_on_the_others_in_the_batch(network):
    x, mask = torch.randn(5, 30, 671), torch.rand(5, 30) < 0.8
    mask[:, -1] = True
    with torch.no_grad():
        together, alone = network(x, mask), network(x[2:3], mask[2:3])
    for name in together:
        torch.testing.assert_close(together[name][2:3], alone[name], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    torch.manual_seed(1)
    network = ct.ControlTransformer(learnable_decay=True).train()
    outputs = network(torch.randn(8, 30, 671), torch.ones(8, 30, dtype=torch.bool))
    sum(values.square().sum() for values in outputs.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("head", ["action_logits", "look", "hotbar_logits", "cursor", "inv_click_logits"])
def test_each_head_has_its_own_gradient(network, head):
    network.zero_grad(set_to_none=True)
    output = network(torch.randn(2, 30, 671), torch.ones(2, 30, dtype=torch.bool))[head]
    (output - 0.3).square().sum().backward()
    reached = sum(p.numel() for p in network.parameters() if p.grad is not None and p.grad.abs().sum() > 0)
    sizes = {
        "action_logits": 34_444,
        "look": 33_154,
        "hotbar_logits": 34_057,
        "cursor": 33_154,
        "inv_click_logits": 33_283,
    }
    # parameters with zero gradients are none here but a few dead units; whole tensors count
    assert reached == 3_510_428 - sum(sizes.values()) + sizes[head]
    network.zero_grad(set_to_none=True)


def test_a_short_window_is_one_without_its_padding(network):
    x, mask = torch.randn(2, 30, 671), torch.ones(2, 30, dtype=torch.bool)
    x[:, :20], mask[:, :20] = 0, False
    with torch.no_grad():
        padded, short = network(x, mask), network(x[:, 20:], mask[:, 20:])
    assert {name: tuple(v.shape) for name, v in padded.items()} == {name: tuple(v.shape) for name, v in short.items()}


def test_the_newest_frames_weigh_most(network):
    """Pooling: exp(linspace(-2, 0)) over the window, so frame 29 counts e^2 times frame 0."""
    decay = torch.linspace(-2, 0, 30).exp()
    decay = decay / decay.sum()
    seen = []
    layers = [module for module in network.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    hook = layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    heads = [m for m in network.modules() if isinstance(m, nn.Linear) and (m.in_features, m.out_features) == (256, 128)]
    assert len(heads) == 5
    pooled = []
    hooks = [hook, heads[0].register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))]
    with torch.no_grad():
        network(torch.randn(2, 30, 671), torch.ones(2, 30, dtype=torch.bool))
    for one in hooks:
        one.remove()
    torch.testing.assert_close(pooled[0], (seen[0] * decay[:, None]).sum(1), rtol=1e-4, atol=1e-5)


# sessions -------------------------------------------------------------------------------------------------------------
def session_arrays(n: int = 60, seed: int = 0, **changes) -> dict:
    """A v2 session in which every column is random within its range."""
    rng = np.random.default_rng(seed)
    frames = rng.normal(0, 0.5, (n, 260)).astype(np.float32)
    frames[:, 225:260] = rng.random((n, 35)) > 0.1
    controls, state = frames_of(n, range(n // 2, n))
    gameplay = np.arange(n) < n // 2
    controls[:, list(ACTIONS)] = (rng.random((n, 12)) < 0.2) & gameplay[:, None]
    controls[:, 9:11] = rng.uniform(-1, 1, (n, 2)) * gameplay[:, None]
    controls[::7, 14 + seed % 9] = gameplay[::7]
    controls[:, 23:25] = rng.random((n, 2)) * ~gameplay[:, None]
    controls[:, 25:28] = (rng.random((n, 3)) < 0.2) & ~gameplay[:, None]
    state[:, [11, 12]], state[:, [5, 10, 14, 24]], state[:, 34] = rng.random((n, 2)), 1, rng.uniform(-1, 1, n)
    arrays = {
        "frames": frames,
        "controls": controls,
        "game_state": state,
        "fps": np.float32(30),
        "version": np.int32(2),
    }
    return arrays | {"timestamps": 1.7e9 + np.arange(n) / 30} | changes


def write_session(folder, number: int = 1, missing: tuple = (), **changes):
    path = folder / f"session_{number:03d}.npz"
    arrays = session_arrays(**changes)
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if name not in missing})
    return path


def write_arrays(folder, number: int, session: dict):
    path = folder / f"session_{number:03d}.npz"
    np.savez_compressed(path, **session)
    return path


def test_a_session_comes_back_as_it_was_written(tmp_path):
    path = write_session(tmp_path, person="p3", session_type="mixed", intent_look=np.zeros(60))
    arrays, session = session_arrays(), ct.load_session(path)
    for name in ("frames", "controls", "game_state"):
        np.testing.assert_array_equal(session[name], arrays[name])
        assert session[name].dtype == np.float32
    np.testing.assert_array_equal(session["timestamps"], arrays["timestamps"])
    assert session["timestamps"].dtype == np.float64
    assert (session["path"], session["version"], session["person"], session["session_type"]) == (path, 2, "p3", "mixed")
    assert type(session["fps"]) is float and session["fps"] == 30
    assert type(session["person"]) is str and type(session["version"]) is int


def test_person_and_type_may_be_missing(tmp_path):
    session = ct.load_session(write_session(tmp_path))
    assert session["person"] == session["session_type"] == ""


def test_sessions_are_found_in_order(tmp_path):
    for number in (10, 2, 1):
        write_session(tmp_path, number)
    (tmp_path / "playback_1.npz").write_bytes(b"")
    assert [path.name for path in ct.find_sessions(tmp_path)] == [f"session_{i:03d}.npz" for i in (1, 2, 10)]


@pytest.mark.parametrize("exists", [True, False])
def test_no_sessions_names_the_command_that_makes_some(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="benchmarks/make_control_sessions.py") as error:
        ct.find_sessions(folder)
    assert str(folder) in str(error.value)


def changed(name: str, place, value) -> dict:
    array = session_arrays()[name].copy()
    array[place] = value
    return {name: array}


class Bomb:
    """Pickled, it would make a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# what is wrong, changes to the arrays, keys left out, what the message has to name
BAD = {
    "frames too narrow": ({"frames": np.zeros((60, 259), np.float32)}, (), ["frames", "259", "260"]),
    "frames not a table": ({"frames": np.zeros(260, np.float32)}, (), ["frames", "260"]),
    "controls too narrow": ({"controls": np.zeros((60, 27), np.float32)}, (), ["controls", "27", "28"]),
    "controls too wide": ({"controls": np.zeros((60, 29), np.float32)}, (), ["controls", "29", "28"]),
    "states too narrow": ({"game_state": np.zeros((60, 45), np.float32)}, (), ["game_state", "45", "46"]),
    "frames are words": ({"frames": np.full((60, 260), "x")}, (), ["frames"]),
    "controls are complex": ({"controls": np.zeros((60, 28), np.complex64)}, (), ["controls", "complex64"]),
    "states are dates": ({"game_state": np.zeros((60, 46), "datetime64[s]")}, (), ["game_state", "datetime64"]),
    "NaN in frames": (changed("frames", (17, 3), np.nan), (), ["frames", "nan"]),
    "infinity in controls": (changed("controls", (5, 9), np.inf), (), ["controls", "inf"]),
    "NaN in states": (changed("game_state", (5, 11), np.nan), (), ["game_state", "nan"]),
    "NaN in timestamps": (changed("timestamps", 5, np.nan), (), ["timestamps", "nan"]),
    "an action above 1": (changed("controls", (5, 0), 2), (), ["controls", "2"]),
    "a look under -1": (changed("controls", (5, 9), -1.5), (), ["controls", "-1.5"]),
    "a negative cursor": (changed("controls", (40, 23), -0.25), (), ["controls", "-0.25"]),
    "a state above 1": (changed("game_state", (5, 38), 3), (), ["game_state", "3"]),
    "controls shorter": ({"controls": np.zeros((59, 28), np.float32)}, (), ["controls", "59", "60"]),
    "states longer": ({"game_state": np.zeros((61, 46), np.float32)}, (), ["game_state", "61", "60"]),
    "timestamps shorter": ({"timestamps": np.arange(58) / 30}, (), ["timestamps", "58", "60"]),
    "timestamps go back": (changed("timestamps", 30, 1.6e9), (), ["timestamps"]),
    "one frame": ({"n": 1}, (), ["1"]),
    "no frame": ({"n": 0}, (), ["0"]),
    "version 3": ({"version": np.int32(3)}, (), ["version", "3"]),
    "version 99": ({"version": np.int32(99)}, (), ["version", "99"]),
    "no frames key": ({}, ("frames",), ["frames"]),
    "no controls": ({}, ("controls",), ["controls"]),
    "no states": ({}, ("game_state",), ["game_state"]),
    "fps of 0": ({"fps": np.float32(0)}, (), ["fps", "0"]),
    "fps not a number": ({"fps": np.float32("nan")}, (), ["fps", "nan"]),
}
MENDS = re.compile(r"\b(record|write|remove|cut|leave|make|trim|convert|repair|--skip-bad-sessions)", re.IGNORECASE)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_session_is_refused_by_name(tmp_path, kind):
    changes, missing, named = BAD[kind]
    path = write_session(tmp_path, missing=missing, **changes)
    with pytest.raises(ValueError) as error:
        ct.load_session(path)
    message = str(error.value)
    assert str(path) in message and all(word in message for word in named), message
    assert MENDS.search(message.replace(str(path), "")), message


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(tmp_path, keep):
    path = write_session(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError) as error:
        ct.load_session(path)
    assert str(path) in str(error.value) and MENDS.search(str(error.value).replace(str(path), ""))


def test_a_file_with_damaged_bytes_is_refused(tmp_path):
    path = tmp_path / "session_001.npz"
    np.savez(path, **session_arrays())
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3 : len(damaged) // 3 + 64] = b"\xff" * 64
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="session_001.npz"):
        ct.load_session(path)


def test_a_file_with_damaged_headers_is_refused_by_name_or_read(tmp_path):
    """The readers of zip and npy raise many kinds of errors for these; none of them names the file."""
    path, rng = tmp_path / "session_001.npz", np.random.default_rng(0)
    np.savez(path, **session_arrays(n=2))
    whole = path.read_bytes()
    heads = [m.start() for m in re.finditer(b"PK", whole)]
    for trial in range(400):
        damaged = bytearray(whole)
        for place in rng.choice(heads, 1 + trial % 3) + rng.integers(0, 130, 1 + trial % 3):
            damaged[min(place, len(whole) - 1)] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert len(ct.load_session(path)["frames"]) == 2
        except ValueError as error:
            assert str(path) in str(error)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    path = tmp_path / "session_001.npz"
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"not an archive", (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="session_001.npz"):
            ct.load_session(path)
    path.unlink()
    path.mkdir()
    with pytest.raises((ValueError, OSError), match="session_001.npz"):
        ct.load_session(path)


@pytest.mark.parametrize("key", ["frames", "controls", "fps", "person", "version"])
def test_pickled_arrays_are_never_opened(tmp_path, key):
    trace = tmp_path / "opened"
    path = write_session(tmp_path, **{key: np.array([Bomb(trace)], dtype=object)})
    with pytest.raises(ValueError) as error:
        ct.load_session(path)
    assert str(path) in str(error.value) and not trace.exists()


def test_unknown_keys_are_not_even_read(tmp_path):
    trace = tmp_path / "opened"
    path = write_session(tmp_path, raw_state_dicts=np.array([Bomb(trace)], dtype=object))
    assert len(ct.load_session(path)["frames"]) == 60 and not trace.exists()


# version 1 ------------------------------------------------------------------------------------------------------------
V1_CONTROLS = {0: 0, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10}
V1_STATE = {0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5, 7: 11, 8: 12, 9: 14, 10: 15, 11: 20, 12: 21, 13: 26, 14: 25, 15: 22}
V1_STATE |= {16: 24, 17: 29, 18: 30, 19: 23, 20: 7, 21: 16, 22: 27, 23: 19}  # old column -> new; 4 (can_block) is gone


def write_v1(path, n: int = 40, state_width: int = 24, **changes) -> dict:
    rng = np.random.default_rng(5)
    arrays = {
        "pose_world": rng.normal(0, 1, (n, 33, 3)),
        "pose_visibility": rng.random((n, 33)),
        "left_hand_3d": rng.normal(0, 1, (n, 21, 3)),
        "right_hand_3d": rng.normal(0, 1, (n, 21, 3)),
        "left_hand_present": rng.random(n) < 0.5,
        "right_hand_present": rng.random(n) < 0.5,
        "game_state": rng.random((n, state_width)),
        "controls": rng.random((n, 10)),
        "timestamps": 1.7e9 + np.arange(n) / 30,
    }
    arrays = {name: array.astype(np.float32 if name != "timestamps" else float) for name, array in arrays.items()}
    arrays |= {"session_type": "walking", "control_method": "bootstrap"} | changes
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.mark.parametrize("state_width", [16, 24])
def test_version_1_is_mapped(tmp_path, state_width):
    path = tmp_path / "session_001.npz"
    old, session = write_v1(path, state_width=state_width), ct.load_session(path)
    frames, controls, state = (session[name] for name in ("frames", "controls", "game_state"))
    assert session["version"] == 1 and session["session_type"] == "walking"
    assert frames.shape == (40, 260) and controls.shape == (40, 28) and state.shape == (40, 46)
    for i in range(40):
        expected = [*old["pose_world"][i].ravel(), *old["left_hand_3d"][i].ravel(), *old["right_hand_3d"][i].ravel()]
        expected += [old["left_hand_present"][i], old["right_hand_present"][i], *old["pose_visibility"][i]]
        np.testing.assert_array_equal(frames[i], np.array(expected, np.float32))
        for column in range(28):
            before = [a for a, b in V1_CONTROLS.items() if b == column]
            assert controls[i, column] == (old["controls"][i, before[0]] if before else 0), column
        for column in range(46):
            before = [a for a, b in V1_STATE.items() if b == column and a < state_width]
            if before:
                scale = 0.5 if before[0] == 15 else 1  # a fall was divided by 10, now by 20
                assert state[i, column] == pytest.approx(scale * old["game_state"][i, before[0]]), column
            elif column == 10:
                continue  # an offhand that is not known counts as empty, or as nothing
            else:
                assert state[i, column] == 0, column
    assert (state[:, 38] == 0).all()  # no screens in version 1


def test_a_bad_version_1_is_refused(tmp_path):
    path = tmp_path / "session_001.npz"
    for changes, word in [
        ({"pose_world": np.zeros((40, 33, 2), np.float32)}, "pose_world"),
        ({"controls": np.zeros((40, 11), np.float32)}, "controls"),
        ({"game_state": np.zeros((40, 20), np.float32)}, "game_state"),
        ({"left_hand_3d": np.zeros((39, 21, 3), np.float32)}, "left_hand_3d"),
        ({"pose_visibility": np.full((40, 33), np.nan, np.float32)}, "column 227 is nan"),
    ]:
        write_v1(path, **changes)
        with pytest.raises(ValueError, match=word) as error:
            ct.load_session(path)
        assert str(path) in str(error.value)


# splits ---------------------------------------------------------------------------------------------------------------
def make_sessions(persons: list[str], types: list[str] | None = None) -> list[dict]:
    types = types or [""] * len(persons)
    return [
        {"person": person, "session_type": kind, "path": f"session_{i:03d}.npz", **session_arrays(n=40)}
        for i, (person, kind) in enumerate(zip(persons, types, strict=True))
    ]


@pytest.mark.parametrize("count", [2, 3, 5, 10, 25])
@pytest.mark.parametrize("seed", range(4))
def test_a_split_has_every_session_once(count, seed):
    sessions = make_sessions([""] * count)
    train, val = (list(map(int, side)) for side in ct.split_sessions(sessions, 0.2, seed))
    assert sorted(train + val) == list(range(count)) and train and val
    assert abs(len(val) - 0.2 * count) <= 1
    again = ct.split_sessions(sessions, 0.2, seed)
    assert [list(map(int, side)) for side in again] == [train, val]


def test_the_seed_decides_the_split():
    splits = {tuple(sorted(map(int, ct.split_sessions(make_sessions([""] * 12), 0.25, seed)[1]))) for seed in range(8)}
    assert len(splits) > 1


@pytest.mark.parametrize("seed", range(6))
def test_a_person_is_on_one_side(seed):
    persons = ["a", "a", "a", "b", "c", "c", "d", "d", "e", "e"]
    train, val = ct.split_sessions(make_sessions(persons), 0.2, seed)
    assert len(train) and len(val) and not {persons[i] for i in train} & {persons[i] for i in val}


@pytest.mark.parametrize("seed", range(6))
def test_every_type_is_on_both_sides(seed):
    types = ["walk"] * 6 + ["fight"] * 5 + ["chest"] * 2
    train, val = ct.split_sessions(make_sessions([""] * 13, types), 0.2, seed)
    assert {types[i] for i in val} == {types[i] for i in train} == set(types)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_a_type_with_one_session_does_not_empty_the_training_side(fraction):
    for persons in (["", ""], ["", "", ""], ["a", "b", "c"], ["a", "b"]):
        for types in (["x", "y", "z"], ["x", "x", "x"]):
            train, val = ct.split_sessions(make_sessions(persons, types[: len(persons)]), fraction, 1)
            assert len(train) and len(val) and sorted([*train, *val]) == list(range(len(persons)))


# features -------------------------------------------------------------------------------------------------------------
def test_velocity_is_the_first_difference():
    frames = torch.randn(50, 260)
    speed = torch.as_tensor(ct.velocity(frames))
    assert speed.shape == (50, 225) and (speed[0] == 0).all()
    for t in range(1, 50):
        torch.testing.assert_close(speed[t], frames[t, :225] - frames[t - 1, :225], rtol=1e-5, atol=1e-6)
    assert (torch.as_tensor(ct.velocity(frames[:1])) == 0).all()


# windows --------------------------------------------------------------------------------------------------------------
def naive_window(session: dict, end: int, keep=(1, 1, 1, 1, 1), form: str = "tiled") -> tuple[list, list]:
    """The window that ends in row `end`, not normalised: 30 rows of 671 numbers, None before the session's start."""
    frames, state, controls = (session[name].tolist() for name in ("frames", "game_state", "controls"))
    rows, real = [], []
    for t in range(end - 29, end + 1):
        real.append(t >= 0)
        if t < 0:
            rows.append(None)
            continue
        speed = [frames[t][c] - frames[t - 1][c] if t > 0 else 0.0 for c in range(225)]
        history = []
        for lag, kept in zip((5, 4, 3, 2, 1), keep, strict=True):  # oldest first
            row = (end if form == "tiled" else t) - lag
            history += controls[row] if row >= 0 and kept else [0.0] * 28
        rows.append(frames[t] + speed + state[t] + history)
    return rows, real


def normalised(rows: list, mean, std, clip: float) -> np.ndarray:
    out = np.zeros((30, 671))
    for i, row in enumerate(rows):
        if row is not None:
            out[i] = np.clip((np.array(row) - mean) / std, -clip, clip)
    return out


LENGTHS = (50, 33, 7)
PLAIN = ct.Scale(torch.zeros(671), torch.ones(671), 1000.0)
HALF = dict(rtol=1e-3, atol=1e-3)  # features are kept in half precision


def lay_out(sessions: list[dict], scale=None):
    paths = [Path(f"session_{i:03d}.npz") for i in range(len(sessions))]
    data = ct.Recordings(paths, [len(session["frames"]) for session in sessions], scale or PLAIN)
    for i, session in enumerate(sessions):
        data.put(i, session)
    return data


@pytest.fixture(scope="module")
def laid_out():
    """Three sessions, the same laid end to end and normalised, and their scale, which is not trivial."""
    sessions = [session_arrays(n, seed) for seed, n in enumerate(LENGTHS)]
    rng = np.random.default_rng(9)
    mean, std = rng.normal(0, 0.3, 671).astype(np.float32), rng.uniform(0.2, 2, 671).astype(np.float32)
    scale = ct.Scale(torch.from_numpy(mean), torch.from_numpy(std), 3.0)
    return sessions, lay_out(sessions, scale), scale


def all_rows(data) -> torch.Tensor:
    return data.rows({i: (0, length) for i, length in enumerate(data.lengths)})


PLACES = [(session, end) for session, length in enumerate(LENGTHS) for end in range(length)]  # as `all_rows`


@pytest.mark.parametrize("form", ["tiled", "per-frame"])
def test_windows_equal_a_plain_loop(laid_out, form):
    sessions, data, scale = laid_out
    order = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    x, real, controls, screen = ct.gather_windows(data, all_rows(data)[order], form)
    assert x.shape == (90, 30, 671) and x.dtype == torch.float32 and real.dtype == torch.bool
    for i, place in enumerate(order.tolist()):
        session, end = PLACES[place]
        expected, expected_real = naive_window(sessions[session], end, form=form)
        assert real[i].tolist() == expected_real
        expected = normalised(expected, scale.mean.numpy(), scale.std.numpy(), 3.0)
        found, expected = x[i].numpy()[expected_real], expected[expected_real]
        np.testing.assert_allclose(found[:, :531], expected[:, :531], **HALF)
        np.testing.assert_allclose(found[:, 531:], expected[:, 531:], rtol=1e-4, atol=2e-5)
        assert x[i].isfinite().all()
        np.testing.assert_array_equal(controls[i], sessions[session]["controls"][end])
        assert bool(screen[i]) == (sessions[session]["game_state"][end, 38] > 0)


def test_the_history_never_holds_the_answer(laid_out):
    """Whatever the controls of the window's last frame are, its features are the same."""
    sessions, data, scale = laid_out
    rows = all_rows(data)
    before, real = (part.clone() for part in ct.gather_windows(data, rows)[:2])
    for place in (0, 20, 49, 50, 89):
        session, end = PLACES[place]
        changed = [dict(one) for one in sessions]
        changed[session]["controls"] = sessions[session]["controls"].copy()
        changed[session]["controls"][end] = 1 - changed[session]["controls"][end]
        after = ct.gather_windows(lay_out(changed, scale), rows)[0]
        differs = [i for i in range(90) if not torch.equal(before[i][real[i]], after[i][real[i]])]
        assert differs == list(range(place + 1, min(place + 6, sum(LENGTHS[: session + 1]))))


def test_nothing_crosses_from_one_session_to_the_next(laid_out):
    sessions, data, scale = laid_out
    x, real, _, _ = ct.gather_windows(data, all_rows(data)[[50, 83, 85]])
    assert real.sum(1).tolist() == [1, 1, 3] and real[2, -3:].all()
    zero = ((0 - scale.mean) / scale.std).clamp(-3, 3)
    for i in range(2):  # the first frame of a session: no velocity, no history
        torch.testing.assert_close(x[i, -1, 260:485], zero[260:485], **HALF)
        torch.testing.assert_close(x[i, -1, 531:], zero[531:])


@pytest.mark.parametrize("form", ["tiled", "per-frame"])
def test_dropped_history_equals_the_start_of_a_session(laid_out, form):
    """Entries are zeroed whole and before normalising, each on its own, and nothing else is."""
    _, data, scale = laid_out
    torch.manual_seed(0)
    rows = all_rows(data)[45].repeat(1000)
    kept = ct.gather_windows(data, rows[:1], form)[0].clone()
    x = ct.gather_windows(data, rows, form, history_dropout=0.3)[0]
    assert torch.equal(x[:, :, :531], kept[:, :, :531].expand(1000, -1, -1))
    zero = ((0 - scale.mean) / scale.std).clamp(-3, 3)[531:].view(5, 28)
    entries, whole = x[:, :, 531:].reshape(1000, 30, 5, 28), kept[:, :, 531:].reshape(1, 30, 5, 28)
    same, dropped = (entries == whole).all(-1), ((entries - zero).abs() < 1e-5).all(-1)
    assert (same | dropped).all() and not (same & dropped).any()
    share = dropped.float().mean((0, 1))
    assert ((share - 0.3).abs() < 0.06).all(), share  # each of the five as often
    if form == "tiled":
        assert (dropped == dropped[:, :1]).all()  # one draw for all frames of a window
    pairs = (dropped[:, 29, 0] & dropped[:, 29, 4]).float().mean()
    assert pairs == pytest.approx(0.09, abs=0.04)


def test_all_of_the_history_can_be_dropped(laid_out):
    _, data, scale = laid_out
    x = ct.gather_windows(data, all_rows(data)[[45, 70]], "tiled", history_dropout=1.0)[0]
    torch.testing.assert_close(x[:, -1, 531:], ((0 - scale.mean) / scale.std).clamp(-3, 3)[531:].expand(2, -1))


def test_the_scale_is_that_of_the_training_rows(tmp_path, laid_out):
    sessions = [{name: np.array(array) for name, array in session.items()} for session in laid_out[0]]
    for session in sessions:
        session["frames"][:, 7], session["game_state"][:, 20] = 5.3, 0.3
        session["frames"][::2, 8], session["frames"][1::2, 8] = 1, np.nextafter(np.float32(1), np.float32(2))
    paths = [write_arrays(tmp_path, i, session) for i, session in enumerate(sessions)]
    frames = {0: (0, 40), 2: (3, 7)}
    scale = ct.feature_scale(paths, frames, 10.0)
    places = [(session, end) for session, (first, last) in frames.items() for end in range(first, last)]
    windows = [naive_window(sessions[session], end)[0][-1] for session, end in places]
    mean, std = np.mean(windows, 0), np.std(windows, 0)
    assert (std < 1e-6).sum() > 20 and (std > 1e-6).sum() > 500  # columns of both kinds
    std[std < 1e-6] = 1
    assert scale.std[7] == scale.std[8] == scale.std[485 + 20] == 1
    np.testing.assert_allclose(scale.mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale.std.numpy(), std, rtol=1e-3, atol=1e-4)
    data = lay_out(sessions, scale)
    x, real, _, _ = ct.gather_windows(data, data.rows(frames))
    assert x.isfinite().all() and x[real].abs().max() <= 10
    last = x[:, -1].double().numpy()
    np.testing.assert_allclose(last[:, :531].mean(0), 0, atol=1e-3)


def test_the_scale_of_one_row_is_finite(tmp_path, laid_out):
    scale = ct.feature_scale([write_arrays(tmp_path, 0, laid_out[0][0])], {0: (3, 4)}, 10.0)
    assert (scale.std == 1).all() and scale.mean.isfinite().all()


@pytest.mark.parametrize("persons", ["AAAAAAAAAB", "AAAAAAAABC", "AAAAAABBCD"])
def test_a_person_with_most_sessions_is_trained_on(persons):
    for seed in range(10):
        train, val = ct.split_sessions(make_sessions(list(persons)), 0.2, seed)
        assert 1 <= len(val) <= 2 and {persons[i] for i in train}.isdisjoint(persons[i] for i in val)


@pytest.mark.parametrize("form", ["tiled", "per-frame"])
def test_history_is_dropped_frame_by_frame(laid_out, form):
    """A frame's controls are dropped wherever they stand in the window, or nowhere."""
    session = {name: array.copy() for name, array in laid_out[0][0].items()}
    session["controls"][:, 0] = 1 + np.arange(50)  # who is who
    data = lay_out([session])
    torch.manual_seed(0)
    x = ct.gather_windows(data, all_rows(data)[45:46], form, history_dropout=0.5)[0]
    found = x[0, :, 531:].view(30, 5, 28)[:, :, 0].numpy()
    for i in range(30):
        for k in range(5):
            whose = 1 + (45 if form == "tiled" else 16 + i) - 5 + k
            dropped = not (found == whose).any()
            assert found[i, k] == (0 if dropped else whose)
    assert 0 < (found == 0).mean() < 1


def test_one_session_is_split_by_time_with_a_gap():
    train, val = ct.split_frames([200], [0], [], 0.2)
    assert train == {0: (0, 160)} and val == {0: (195, 200)}  # 35 frames between: no window sees both
    train, val = ct.split_frames([40, 400], [0, 1], [], 0.2)
    assert train == {0: (0, 32), 1: (0, 320)} and val == {1: (355, 400)}


def test_frames_of_a_split_by_session():
    train, val = ct.split_frames([10, 20, 5], [0, 2], [1], 0.2)
    assert train == {0: (0, 10), 2: (0, 5)} and val == {1: (0, 20)}


# rows of an epoch, augmentations --------------------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [1, 4])
def test_an_epoch_has_every_row_once(stride):
    rows, args, n = torch.arange(100, 200), ct.Args(stride=stride, seed=4), 100 // stride
    epochs = [ct.epoch_rows(rows, n, args, epoch).tolist() for epoch in range(stride)]
    assert sorted(sum(epochs, [])) == rows.tolist()  # with a stride, each epoch has other rows
    assert ct.epoch_rows(rows, n, args, 0).tolist() == epochs[0] != sorted(epochs[0])
    assert ct.epoch_rows(rows, n, ct.Args(stride=stride, seed=5), 0).tolist() != epochs[0]


def test_a_share_of_an_epoch_is_drawn_from_the_rich_rows():
    rows, rich = torch.arange(2000), torch.arange(0, 2000, 100)
    order = ct.epoch_rows(rows, 2000, ct.Args(curriculum_share=0.5), 0, rich)
    assert len(order) == 2000 and np.isin(order, rich).mean() == pytest.approx(0.5, abs=0.05)


SETTINGS = {"mirror": 0.0, "noise": 0.0, "time_warp": 0.0, "hand_dropout": 0.0}


def augmented(session: dict, seed: int = 0, **settings) -> tuple[dict, np.ndarray]:
    return ct.augment_session(session, SETTINGS | settings, np.random.default_rng(seed))


def test_augmentations_that_are_off_change_nothing():
    session = session_arrays(40)
    same, usable = augmented(session)
    assert usable.all() and all((same[name] == session[name]).all() for name in ("frames", "controls", "game_state"))


def test_augmentations_leave_the_session_as_it_was():
    session, before = session_arrays(60), session_arrays(60)
    augmented(session, mirror=1.0, noise=0.01, time_warp=0.2, hand_dropout=0.5)
    assert all((session[name] == before[name]).all() for name in before)


def test_the_mirror_image():
    session = session_arrays(60)
    x, (other, usable) = session["frames"], augmented(session, mirror=1.0)
    y, pose, flipped = other["frames"], x[:, :99].reshape(60, 33, 3), other["frames"][:, :99].reshape(60, 33, 3)
    partner = [0, 4, 5, 6, 1, 2, 3, 8, 7, *(i + 1 if i % 2 else i - 1 for i in range(9, 33))]
    for landmark in range(33):
        np.testing.assert_array_equal(flipped[:, landmark], pose[:, partner[landmark]] * [-1, 1, 1])
        np.testing.assert_array_equal(y[:, 227 + landmark], x[:, 227 + partner[landmark]])
    signs = np.tile([-1, 1, 1], 21)
    np.testing.assert_array_equal(y[:, 99:162], x[:, 162:225] * signs)
    np.testing.assert_array_equal(y[:, 162:225], x[:, 99:162] * signs)
    np.testing.assert_array_equal(y[:, [225, 226]], x[:, [226, 225]])
    controls, state = session["controls"].copy(), session["game_state"].copy()
    controls[:, [2, 3]], controls[:, 9], state[:, 34] = controls[:, [3, 2]], -controls[:, 9], -state[:, 34]
    np.testing.assert_array_equal(other["controls"], controls)
    np.testing.assert_array_equal(other["game_state"], state)
    assert usable.tolist() == [True] * 30 + [False] * 30  # the screen opens at frame 30: its cursor is not mirrored
    twice = augmented(other, mirror=1.0)[0]
    assert all((twice[name] == session[name]).all() for name in twice)


def test_windows_with_an_open_screen_are_not_mirrored():
    session = session_arrays(100)
    session["game_state"][:, 38] = 0
    session["game_state"][40, 38] = 0.33
    usable = augmented(session, mirror=1.0)[1]
    assert np.flatnonzero(~usable).tolist() == list(range(40, 70))


@pytest.mark.parametrize("speed", [0.5, 0.8, 1.0, 1.2, 1.5])
def test_a_warp_keeps_every_pulse_and_the_order(speed):
    n = 120
    controls, state = frames_of(n)
    pulses = list(range(7, 80, 9))
    controls[pulses, 7] = 1
    state[:, 36] = np.arange(n) / n
    frames = np.repeat(np.arange(n, dtype=np.float32)[:, None], 260, 1)
    warped, kept, states = ct.warp(frames, controls, state, speed, 3)
    assert len(warped) == len(kept) == len(states) == min(n, int((n - 1 - 3) / speed) + 1)
    np.testing.assert_allclose(warped[:, 0], 3 + speed * np.arange(len(warped)), rtol=1e-5)
    pulses = [pulse for pulse in pulses if pulse < warped[-1, 0] - 1]
    onset = np.flatnonzero(np.diff(np.r_[0, kept[:, 7]]) > 0)[: len(pulses)]
    assert len(onset) == len(pulses)
    assert np.abs(3 + speed * onset - pulses).max() <= max(1, speed)  # each where it was
    assert np.abs(states[:, 36] * n - warped[:, 0]).max() <= 0.5 + 1e-3


def test_a_warped_session_is_no_longer_than_it_was():
    session = session_arrays(200)
    lengths = [len(augmented(session, seed, time_warp=0.2)[0]["frames"]) for seed in range(40)]
    assert max(lengths) <= 200 and min(lengths) >= 200 / 1.2 - 2 and len(set(lengths)) > 5
    for seed in range(5):
        part, usable = augmented(session, seed, time_warp=0.2)
        assert len(part["frames"]) == len(part["controls"]) == len(part["game_state"]) == len(usable)


def test_noise_leaves_absent_landmarks_alone():
    session = session_arrays(300)
    session["frames"][:, 99:162] = 0  # a hand that was never seen
    noisy = augmented(session, noise=0.005)[0]
    difference = noisy["frames"] - session["frames"]
    assert (difference[:, 99:162] == 0).all() and (difference[:, 225:] == 0).all()
    assert np.delete(difference[:, :225], slice(99, 162), 1).std() == pytest.approx(0.005, rel=0.05)
    assert (noisy["controls"] == session["controls"]).all() and (noisy["game_state"] == session["game_state"]).all()


def test_a_dropped_hand_is_an_absent_hand():
    session = session_arrays(3000)
    frames, gone = augmented(session, hand_dropout=0.25)[0]["frames"], []
    for columns, flag in ((slice(99, 162), 225), (slice(162, 225), 226)):
        lost = (frames[:, columns] == 0).all(1)
        assert (frames[~lost, columns] == session["frames"][~lost, columns]).all() and (frames[lost, flag] == 0).all()
        gone.append(lost.mean())
    assert gone == pytest.approx([0.25, 0.25], abs=0.15)
    untouched = [*range(99), *range(227, 260)]
    assert (frames[:, untouched] == session["frames"][:, untouched]).all()


@pytest.mark.parametrize("times", [np.arange(60) * 1000 / 30, np.zeros(60)])
def test_timestamps_that_disagree_with_the_rate(tmp_path, times):
    path = write_session(tmp_path, n=60, timestamps=times)
    with pytest.raises(
        ValueError, match="session_001.npz: timestamps span .* for 60 frames, expected seconds at the fps"
    ):
        ct.load_session(path)


def test_sessions_of_two_rates_are_refused(tmp_path):
    times = np.arange(60) / 10
    paths = [write_session(tmp_path, 1), write_session(tmp_path, 2, timestamps=times, fps=np.float32(10))]
    with pytest.raises(ValueError, match="session_002.npz has 10 frames a second, .*session_001.npz has 30"):
        ct.check_sessions(paths, False)


def test_what_cannot_be_opened_is_left_out_too(tmp_path):
    (tmp_path / "session_002.npz").mkdir()
    (tmp_path / "session_003.npz").symlink_to(tmp_path / "gone")
    write_session(tmp_path, 1)
    sessions, problems = ct.check_sessions(ct.find_sessions(tmp_path), True)
    assert len(sessions) == 1 and len(problems) == 2 and "session_003.npz" in problems[1]


@pytest.mark.parametrize("fault", ["NaN", "cut off"])
def test_bad_sessions_are_left_out_only_when_asked(tmp_path, fault):
    paths = [write_session(tmp_path, i, n=40, seed=i) for i in (1, 2, 3)]
    if fault == "NaN":
        write_session(tmp_path, 2, n=40, **{"timestamps": np.r_[np.nan, np.arange(39)]})
    else:
        paths[1].write_bytes(paths[1].read_bytes()[:5000])
    with pytest.raises(ValueError, match="session_002.npz"):
        ct.check_sessions(paths, False)
    sessions, problems = ct.check_sessions(paths, True)
    assert [session["path"] for session in sessions] == [paths[0], paths[2]] and [s["frames"] for s in sessions] == [
        40,
        40,
    ]
    assert len(problems) == 1 and str(paths[1]) in problems[0]
    data = ct.lay_out(sessions, PLAIN, "cpu")
    x, real, controls, _ = ct.gather_windows(data, data.rows({1: (0, 40)}))
    third = session_arrays(40, 3)
    for end in range(40):
        rows, expected = naive_window(third, end)
        assert real[end].tolist() == expected
        np.testing.assert_allclose(x[end][real[end]], [row for row in rows if row], **HALF)
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="session_00"):
        ct.check_sessions(paths, True)


def test_every_epoch_is_augmented_anew_from_the_files(tmp_path):
    """What was written over is the recording again; features are normalised, labels follow."""
    paths = [write_session(tmp_path, i, n=60, seed=i) for i in (1, 2)]
    sessions, problems = ct.check_sessions(paths, False)
    data = ct.lay_out(sessions, ct.feature_scale(paths, {0: (0, 60), 1: (0, 60)}, 10.0), "cpu")
    assert problems == [] and data.lengths == [60, 60]
    plain = data.features.clone()
    frames = {0: (0, 60), 1: (0, 40)}
    first = ct.augment_recordings(data, frames, SETTINGS | {"noise": 0.01}, 1, 0)
    assert len(first) == 100 and not torch.equal(data.features, plain)
    noisy = data.features.clone()
    again = ct.augment_recordings(data, frames, SETTINGS | {"noise": 0.01}, 1, 0)
    assert torch.equal(data.features, noisy) and torch.equal(first, again)
    ct.augment_recordings(data, frames, SETTINGS | {"noise": 0.01}, 1, 1)
    assert not torch.equal(data.features, noisy)
    mirrored = ct.augment_recordings(data, frames, SETTINGS | {"mirror": 1.0}, 1, 0)
    assert len(mirrored) == 30 + 30  # no window with an open screen
    ct.augment_recordings(data, frames, SETTINGS, 1, 0)
    assert torch.equal(data.features, plain)


# what the training loop is made of ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_head_losses_read_the_right_columns(kind):
    b = make_batch(kind)
    controls = torch.zeros(len(b["screen"]), 28)
    controls[:, list(ACTIONS)], controls[:, 9:11], controls[:, 23:25] = (
        b["actions"],
        b["look_targets"],
        b["cursor_targets"],
    )
    controls[:, 25:] = b["inv_targets"]
    for i, slot in enumerate(b["hotbar_targets"].tolist()):
        controls[i, 14:23] = torch.arange(9) == slot
    assert torch.equal(ct.hotbar_target(controls), b["hotbar_targets"])
    out = {"action_logits": b["action_logits"], "look": b["look"], "hotbar_logits": b["hotbar_logits"]}
    out |= {"cursor": b["cursor"], "inv_click_logits": b["inv_logits"]}
    positives = b["pos_weights"], b["inv_pos_weights"]
    losses, shares = ct.head_losses(out, controls, b["screen"], positives, inventory_always=False)
    expected = naive_losses(b)[0]
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert {n: float(s) for n, s in shares.items()} == pytest.approx({n: float(s) for n, s in fractions_of(b).items()})


@pytest.mark.parametrize("norm", ["seed", "masked-mean"])
def test_the_effective_weights_are_those_of_the_plain_means(norm):
    b = make_batch("mixed")
    fractions, (_, means) = fractions_of(b), naive_losses(b)
    weights = {name: float(w) for name, w in ct.effective_weights(fractions, WEIGHTS, norm).items()}
    total = float(ct.combined_loss(script_losses(b), fractions, WEIGHTS, norm))
    assert sum(weights[name] * means[name] for name in LOSSES) == pytest.approx(total, rel=1e-5)
    assert weights["action"] == pytest.approx(float(fractions["gameplay"]) ** 2 if norm == "seed" else 1)


def test_the_learning_rate():
    args = ct.Args(epochs=50, warmup_epochs=5, learning_rate=1e-3)
    rates = [ct.learning_rate_at(update, 10, args) for update in range(500)]
    assert max(rates) == pytest.approx(1e-3) and rates[49] == pytest.approx(1e-3)
    assert 0 < rates[0] <= 1e-3 / 50 + 1e-9 and rates[9] == pytest.approx(2e-4)
    assert rates[:50] == sorted(rates[:50]) and rates[49:] == sorted(rates[49:], reverse=True)
    half = 49 + 225
    assert rates[half] == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-3) and rates[-1] == pytest.approx(1e-6, rel=1e-3)
    assert all(rate > 0 for rate in (ct.learning_rate_at(u, 1, ct.Args(epochs=3, warmup_epochs=5)) for u in range(3)))
    assert ct.learning_rate_at(0, 1, ct.Args(epochs=3, warmup_epochs=0)) > 0


def test_thresholds_are_tuned_where_a_control_counts(laid_out):
    sessions, data, _ = laid_out
    rng, rows = np.random.default_rng(2), all_rows(data)
    outputs = {"probs": rng.random((90, 12)).astype(np.float32), "inv": rng.random((90, 3)).astype(np.float32)}
    thresholds, positives = ct.tune_thresholds(outputs, data, rows)
    controls, state = (np.concatenate([s[name] for s in sessions]) for name in ("controls", "game_state"))
    gameplay = state[:, 38] <= 0
    true = controls[:, list(ACTIONS)][gameplay]
    expected = naive_thresholds(outputs["probs"][gameplay], true, true.sum(1) == 0)
    clicks = controls[:, 25:][~gameplay]
    expected += naive_thresholds(outputs["inv"][~gameplay], clicks, np.zeros(len(clicks), bool))
    assert thresholds.tolist() == pytest.approx(expected)
    assert positives["jump"] == true[:, 6].sum() and positives["inv_shift_held"] == clicks[:, 2].sum()


def test_closing_a_screen_weighs_what_it_is(laid_out):
    """With plain means, the twelfth action's frames with a screen count as those without."""
    torch.manual_seed(0)
    out = {"action_logits": torch.zeros(64, 12), "look": torch.zeros(64, 2), "hotbar_logits": torch.zeros(64, 9)}
    out |= {"cursor": torch.zeros(64, 2), "inv_click_logits": torch.zeros(64, 3)}
    weights = dict.fromkeys(LOSSES, 0.0) | {"action": 1.0}
    for gameplay in (1, 32, 63):
        screen = torch.arange(64) >= gameplay
        losses, shares = ct.head_losses(out, torch.zeros(64, 28), screen, (torch.ones(12), torch.ones(3)), True)
        assert float(ct.combined_loss(losses, shares, weights, "masked-mean")) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("n", range(2, 9))
def test_metrics_of_a_few_frames(n):
    controls, state = frames_of(n)
    controls[-1, 14] = 1
    metrics = ct.control_metrics(ct.outputs_of(controls), controls, state)
    assert metrics["hotbar_accuracy"] == 1 and metrics["false_hotbar_per_minute"] == 0


def test_outputs_that_are_not_finite_have_no_score():
    controls, state = frames_of(20)
    outputs = ct.outputs_of(controls)
    assert np.isfinite(ct.control_metrics(outputs, controls, state)["score"])
    metrics = ct.control_metrics(outputs | {"look": np.full((20, 2), np.nan)}, controls, state)
    assert np.isnan(metrics["score"]) and np.isnan(metrics["score_present"])


def test_events_match_as_in_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        session = np.cumsum(rng.random(40) < 0.1)
        predicted, true = rng.random((2, 40)) < 0.3
        early, late = rng.integers(0, 4, 2)
        free, hits = list(np.flatnonzero(predicted)), 0
        for t in np.flatnonzero(true):
            near = [p for p in free if t - early <= p <= t + late and session[p] == session[t]]
            hits += len(near) > 0
            free = [p for p in free if p != near[0]] if near else free
        expected = 2 * hits / max(1, predicted.sum() + true.sum())
        assert motion_metrics.event_f1(predicted, true, session, early, late) == pytest.approx(expected)


def test_baselines():
    controls, _ = frames_of(6)
    controls[:, 0], controls[2, 16] = np.arange(6) / 10, 1
    before = np.roll(controls, 1, axis=0) * ~np.array([True, False, False, True, False, False])[:, None]
    players = ct.baseline_outputs(controls, before)
    assert (players["do_nothing"]["probs"] == 0).all() and (players["do_nothing"]["cursor"] == 0.5).all()
    np.testing.assert_allclose(players["repeat_last"]["probs"][:, 0], [0, 0, 0.1, 0, 0.3, 0.4])
    assert players["repeat_last"]["hotbar"][:, 2].tolist() == [0, 0, 0, 0, 0, 0]  # row 2's is over where row 3 begins
    assert (players["always_on"]["probs"] == 1).all() and (players["always_on"]["look"] == 0).all()
    assert (players["always_on"]["cursor"] == 0.5).all()
    np.testing.assert_allclose(players["random"]["probs"][:, 0], [0.3, 0.4, 0.5, 0, 0.1, 0.2])


def test_the_stages_of_the_curriculum(network, laid_out):
    _, data, _ = laid_out
    rows, seen, added = all_rows(data), [], [{*range(7), 9, 10}, {7, 8, 11, 12}, {13, *range(14, 28)}]
    for stage in range(3):
        columns = ct.open_stage(network, stage)
        assert columns == set().union(*added[: stage + 1])
        touched = (data.controls[rows][:, sorted(added[stage])].abs() > 0.08).any(1)
        assert torch.equal(ct.rich_rows(data, rows, stage), rows[touched])
        trained = {name: {p.requires_grad for p in head.parameters()} for name, head in network.heads.items()}
        seen.append({name for name in trained if trained[name] == {True}})
        weights = ct.loss_weights(ct.Args(), columns)
        assert {name for name in network.heads if weights[name] > 0} == seen[-1]
    assert seen == [{"action", "look"}, {"action", "look"}, {"action", "look", "hotbar", "cursor", "inv"}]
    network.requires_grad_(True)


def test_a_stage_counts_only_its_actions():
    b = make_batch("mixed")
    controls = torch.zeros(24, 28)
    controls[:, list(ACTIONS)] = b["actions"]
    out = {"action_logits": b["action_logits"], "look": b["look"], "hotbar_logits": b["hotbar_logits"]}
    out |= {"cursor": b["cursor"], "inv_click_logits": b["inv_logits"]}
    positives, chosen = (b["pos_weights"], b["inv_pos_weights"]), list(range(7))
    losses, _ = ct.head_losses(out, controls, b["screen"], positives, False, chosen)
    expected = ct.action_loss(b["action_logits"][:, :7], b["actions"][:, :7], b["gameplay"], b["pos_weights"][:7])
    torch.testing.assert_close(losses["action"], expected)


# the policy -----------------------------------------------------------------------------------------------------------
class Engine:
    """Stands in for the network: puts out what its attributes say and keeps what it was given."""

    def __init__(self):
        self.probs, self.look, self.hotbar = np.zeros(12), np.zeros(2), np.full(9, 1 / 9)
        self.cursor, self.inv, self.seen = np.full(2, 0.5), np.zeros(3), []

    def __call__(self, x, mask):
        self.seen.append((x.copy(), mask.copy()))
        return [np.float32(out)[None] for out in (self.probs, self.look, self.hotbar, self.cursor, self.inv)]

    def slot(self, slot: int, confidence: float):
        self.hotbar = np.full(9, (1 - confidence) / 8)
        self.hotbar[slot] = confidence


class Player:
    """A policy with an `Engine`, stepped at 30 frames a second."""

    def __init__(self, **settings):
        self.engine, self.t, self.state = Engine(), 100.0, np.zeros(46, np.float32)
        self.policy = ct.ControlPolicy(
            ct.make_config(ct.Args(**settings), PLAIN, 30.0, np.full(15, 0.5), {}), self.engine
        )

    def step(self, frame=None, state=None) -> np.ndarray:
        self.t += 1 / 30
        frame = np.ones(260, np.float32) if frame is None else frame
        return self.policy.step(frame, self.state if state is None else state, self.t)

    def steps(self, n: int) -> np.ndarray:
        return np.stack([self.step() for _ in range(n)])

    def press(self, name: str, prob: float):
        column = COLUMN[name]
        if column in ACTIONS:
            self.engine.probs[ACTIONS.index(column)] = prob
        else:
            self.engine.inv[column - 25] = prob


@pytest.mark.parametrize("form", ["tiled", "per-frame"])
def test_the_policy_sees_the_window_that_training_sees(form):
    """Through two turns of the rings: frames, velocities, states, and its own controls as history."""
    player, rng, controls = Player(history_form=form), np.random.default_rng(0), []
    frames = rng.normal(0, 0.5, (130, 260)).astype(np.float32)
    states = rng.random((130, 46)).astype(np.float32)
    states[:, 38] = 0
    states[60:75, 38] = 0.33
    for t in range(130):
        player.engine.probs[:] = 0
        player.engine.probs[[0, 1, 2, 3, 4, 5, 8]] = rng.random(7)  # no pulses: they are down for longer than sent
        player.engine.look, player.engine.cursor = rng.uniform(-1, 1, 2), rng.random(2)
        player.engine.inv[2] = rng.random()
        controls.append(player.step(frames[t], states[t]))
    session = {"frames": frames, "game_state": states, "controls": np.array(controls)}
    assert np.abs(session["controls"]).sum() > 100
    for t, (x, mask) in enumerate(player.engine.seen):
        rows, real = naive_window(session, t, form=form)
        assert x.shape == (1, 30, 671) and mask[0].tolist() == real
        for i in range(30):
            if real[i]:
                np.testing.assert_allclose(x[0, i], rows[i], rtol=1e-5, atol=1e-6)


def test_held_controls_have_hysteresis():
    player = Player()
    pressed = []
    for prob in (0.2, 0.7, 0.47, 0.47, 0.44, 0.47, 0.53, 0.7):
        player.press("move_forward", prob)
        pressed.append(player.step()[0])
    assert pressed[:6] == [0, 1, 1, 1, 0, 0] and pressed[7] == 1


def test_each_control_has_its_own_threshold():
    thresholds = np.full(15, 0.5)
    thresholds[[4, 8]] = 0.2, 0.85
    player = Player()
    player.policy = ct.ControlPolicy(ct.make_config(ct.Args(), PLAIN, 30.0, thresholds, {}), player.engine)
    for name in ("sprint", "use_item", "sneak"):
        player.press(name, 0.4)
    assert np.flatnonzero(player.step()).tolist() == [COLUMN["sprint"]]
    for name in ("use_item", "sneak"):
        player.press(name, 0.75)
    assert np.flatnonzero(player.step()).tolist() == [COLUMN["sprint"], COLUMN["sneak"]]


@pytest.mark.parametrize("name", ["jump", "attack", "drop_item", "swap_offhand", "open_inventory"])
def test_a_pulse_fires_once_and_not_again_at_once(name):
    player, column = Player(), COLUMN[name]
    player.step()
    player.press(name, 0.9)
    assert player.steps(30)[:, column].tolist() == [1] + [0] * 29
    fired = []
    for _ in range(4):  # down for a frame, up for a frame
        for prob in (0.1, 0.9):
            player.press(name, prob)
            fired.append(player.step()[column])
    assert sum(fired) == 1 and fired[1] == 1  # the others come within its cooldown
    player.press(name, 0.1)
    player.steps(15)
    player.press(name, 0.9)
    assert player.step()[column] == 1


def test_a_held_control_stays_down():
    player = Player()
    player.press("use_item", 0.9)
    player.press("sneak", 0.9)
    assert (player.steps(40)[:, [COLUMN["use_item"], COLUMN["sneak"]]] == 1).all()


def test_the_history_of_a_pulse_is_the_key_as_recorded():
    """A recording holds a pulse as long as the key is down; so does the policy's own history."""
    player = Player()
    player.press("jump", 0.9)
    player.steps(7)
    history = player.engine.seen[-1][0][0, -1, 531:].reshape(5, 28)
    assert (history[:, COLUMN["jump"]] == 1).all()


def test_a_slow_steady_look_gets_through():
    player = Player()
    player.engine.look = np.array([0.1, -0.1])
    look = player.steps(40)[:, 9:11]
    assert np.abs(look[-1] - player.engine.look).max() < 1e-3
    assert ((look == 0) | (np.abs(look) >= 0.08)).all()
    player.engine.look = np.array([0.05, 0.5])
    look = player.steps(60)[:, 9:11]
    assert look[-1, 0] == 0 and look[-1, 1] == pytest.approx(0.5, abs=1e-3)  # the deadzone is per axis


def test_the_look_is_smoothed():
    player = Player()
    player.step()
    player.engine.look = np.array([1.0, 0.0])
    expected = [1 - 0.65 ** (i + 1) for i in range(10)]
    np.testing.assert_allclose(player.steps(10)[:, 9], expected, rtol=1e-5)
    assert np.abs(player.policy.controls[9:11]).max() <= 1


def test_a_slot_needs_confidence_and_a_change():
    player = Player()
    player.engine.slot(4, 0.49)
    assert not player.steps(10).any()
    player.engine.slot(4, 0.9)
    fired = player.step()
    assert np.flatnonzero(fired).tolist() == [14 + 4] and fired[18] == 1
    assert not player.steps(3).any()  # not every frame
    player.state[44] = 4 / 8  # the game has followed
    assert not player.steps(40).any()


def test_slot_one_can_be_chosen_and_is_no_default():
    player = Player()
    player.state[44] = 1.0
    player.engine.slot(0, 0.9)
    assert np.flatnonzero(player.step()).tolist() == [14]
    player = Player()
    player.engine.slot(0, 0.9)  # slot 1 is what the game is at
    assert not player.steps(20).any()


def everything_pressed(player: Player):
    player.engine.probs[:], player.engine.inv[:] = 0.9, 0.9
    player.engine.look, player.engine.cursor = np.array([0.9, -0.9]), np.array([0.25, 0.75])
    player.engine.slot(5, 0.9)


def test_three_frames_without_controls_at_a_screen_change():
    player = Player()
    everything_pressed(player)
    before = player.steps(5)
    assert (before[-1, [0, 8]] == 1).all() and before[-1, 9] > 0.5 and not before[:, 23:].any()
    player.state[38] = 0.33  # the lowest value of an open screen
    assert not player.steps(3).any()
    opened = player.steps(10)
    assert not opened[:, :23].any()
    np.testing.assert_allclose(opened[:, 23:25], np.tile([0.25, 0.75], (10, 1)), atol=1e-6)
    assert opened[:, 25].tolist() == [1] + [0] * 9 and opened[:, 27].tolist() == [1] * 10
    player.state[38] = 0
    assert not player.steps(3).any()
    closed = player.steps(3)
    assert (closed[:, 0] == 1).all() and not closed[:, 23:].any()
    assert closed[0, 9] < 0.9 * 0.36  # the look begins at rest again


def test_a_screen_that_flickers_keeps_everything_released():
    player = Player()
    everything_pressed(player)
    player.steps(2)
    for flag in (1, 1, 0, 0.66, 0.66):
        player.state[38] = flag
        assert not player.step().any()
    assert not player.step().any() and player.step().any()


def test_a_session_that_begins_with_an_open_screen():
    player = Player()
    everything_pressed(player)
    player.state[38] = 1
    controls = player.steps(6)
    assert not controls[:, :23].any() and controls[-1, 27] == 1


@pytest.mark.parametrize("always", [False, True])
def test_open_inventory_while_a_screen_is_open(always):
    player = Player(open_inventory_always=always)
    player.state[38] = 0.33
    player.steps(5)
    everything_pressed(player)
    assert player.step()[COLUMN["open_inventory"]] == always


def test_reset_forgets_everything():
    player, fresh = Player(), Player()
    for one in (player, fresh):
        everything_pressed(one)
    rng = np.random.default_rng(0)
    for _ in range(40):
        player.step(rng.normal(size=260).astype(np.float32))
    player.policy.reset()
    assert not player.policy.controls.any()
    frames = rng.normal(size=(40, 260)).astype(np.float32)
    for frame in frames:
        np.testing.assert_array_equal(player.step(frame), fresh.step(frame))
        (x, mask), (y, other) = player.engine.seen[-1], fresh.engine.seen[-1]
        assert (mask == other).all() and (x[mask] == y[mask]).all()


def test_a_state_that_stops_coming_releases_everything():
    player = Player()
    everything_pressed(player)
    player.steps(40)
    held = [player.policy.step(np.ones(260), None, player.t + i / 30) for i in range(1, 31)]
    assert all(controls[0] == 1 for controls in held[:14]) and not np.any(held[15:])
    player.t += 1
    assert player.step()[0] == 1 and player.engine.seen[-1][1].sum() == 1  # begins anew


def test_a_gap_in_time_begins_a_new_window():
    player = Player()
    player.steps(40)
    player.t += 0.6
    player.step()
    assert player.engine.seen[-1][1].sum() == 1
    player.t += 0.4  # shorter than the timeout
    player.step()
    assert player.engine.seen[-1][1].sum() == 2


def test_a_person_who_is_gone_releases_everything():
    player = Player()
    everything_pressed(player)
    player.steps(5)
    assert not player.policy.step(None, player.state, player.t + 1 / 30).any()
    assert not player.policy.controls.any()


def test_a_person_who_flickers_does_not_repeat_a_pulse():
    player = Player()
    player.press("open_inventory", 0.9)
    pressed = []
    for t in range(12):  # seen on every second frame
        frame = np.ones(260, np.float32) if t % 2 == 0 else None
        player.t += 1 / 30
        pressed.append(player.policy.step(frame, player.state, player.t)[COLUMN["open_inventory"]])
    assert pressed == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]  # again after 0.3 s


def test_a_screen_that_opens_while_nobody_is_seen_is_noticed():
    player = Player()
    player.press("inv_shift_held", 0.9)
    player.steps(2)
    player.state[38] = 1
    player.policy.step(None, player.state, player.t)
    assert player.steps(5)[:, COLUMN["inv_shift_held"]].tolist() == [0, 0, 0, 1, 1]


def test_the_state_outlives_a_frame_without_a_person():
    player = Player()
    player.press("move_forward", 0.9)
    frame, forward = np.ones(260, np.float32), []
    for t, (seen, state) in enumerate(
        [(frame, player.state), (frame, None), (None, None), (frame, None), (frame, None)]
    ):
        forward.append(player.policy.step(seen, state, 100 + t / 30)[0])
    assert forward == [1, 1, 0, 1, 1]


def faults() -> dict:
    """What a step may be given that it cannot act on: frame, state, seconds since the last step."""
    frame, state = np.ones(260, np.float32), np.zeros(46, np.float32)
    holes = frame.copy(), state.copy()
    holes[0][100], holes[1][11] = np.nan, np.inf
    return {
        "NaN in the frame": (holes[0], state, 0.03),
        "infinity in the state": (frame, holes[1], 0.03),
        "a short frame": (frame[:259], state, 0.03),
        "a frame of one number": (frame[:1], state, 0.03),
        "a long state": (frame, np.zeros(47), 0.03),
        "a state of one number": (frame, state[:1], 0.03),
        "time that goes back": (frame, state, -0.03),
        "no time": (frame, state, np.nan),
    }


@pytest.mark.parametrize("fault", faults())
def test_an_error_releases_everything(fault):
    player = Player()
    everything_pressed(player)
    player.steps(5)
    frame, state, seconds = faults()[fault]
    with pytest.raises(ValueError):
        player.policy.step(frame, state, player.t + seconds)
    assert not player.policy.controls.any()
    player.t += 1 / 30
    assert player.step()[0] == 1 and player.engine.seen[-1][1].sum() == 1  # and the next good frame begins anew


def test_an_error_of_the_network_releases_everything():
    player = Player()
    everything_pressed(player)
    player.steps(5)

    def broken(x, mask):
        raise RuntimeError("out of memory")

    player.policy.engine = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        player.step()
    assert not player.policy.controls.any()


def test_outputs_that_are_not_numbers_release_everything():
    player = Player()
    everything_pressed(player)
    player.steps(5)
    player.engine.look = np.array([np.nan, 0.0])
    with pytest.raises(ValueError):
        player.step()
    assert not player.policy.controls.any()
    player.engine.look = np.zeros(2)
    assert player.step().max() == 1 and np.isfinite(player.step()).all()


def test_controls_that_were_given_out_do_not_change():
    player = Player()
    everything_pressed(player)
    first = player.step()
    kept = first.copy()
    player.policy.reset()
    assert first.dtype == np.float32 and first.shape == (28,) and (first == kept).all()
    outputs = player.policy.outputs
    assert {name: x.shape for name, x in outputs.items()} == {
        "probs": (12,),
        "look": (2,),
        "hotbar": (9,),
        "cursor": (2,),
        "inv": (3,),
    }
    np.testing.assert_allclose(outputs["hotbar"], player.engine.hotbar, rtol=1e-6)


def test_a_step_allocates_no_windows():
    player, frame = Player(), np.ones(260, np.float32)
    outputs = player.engine(np.zeros(1), np.zeros(1))
    player.policy.engine = lambda x, mask: outputs
    player.steps(40)
    tracemalloc.start()
    for _ in range(20):
        player.step(frame)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000  # a window is 80,000 bytes, a frame 1,040


# a policy on disk -----------------------------------------------------------------------------------------------------
SMALL = {"d_model": 32, "nhead": 4, "num_layers": 2, "dim_feedforward": 32, "dropout": 0.1, "learnable_decay": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, laid_out):
    """A folder with a small policy that keeps its hands still: its own history stays empty."""
    root, (_, _, scale) = tmp_path_factory.mktemp("saved"), laid_out
    for folder in ("run", "models"):
        (root / folder).mkdir()
    torch.manual_seed(3)
    network = ct.ControlTransformer(**SMALL).eval()
    best = {"model": network.state_dict(), "network": SMALL, "feature_mean": scale.mean, "feature_std": scale.std}
    best |= {
        "feature_clip": scale.clip,
        "epoch": 1,
        "score": 0.5,
        "script": "controls_transformer.py",
        "run_dir": "run",
    }
    config = ct.make_config(ct.Args(**SMALL), scale, 30.0, np.full(15, 2.0), {})
    config["look_deadzone"], config["post_processing"]["hotbar_min_confidence"] = 9.0, 2.0
    assert ct.write_policy(root / "run", ct.Args(model_dir=str(root / "models")), best, config, []) < 1e-4
    assert sorted(path.name for path in (root / "models").iterdir()) == [
        "control_config.json",
        "control_policy.onnx",
        "control_policy.pt",
        "controls_transformer.py",
        "controls_transformer_args.json",
        "training_log.json",
    ]
    return root / "models", network


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_a_saved_policy_does_what_the_network_does_in_training(saved, laid_out, engine):
    """Frame by frame, left padding included, the policy's outputs are those of `gather_windows` and the network."""
    (folder, network), (sessions, data, scale) = saved, laid_out
    policy = ct.ControlPolicy.load(folder, engine=engine)
    session = dict(sessions[0])
    session["game_state"] = np.where(np.arange(46) == 38, 0, session["game_state"]).astype(np.float32)
    data = lay_out([session], scale)
    x, real, _, _ = ct.gather_windows(data, all_rows(data), "tiled", history_dropout=1.0)
    with torch.no_grad():
        expected = ct.as_arrays(network(x, real))
    for t in range(50):
        controls = policy.step(session["frames"][t], session["game_state"][t], session["timestamps"][t])
        assert not controls.any()
        for name, output in policy.outputs.items():
            np.testing.assert_allclose(output, expected[name][t], rtol=1e-3, atol=5e-4, err_msg=name)


def test_the_config_has_every_specified_key(saved):
    config = json.loads((saved[0] / "control_config.json").read_text())
    specified = {"version": 2, "input_dim": 671, "max_seq_len": 30, "num_action_controls": 12, "num_look_controls": 2}
    specified |= {"num_hotbar_slots": 9, "num_cursor_controls": 2, "num_inv_controls": 3, "action_history_length": 5}
    specified |= {"look_smoothing_alpha": 0.35, "game_state_dim": 46, "action_history_dropout": 0.3, "d_model": 32}
    specified |= {"nhead": 4, "num_layers": 2, "dim_feedforward": 32, "dropout": 0.1}
    assert {name: config[name] for name in specified} == specified
    assert (
        config["control_names"] == list(ct.CONTROLS)
        and len(config["feature_mean"]) == len(config["feature_std"]) == 671
    )
    assert set(config["thresholds"]) == {ct.CONTROLS[c] for c in (*ACTIONS, 25, 26, 27)}
    assert "training" in config and json.loads((saved[0] / "training_log.json").read_text()) == []
    defaults = ct.make_config(ct.Args(), PLAIN, 30.0, np.full(15, 0.5), {})
    assert (defaults["d_model"], defaults["nhead"], defaults["num_layers"], defaults["dim_feedforward"]) == (
        256,
        8,
        6,
        512,
    )
    assert (defaults["dropout"], defaults["look_deadzone"]) == (0.3, 0.08)


def test_a_missing_policy_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="control_config.json"):
        ct.ControlPolicy.load(tmp_path)
    (tmp_path / "control_config.json").write_text((saved[0] / "control_config.json").read_text())
    with pytest.raises(FileNotFoundError, match="control_policy"):
        ct.ControlPolicy.load(tmp_path)
    (tmp_path / "control_policy.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="control_policy.pt"):
        ct.ControlPolicy.load(tmp_path, engine="torch")
