import numpy as np
import pytest

from utils.features.sampling import draw_again, interval, mean_and_interval


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean, low, high = mean_and_interval(values, seed=1)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([mean - error, mean + error], abs=0.03)
    assert mean_and_interval(values, seed=1) == [mean, low, high]  # the same draws each time


def test_of_equal_values_it_has_no_width_and_of_none_there_is_none():
    assert mean_and_interval(np.full(5, 2.0), seed=0) == [2, 2, 2]
    assert mean_and_interval(np.zeros(0), seed=0) == []


def test_what_is_drawn():
    draws = draw_again(4, seed=0, n_draws=1_000)
    assert draws.shape == (1_000, 4) and set(draws.flat) == {0, 1, 2, 3}
    assert len({tuple(draw) for draw in np.sort(draws)}) > 20  # with replacement
    assert len(draw_again(0, seed=0)) == 0
    assert interval(np.arange(1_001)) == [25, 975]
