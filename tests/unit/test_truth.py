"""The comparison of labels with what the game reported, against values worked out by hand."""

import numpy as np
import pytest

from session_labels.truth import (
    CAUSES,
    Compared,
    Thresholds,
    compare_events,
    compare_with_truth,
    falls,
    membership,
    rate,
    return_scores,
    scores,
    threshold_curve,
    true_frames,
    truth_table,
)

NONE = {"DEATH": [], "ATTACK": [], "WIN": []}


def compared(times, found=NONE, true=NONE, fell=None, labels=((), {}), true_labels=((), {}), thresholds=None):
    true = {event: np.array(moments, np.int64) for event, moments in (NONE | true).items()}
    return Compared("run", "640x480", np.array(times), NONE | found, true, fell, labels, true_labels, thresholds)


def test_truth_is_matched_one_to_one():
    result = compare_with_truth(np.array([1000, 1200, 9000]), np.array([1100, 5000, 8600]), 0.5)
    assert (result["truth"], result["found"], result["hits"]) == (3, 3, 2)
    assert result["offsets_ms"] == [-100, 400]
    assert compare_with_truth(np.array([501]), np.array([0]), 0.5)["hits"] == 0
    assert compare_with_truth(np.array([500]), np.array([0]), 0.5)["hits"] == 1
    assert compare_with_truth(np.array([]), np.array([3]), 0.5)["hits"] == 0
    assert compare_with_truth(np.array([0, 1000]), np.array([1000]), 0.5)["offsets_ms"] == [0]
    assert compare_with_truth(np.array([1000]), np.array([0, 1000]), 0.5)["offsets_ms"] == [0]
    assert compare_with_truth(np.array([0, 600]), np.array([400, 500]), 0.5)["hits"] == 2


def test_wilson_against_published_values():
    assert rate(15, 20) == pytest.approx((0.75, 0.5313, 0.8881), abs=5e-4)  # Newcombe's method 3
    assert rate(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=5e-4)
    assert rate(20, 20) == pytest.approx((1.0, 0.8389, 1.0), abs=5e-4)
    assert rate(0, 0) == (None, None, None)


def test_scores_by_hand():
    metrics = scores("DEATH", {"truth": 4, "found": 3, "hits": 2, "offsets_ms": [-10, 50]})
    assert metrics["precision"] == pytest.approx((2 / 3, 0.2077, 0.9385), abs=5e-4)
    assert metrics["recall"] == pytest.approx((0.5, 0.1500, 0.8500), abs=5e-4)
    assert metrics["f1"] == (pytest.approx(4 / 7), None, None)
    errors = [metrics[f"error_{name}_ms"][0] for name in ("median", "p95", "max", "bias")]
    assert errors == pytest.approx([30, 48, 50, 20])  # of 10 and 50; 95 % of the way between them
    nothing = scores("WIN", {"truth": 0, "found": 0, "hits": 0, "offsets_ms": []})
    assert nothing["f1"] == nothing["recall"] == nothing["precision"] == (None, None, None)
    assert "error_median_ms" not in nothing


def test_table_adds_up_the_sizes():
    part = {"truth": 4, "found": 3, "hits": 2, "offsets_ms": [-10, 50]}
    rows = truth_table({("DEATH", "640x480"): part, ("DEATH", "800x600"): part | {"hits": 1, "offsets_ms": [90]}})
    assert rows.splitlines()[2:] == [
        "| DEATH | 640x480 | 4 | 3 | 2 | 1 | 0.667 (0.208 to 0.939) | 0.500 (0.150 to 0.850) | 0.571 "
        "| 30, 48, 50, +20 ms |",
        "| DEATH | 800x600 | 4 | 3 | 3 | 2 | 0.333 (0.061 to 0.792) | 0.250 (0.046 to 0.699) | 0.286 "
        "| 90, 90, 90, +90 ms |",
        "| DEATH | all | 8 | 6 | 5 | 3 | 0.500 (0.188 to 0.812) | 0.375 (0.137 to 0.694) | 0.429 "
        "| 50, 86, 90, +43 ms |",
    ]


# --- deaths by cause ---


def row(what, data):
    return {"timestamp": 0, "what": what, "data": data}


def test_who_dies_below_all_ground_fell():
    """The places are of a real recording: ground at 353.2, a step down at 385.2, the pit's end at 478."""
    walk = [
        row("pos", "96.0 353.2 0.0 0.0"),
        row("pos", "2041.0 385.2 320.0 0.0"),
        row("pos", "2147.0 470.0 90.0 600.0"),
    ]
    deaths = [row("death", "2069 353"), row("death", "2147 478"), row("death", "900 401")]
    assert falls(walk + deaths).tolist() == [False, True, False]
    assert falls(walk).tolist() == []


@pytest.mark.parametrize(
    "rows",
    [
        [row("death", "2069 353")],  # no ground
        [row("pos", "96.0 353.2 0.0 0.0"), row("death", "")],
        [row("pos", "96.0 353.2 0.0 0.0"), row("death", None)],
        [row("pos", "96.0 353.2 0.0 0.0"), row("death", "by fire")],
        [row("pos", "96.0 353.2"), row("death", "2069 353")],
    ],
)
def test_truth_without_places_tells_no_cause(rows):
    assert falls(rows) is None


