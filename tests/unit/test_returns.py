"""The backward recursion against the sum term by term, the specification's closed form, and hand-worked cases."""

import numpy as np
import pytest

from common.returns import discounted_returns, gamma_from_half_life
from tests.reference import discounted_returns as naive_returns
from tests.reference import specified_returns


def test_by_hand():
    np.testing.assert_allclose(discounted_returns([0, 0, -1], 0.5), [-0.25, -0.5, -1])
    np.testing.assert_allclose(discounted_returns([1, 2, 4], 0.5), [3, 4, 4])
    np.testing.assert_allclose(discounted_returns([1, 2, 4], 0), [1, 2, 4])
    np.testing.assert_allclose(discounted_returns([1, 2, 4], 1), [7, 6, 4])
    assert discounted_returns(np.zeros(0), 0.9).shape == (0,)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
def test_equals_the_sum_term_by_term(gamma):
    rewards = np.random.default_rng(0).normal(size=150)
    result = discounted_returns(rewards, gamma)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, naive_returns(list(rewards), gamma), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.9, 0.99, 1.0])
@pytest.mark.parametrize("attacks", [(), (0,), (1,), (39,), (0, 7, 8, 39)])
def test_rewards_placed_as_described_give_the_specified_closed_form(gamma, attacks):
    length, reward, attack_reward, bonus = 40, -1.0, 0.1, 0.01
    rewards = np.full(length, bonus)
    rewards[-1] = reward
    for k in attacks:
        if k > 0:
            rewards[k - 1] += gamma * attack_reward
    expected = specified_returns(length, reward, gamma, attacks, attack_reward, bonus)
    np.testing.assert_allclose(discounted_returns(rewards, gamma), expected, rtol=1e-12, atol=1e-12)


def test_long_episode_stays_right():
    rewards = np.zeros(1_000_000)
    rewards[-1] = 1
    result = discounted_returns(rewards, 0.99)
    np.testing.assert_allclose(result[-1001], 0.99**1000, rtol=1e-9)
    assert result[0] == 0 or result[0] < 1e-300


def test_half_life():
    assert gamma_from_half_life(69) ** 69 == pytest.approx(0.5)
    assert gamma_from_half_life(2.0, fps=10) ** 20 == pytest.approx(0.5)
    assert gamma_from_half_life(6.9, fps=10) == pytest.approx(0.99, abs=1e-4)  # what gamma 0.99 means at 10 fps


def test_bad_values_are_refused():
    for gamma in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            discounted_returns([1.0], gamma)
    with pytest.raises(ValueError, match="shape"):
        discounted_returns(np.zeros((2, 2)), 0.9)
    for half_life in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="half-life"):
            gamma_from_half_life(half_life)
