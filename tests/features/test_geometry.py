"""Nearest directions: a known answer, brute force, what the table of a dictionary leaves out."""

import numpy as np
import pytest

from utils.features import geometry
from utils.features.catalogue import N_NEIGHBOURS
from utils.features.geometry import nearest
from utils.features.studies.places import neighbour_table


def test_known_answer():
    directions = np.array([[2, 0], [0, 5], [1, 1], [-1, 0]], np.float32)
    indices, cosines = nearest(directions, np.array([[9, 1]], np.float32), 9)
    assert indices.tolist() == [[0, 2, 1, 3]]
    expected = np.array([9, 10 / np.sqrt(2), 1, -9]) / np.sqrt(82)
    np.testing.assert_allclose(cosines[0], expected, rtol=1e-6)


def test_blocks_do_not_change_what_is_found(monkeypatch):
    draw = np.random.default_rng(0)
    directions, queries = draw.normal(size=(50, 8)), draw.normal(size=(23, 8))
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (directions, queries)]
    expected = units[1] @ units[0].T
    monkeypatch.setattr(geometry, "PAIRS_TOGETHER", 200)  # four queries a block, and three last
    indices, cosines = nearest(directions, queries, 5)
    np.testing.assert_array_equal(indices, np.argsort(-expected, axis=1)[:, :5])
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :5], atol=1e-6)


def test_the_table_leaves_out_a_feature_itself_and_the_dead():
    directions = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    directions[7] = 3 * directions[3]  # as near to feature 3 as itself
    directions[9] = directions[3]
    alive = np.arange(40) != 9
    table = neighbour_table(directions, alive)
    assert table.loc[9, "neighbours"] == table.loc[9, "neighbour_cosines"] == []
    for feature in np.flatnonzero(alive):
        found = table.loc[feature, "neighbours"]
        assert len(found) == N_NEIGHBOURS and not {feature, 9} & set(found)
    assert table.loc[3, "neighbours"][0] == 7 and table.loc[7, "neighbours"][0] == 3
    assert table.loc[3, "neighbour_cosines"][0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n_alive", [0, 1, 2])
def test_few_living_features_have_few_neighbours(n_alive):
    table = neighbour_table(np.eye(4, dtype=np.float32), np.arange(4) < n_alive)
    assert table["neighbours"].map(len).tolist() == [
        max(0, n_alive - 1) * (i < n_alive) for i in range(4)
    ]