def test_deaths_by_cause_have_recall_and_no_precision():
    times = np.arange(0, 20_000, 100)
    true = {"DEATH": [1000, 5000, 9000]}
    fell = np.array([False, True, True])
    results = compare_events(compared(times, {"DEATH": [11, 52, 150]}, true, fell))
    assert results["DEATH"] == {"truth": 3, "found": 3, "hits": 2, "offsets_ms": [100, 200]}
    assert results[CAUSES[0]] == {"truth": 2, "found": 1, "hits": 1, "offsets_ms": [200]}
    assert results[CAUSES[1]] == {"truth": 1, "found": 1, "hits": 1, "offsets_ms": [100]}
    assert "precision" not in scores(CAUSES[0], results[CAUSES[0]])
    assert scores(CAUSES[0], results[CAUSES[0]])["recall"][0] == 0.5
    line = truth_table({(event, "640x480"): part for event, part in results.items()}).splitlines()[4]
    assert line.startswith("| DEATH by falling | 640x480 | 2 | 1 | 1 | - | - | 0.500 (0.095 to 0.905) | - | 200,")


# --- thresholds ---


def test_curve_over_thresholds_by_hand():
    """Three of four true deaths score 0.99, 0.9 and 0.8, what is none scores 0.78."""
    times, sighted = np.arange(0, 20_000, 100), {10: 0.99, 50: 0.9, 90: 0.8, 70: 0.78}
    true = {"DEATH": [1000, 5000, 9000, 13_000]}

    def find_at(event, threshold):
        return [frame for frame, score in sighted.items() if score >= threshold]

    sessions = [
        compared(
            times, true=true, thresholds=Thresholds(["DEATH", "ATTACK"], np.array([0.853, 0.9]), [kept, 0.8], find_at)
        )
        for kept in (0.75, 0.755)
    ]
    curve = threshold_curve([*sessions, compared(times, true=true)], "DEATH")
    at = {row["threshold"]: row for row in curve}
    assert list(at) == sorted([0.755, 0.853, *(k / 100 for k in range(76, 101))])
    assert [row["true"] for row in curve] == [8] * len(curve), "the session without detections is left out"
    for threshold, precision, recall, f1 in (
        (0.755, 3 / 4, 3 / 4, 3 / 4),
        (0.79, 1.0, 3 / 4, 6 / 7),
        (0.853, 1.0, 1 / 2, 2 / 3),
        (0.95, 1.0, 1 / 4, 2 / 5),
        (1.0, None, 0.0, 0.0),
    ):
        assert [at[threshold][name] for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    assert (np.diff([row["recall"] for row in curve]) <= 0).all()
    assert at[0.853]["recall_low"] == pytest.approx(rate(4, 8)[1])
    assert threshold_curve([compared(times)], "DEATH") == []


# --- returns ---


def test_true_events_fall_on_the_frame_that_first_shows_them_and_wins_on_the_one_before():
    true = {"DEATH": np.array([150, 200]), "ATTACK": np.array([201]), "WIN": np.array([250, 300])}
    assert true_frames(true, np.array([100, 200, 300])) == [
        (1, "DEATH"),
        (1, "DEATH"),
        (1, "WIN"),
        (2, "ATTACK"),
        (2, "WIN"),
    ]


def episode(start, end, outcome):
    return {"start_frame": start, "end_frame": end, "outcome": outcome}


def labels(episodes, frames, returns):
    return episodes, {"frame_idx": frames, "return": returns}


def test_effect_on_returns_by_hand():
    """Five frames of eight are in both; the ranks of neighbours are swapped twice: 1 - 6 * 4 / (5 * 24) = 0.8."""
    found = labels([episode(0, 5, "DEATH")], [0, 1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5, 9.0])
    true = labels([episode(1, 4, "DEATH"), episode(6, 7, "WIN")], [1, 2, 3, 4, 0, 7], [0.1, 0.4, 0.3, 0.6, 0.2, -9.0])
    found[1]["return"][:5] = [0.1, 0.2, 0.3, 0.4, 0.5]
    session = compared(range(8), labels=found, true_labels=true)
    # frames 0 to 4, found 0.1 0.2 0.3 0.4 0.5, true 0.2 0.1 0.4 0.3 0.6
    assert return_scores([session]) == {
        "frames": 5,
        "rank_correlation": pytest.approx(0.8),
        "membership_differs": 4 / 8,  # frames 0, 5, 6, 7
        "mean_abs_difference": pytest.approx(0.1),
    }
    both = return_scores([session, session])
    assert both["frames"] == 10 and both["rank_correlation"] == pytest.approx(0.8)
    assert membership(true[0], 8).tolist() == ["", "DEATH", "DEATH", "DEATH", "DEATH", "", "WIN", "WIN"]


def test_returns_that_are_all_alike_have_no_ranks():
    flat = labels([episode(0, 2, "INCOMPLETE")], [0, 1, 2], [0.0, 0.0, 0.0])
    assert return_scores([compared(range(3), labels=flat, true_labels=flat)]) == {
        "frames": 3,
        "rank_correlation": None,
        "membership_differs": 0.0,
        "mean_abs_difference": 0.0,
    }
    apart = labels([episode(3, 3, "WIN")], [3], [1.0])
    scores = return_scores([compared(range(4), labels=flat, true_labels=apart)])
    assert scores["mean_abs_difference"] is None and scores["frames"] == 0 and scores["membership_differs"] == 1.0
