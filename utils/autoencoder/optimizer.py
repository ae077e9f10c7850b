"""Adam in one pass where a backend has it, rows held at norm 1, schedules of the rate."""

import functools
import importlib.util
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from utils.backend import first_line
from utils.settings import require

if keras.backend.backend() == "torch":
    import torch

    from utils.autoencoder.kernels import AdamStep, Trained, plain_step

    @functools.cache
    def step_on(device: torch.device) -> Callable[[list[Trained], AdamStep], None]:
        """What makes a step on a device: Triton's kernels, or plain ones where these do not run.

        They need a graphics card, and a C compiler when they are first used.
        """
        if device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return plain_step
        from utils.autoencoder import triton_kernels

        try:
            is_right = makes_the_plain_step(triton_kernels.adam_step, device)
            reason = "they give other numbers"
        except Exception as error:  # by card, driver and compiler these are of any class
            is_right = False
            reason = first_line(error)
        if not is_right:
            print(f"Triton's kernels do not run here, and plain ones take their place: {reason}")
        return triton_kernels.adam_step if is_right else plain_step

    def makes_the_plain_step(
        step: Callable[[list[Trained], AdamStep], None], device: torch.device
    ) -> bool:
        """Whether small steps come out as `plain_step` makes them: the two forms used most.

        All gradients and moments in float32; gradients of some rows, moments in bfloat16.
        """
        drawn = torch.rand(4, 64, 48, generator=torch.Generator().manual_seed(0)).to(device)
        rows = torch.tensor([[3, 7, 3, 0]], device=device)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            results = []
            for make in (plain_step, step):
                weight, gradient, *moments = drawn.clone()
                if dtype != torch.float32:
                    gradient = torch.sparse_coo_tensor(rows, gradient[:4], (64, 48))
                moments = [moment.to(dtype) for moment in moments]
                make(
                    [Trained(weight, gradient, *moments, is_unit=True)],
                    AdamStep(2, 1e-2, 0.9, 0.999, 1e-7, 1.0),
                )
                results.append(torch.stack([weight, *(moment.float() for moment in moments)]))
            if not torch.allclose(*results, rtol=tolerance, atol=1e-6):
                return False
        return True


class UnitRows(keras.constraints.Constraint):
    """Rows of norm 1, whose gradient loses the part along them, which would change that norm.

    Reference: Bricken et al. 2023, "Towards Monosemanticity", Autoencoder Training.
    """

    def __call__(self, rows):
        return rows / ops.maximum(ops.norm(rows, axis=1, keepdims=True), 1e-7)


@keras.saving.register_keras_serializable("scaling_monosemanticity")
class Adam(keras.optimizers.Adam):
    """Keras' Adam, which knows `UnitRows`; on PyTorch in one pass over the weights, clipping too.

    Its arguments, variables and results are those of `keras.optimizers.Adam`, but for those in
    ``LEFT_OUT``.

    Args:
        moments_dtype: ``"float32"``, or ``"bfloat16"`` for the moments of matrices, which are
            rounded at random (`utils.autoencoder.kernels`); PyTorch only.

    Raises:
        InputError: The backend has no such moments.
        ValueError: An argument was given that is left out.
    """

    LEFT_OUT = (
        "amsgrad", "clipnorm", "clipvalue", "weight_decay", "gradient_accumulation_steps",
        "use_ema", "loss_scale_factor",
    )  # fmt: skip

    def __init__(self, *args, moments_dtype="float32", **kwargs):
        super().__init__(*args, **kwargs)
        given = [name for name in self.LEFT_OUT if getattr(self, name)]
        if given:
            raise ValueError(f"This Adam has no {', '.join(given)}. Use keras.optimizers.Adam.")
        backend = keras.backend.backend()
        require(
            moments_dtype == "float32" or backend == "torch",
            f"MOMENTS_DTYPE {moments_dtype} needs BACKEND torch; it is {backend}. Leave it out.",
        )
        self.moments_dtype = moments_dtype
        self._step = None

    def get_config(self):
        return {**super().get_config(), "moments_dtype": self.moments_dtype}

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros"):
        if self.moments_dtype == "float32" or len(reference_variable.shape) < 2:
            return super().add_variable_from_reference(reference_variable, name, initializer)
        return self.add_variable(
            reference_variable.shape,
            initializer,
            self.moments_dtype,
            name=f"{reference_variable.path.replace('/', '_')}_{name}",
        )

    if keras.backend.backend() == "torch":

        @torch.no_grad()
        def apply(self, grads, trainable_variables=None):
            """A step with all variables. Step and rate are known here: the device is not asked."""
            if not self.built:
                self.build(trainable_variables)
            if self._step is None:
                self._step = int(self.iterations)
            variables = trainable_variables or self._trainable_variables
            pairs = zip(grads, variables, strict=True)
            trained = [self._trained(*pair) for pair in pairs if pair[0] is not None]
            rate = self._rate(self._step)
            self._step += 1
            numbers = rate, self.beta_1, self.beta_2, self.epsilon, self.global_clipnorm
            step_on(variables[0].value.device)(trained, AdamStep(self._step, *numbers))
            for variable in variables:
                if not isinstance(variable.constraint, UnitRows | None):  # the step held those
                    variable.assign(variable.constraint(variable))
            self.iterations.value.data.add_(1)

        def _trained(self, grad, variable):
            number = self._get_variable_index(variable)
            moments = (self._momentums[number], self._velocities[number])
            return Trained(
                variable.value.data,
                grad,
                *(moment.value.data for moment in moments),
                isinstance(variable.constraint, UnitRows),
            )

        def _rate(self, step):
            schedule = self._learning_rate
            known = isinstance(schedule, Schedule)
            return schedule(step, np) if known else float(self.learning_rate)

    else:

        def _backend_apply_gradients(self, grads, trainable_variables):
            pairs = zip(grads, trainable_variables, strict=True)
            projected = [
                grad - ops.sum(grad * variable, axis=1, keepdims=True) * variable
                if isinstance(variable.constraint, UnitRows)
                else grad
                for grad, variable in pairs
            ]
            super()._backend_apply_gradients(projected, trainable_variables)


@keras.saving.register_keras_serializable("scaling_monosemanticity")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise, a constant learning rate, and a fall to zero at the end of training.

    Args:
        peak: The learning rate in the middle.
        total_steps: Steps of the whole training.
        warmup_share: Share of the steps that rise; 0 in the paper.
        decay_share: Share of the steps that fall; 0.2 in the paper, 0 for a constant rate.
        decay: ``"linear"``, the paper's, or ``"cosine"``.

    Reference: "Update on how we train SAEs", April 2024.
    """

    def __init__(self, peak, total_steps, warmup_share=0.0, decay_share=0.2, decay="linear"):
        self.peak, self.total_steps, self.decay = peak, total_steps, decay
        self.warmup_share, self.decay_share = warmup_share, decay_share

    def __call__(self, step, numbers=ops):
        """The rate of a step, counted from 0; ``numbers``: `numpy` where the step is one."""
        step = step if numbers is np else ops.cast(step, "float32")
        rise = (step + 1) / max(1.0, self.warmup_share * self.total_steps)
        fall = (self.total_steps - step) / max(1.0, self.decay_share * self.total_steps)
        if self.decay == "cosine":
            fall = (1 - numbers.cos(math.pi * numbers.clip(fall, 0.0, 1.0))) / 2
        return self.peak * numbers.clip(numbers.minimum(rise, fall), 0.0, 1.0)

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_share": self.warmup_share,
            "decay_share": self.decay_share,
            "decay": self.decay,
        }
