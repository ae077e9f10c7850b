"""The fused Adam is Keras' Adam, and the schedule of the learning rate, step by step."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.torch.optimizers.torch_adam import Adam as KerasAdam

from utils.autoencoder.optimizer import Adam, Schedule, UnitRows

SHAPES = ((7, 3), (7,), (3,))


def after_20_steps(cls: type, **options) -> list[np.ndarray]:
    """Weights and moments after 20 steps of one course of gradients."""
    draw = np.random.default_rng(0)
    weights = [keras.Variable(draw.normal(size=shape), dtype="float32") for shape in SHAPES]
    optimizer = cls(Schedule(0.005, 20, 0.2, 0.5), **options)
    optimizer.build(weights)
    for step in range(20):
        size = 10.0 ** (step % 5 - 2)  # some are clipped, some are not
        gradients = [size * draw.normal(size=shape) for shape in SHAPES]
        gradients = [ops.convert_to_tensor(gradient, "float32") for gradient in gradients]
        optimizer.apply(gradients, weights)
    assert int(optimizer.iterations) == 20
    found = [*weights, *optimizer._momentums, *optimizer._velocities]
    return [ops.convert_to_numpy(variable) for variable in found]


@pytest.mark.parametrize("clipping", [{}, {"global_clipnorm": 0.5}])
def test_fused_adam_is_keras_adam(clipping):
    fused = after_20_steps(Adam, **clipping)
    expected = after_20_steps(KerasAdam, **clipping)
    for found, wanted in zip(fused, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * max(1, np.abs(wanted).max()))


def test_clipping_changes_the_weights():
    plain, clipped = (
        after_20_steps(Adam, **options)[0] for options in ({}, {"global_clipnorm": 0.5})
    )
    assert np.abs(clipped - plain).max() > 0.001


def test_tiny_gradients_are_divided_by_epsilon_as_in_keras():
    moved = []
    for cls in (Adam, KerasAdam):
        weight = keras.Variable([0.0])
        optimizer = cls(1.0)
        optimizer.build([weight])
        optimizer.apply([ops.convert_to_tensor([1e-8])], [weight])
        moved.append(float(weight.value.detach()[0]))
    # √(1 − β₂) / (1 − β₁) · m / (√v + ε) in the first step, where m = (1 − β₁) g, v = (1 − β₂) g².
    expected = -(0.001**0.5) / 0.1 * 1e-9 / (0.001**0.5 * 1e-8 + 1e-7)
    assert moved[0] == pytest.approx(expected, rel=1e-6)
    assert moved[1] == pytest.approx(expected, rel=1e-4)  # 1 − β₂ in float32


@pytest.mark.parametrize("name", Adam.LEFT_OUT)
def test_what_the_kernel_leaves_out_is_refused(name):
    with pytest.raises(ValueError, match=f"no {name}"):
        Adam(0.001, **{name: 2})


# ---------------------------------------------------------------------------------------- unit rows


def unit_rows(values) -> keras.Variable:
    rows = keras.Variable(values, dtype="float32")
    rows.constraint = UnitRows()
    return rows


def test_rows_move_by_the_part_of_the_gradient_across_them():
    rows = unit_rows([[1.0, 0.0], [0.6, 0.8]])
    optimizer = Adam(0.1)
    optimizer.build([rows])
    optimizer.apply([ops.convert_to_tensor([[5.0, 0.0], [-8.0, 6.0]])], [rows])
    found = ops.convert_to_numpy(rows)
    # The first gradient is along its row, the second across: Adam's first step is 0.1 by sign.
    step = np.array([0.6 + 0.1, 0.8 - 0.1])
    np.testing.assert_allclose(found, [[1, 0], step / np.linalg.norm(step)], atol=1e-5)


# ----------------------------------------------------------------------------------------- schedule


def rates(schedule: Schedule) -> list[float]:
    return [float(schedule(step)) for step in range(schedule.total_steps + 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decay_share": 0.2}, [2] * 9 + [1, 0]),
        ({"decay_share": 0.0}, [2] * 10 + [0]),
        (
            {"warmup_share": 0.4, "decay_share": 0.5},
            [0.5, 1, 1.5, 2, 2, 2, 1.6, 1.2, 0.8, 0.4, 0],
        ),
        # (1 − cos(π s)) for what is left, s = 1, 0.75, 0.5, 0.25, 0 of it.
        ({"decay_share": 0.4, "decay": "cosine"}, [2] * 7 + [1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
    ],
    ids=["linear", "constant", "warmup", "cosine"],
)
def test_learning_rate_step_by_step(options, expected):
    assert rates(Schedule(2.0, 10, **options)) == pytest.approx(expected, abs=1e-6)


def test_a_restored_schedule_is_the_same():
    schedule = Schedule(1.0, 10, warmup_share=0.3, decay_share=0.4, decay="cosine")
    assert rates(Schedule.from_config(schedule.get_config())) == rates(schedule)
