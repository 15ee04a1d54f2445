"""Policies against a world of pixels: which episodes are played, what is counted, what a table says of it."""

import json

import numpy as np
import pytest

from pokemon_env import evaluation
from pokemon_env.wrappers import NO_ACTION, make_env
from tests import pixel_world


@pytest.fixture
def envs():
    envs = pixel_world.vector(3, "good")
    yield envs
    envs.close()


def test_rollout_plays_every_seed_once_and_counts_right(envs):
    seeds = list(range(50, 57))
    results = evaluation.play(envs, evaluation.ask_expert, seeds, 0, "expert", ask=True)
    assert [result["seed"] for result in results] == seeds
    for result in results:
        start = int(np.random.default_rng(result["seed"]).integers(4))  # as Gymnasium seeds a world
        assert result["length"] == (3 - start) + 1 + 4 and result["milestones"] == ["START", "DOOR_OPEN", "END"]
        assert result["return"] == pytest.approx(2 - 0.01 * result["length"])


def test_rollout_shows_what_the_action_was_chosen_from(envs):
    steps = list(evaluation.rollout(envs, evaluation.ask_expert, [1, 2, 3, 4], 0, "expert", ask=True))
    for seed in (1, 2, 3, 4):
        own = [step for step in steps if step["seed"] == seed]
        assert [step["begun"] for step in own] == [True] + [False] * (len(own) - 1)
        for step, after in zip(own, own[1:], strict=False):
            assert after["info"]["x"] - step["info"]["x"] in (0, 1)
            assert step["obs"][0, :, 0].argmax() // 4 == step["info"]["x"]
            assert step["action"] == step["info"]["expert_action"]


def test_patience_ends_an_episode_that_gets_nowhere(envs):
    results = evaluation.play(envs, lambda frames, infos, begun: np.ones(3, int), [1, 2], 10, "left")
    assert [result["length"] for result in results] == [10, 10]
    results = evaluation.play(envs, lambda frames, infos, begun: np.ones(3, int), [1, 2], 0, "left")
    assert [result["length"] for result in results] == [40, 40]


def test_an_expert_that_fails_stops_the_evaluation(envs):
    with pytest.raises(ValueError, match="no idea.*--expert"):
        evaluation.ask_expert(None, [{"expert_action": -1, "expert_error": "no idea"}], None)


def test_summary_has_wilson_and_bootstrap_intervals():
    results = [{"return": float(i % 2), "length": 5, "success": i < 88, "milestones": ["A"]} for i in range(100)]
    summary = evaluation.summarise(results)
    assert summary["success"] == pytest.approx([0.88, 0.8019, 0.9300], abs=1e-3)
    assert summary["return"][0] == 0.5 and summary["return"][1:] == pytest.approx([0.40, 0.60], abs=0.02)
    assert summary["length"] == [5, 5, 5] and summary["milestones"]["A"][0] == 1


def test_the_expert_is_asked_only_where_it_is_needed(envs):
    steps = list(evaluation.rollout(envs, lambda f, i, b: np.ones(3, int), [1, 2], 5, "left"))
    assert len(steps) == 10 and all(step["info"]["expert_action"] == -1 for step in steps)


def test_an_environment_with_nothing_to_play_is_let_alone(envs):
    sent = []
    step = envs.step
    envs.step = lambda actions: sent.append(list(actions)) or step(actions)
    evaluation.play(envs, lambda frames, infos, begun: np.ones(3, int), [1, 2], 4, "left")
    assert sent == [[1, 1, NO_ACTION]] * 4


def test_no_action_gives_the_last_answer_again():
    env = make_env(pixel_world.NAME, expert="tests/pixel_world.py:good")
    obs, packed = env.reset(seed=3)
    again = env.step(NO_ACTION)
    np.testing.assert_array_equal(again[0], obs)
    assert again[1:4] == (0.0, False, False) and again[4] == packed
    after = env.step(pixel_world.RIGHT)
    assert env.step(NO_ACTION) is after and env.unwrapped.steps == 1


def test_a_game_without_a_goal_has_no_success(tmp_path, capsys):
    envs = pixel_world.vector(2, "good", goal=False)
    results = {"policy": evaluation.play(envs, evaluation.ask_expert, [1, 2, 3], 0, "expert", ask=True)}
    envs.close()
    assert [result["success"] for result in results["policy"]] == [None] * 3
    summaries = {name: evaluation.summarise(episodes) for name, episodes in results.items()}
    assert "success" not in summaries["policy"] and summaries["policy"]["return"][0] > 1
    evaluation.report(summaries)
    assert "policy" in capsys.readouterr().out
    evaluation.plot_evaluation(tmp_path / "eval.png", json.loads(json.dumps(summaries)))
    assert (tmp_path / "eval.png").stat().st_size > 1000
