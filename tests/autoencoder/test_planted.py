"""A dictionary that is known is found again, by kinds that choose and by one with thresholds."""

import importlib

import numpy as np
import pytest
from on_backend import stand_in_for_store
from planted import BATCH, FLAGS, N_STEPS, Planted, largest_cosines, make_planted

from utils.autoencoder import training
from utils.settings import read_settings


@pytest.fixture(scope="module")
def planted() -> Planted:
    return make_planted(40_000)


def test_what_is_planted(planted):
    present = planted.coefficients > 0
    np.testing.assert_allclose(np.linalg.norm(planted.directions, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        planted.coefficients @ planted.directions, planted.rows, rtol=1e-4, atol=1e-4
    )
    assert 6 < present.sum(1).mean() < 8
    frequencies = present.mean(0)
    assert 0.15 < frequencies[0] < 0.3 and 0.003 < frequencies[-1] < 0.02
    together = np.corrcoef(present.T) - np.eye(256)
    assert (together > 0.3).sum() / 2 == 32 == (together > 0.05).sum() / 2


def test_largest_cosines_known_answer():
    found = np.array([[3.0, 4.0], [-2.0, 0.0], [0.0, 0.0]])
    assert largest_cosines(np.eye(2), found).tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("kind", FLAGS)
def test_a_known_dictionary_is_found(planted, kind):
    words = ["--kind", kind, "--n-latents", "320", *FLAGS[kind].split()]
    settings = read_settings(importlib.import_module("train_autoencoder"), words)
    made = training.build(settings, stand_in_for_store(planted.rows), N_STEPS)
    draw = np.random.default_rng(0)
    picked = (draw.integers(0, len(planted.rows), BATCH) for _ in range(N_STEPS))
    made.fit(
        ((planted.rows[rows],) for rows in picked),
        steps_per_epoch=N_STEPS,
        shuffle=False,
        verbose=0,
    )
    assert largest_cosines(planted.directions, made.directions()).mean() >= 0.95
