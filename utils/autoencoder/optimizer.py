"""Adam in one kernel where a backend has it, rows held at norm 1, schedules of the rate."""

import math

import keras
from keras import ops

if keras.backend.backend() == "torch":
    import torch

    from utils.autoencoder.sparse import dot_rows


class UnitRows(keras.constraints.Constraint):
    """Rows of norm 1, whose gradient loses the part along them, which would change that norm.

    Reference: Bricken et al. 2023, "Towards Monosemanticity", Autoencoder Training.
    """

    def __call__(self, rows):
        return _unit_rows(rows)


@keras.saving.register_keras_serializable("scaling_monosemanticity")
class Adam(keras.optimizers.Adam):
    """Keras' Adam, which knows `UnitRows`; on PyTorch in one pass over the weights, clipping too.

    Its arguments, variables and results are those of `keras.optimizers.Adam`, but for those in
    ``LEFT_OUT``.

    Raises:
        ValueError: An argument was given that is left out.
    """

    LEFT_OUT = (
        "amsgrad", "clipnorm", "clipvalue", "weight_decay", "gradient_accumulation_steps",
        "use_ema",
    )  # fmt: skip

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        given = [name for name in self.LEFT_OUT if getattr(self, name)]
        if given:
            raise ValueError(f"This Adam has no {', '.join(given)}. Use keras.optimizers.Adam.")

    def _backend_apply_gradients(self, grads, trainable_variables):
        pairs = zip(grads, trainable_variables, strict=True)
        projected = [
            _without_parallel_part(grad, variable)
            if isinstance(variable.constraint, UnitRows)
            else grad
            for grad, variable in pairs
        ]
        super()._backend_apply_gradients(projected, trainable_variables)

    if keras.backend.backend() == "torch":

        def _clip_gradients(self, grads):
            return grads  # left to the kernel, which saves a pass over the gradients

        @torch.no_grad()
        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            numbers = [self._get_variable_index(variable) for variable in trainable_variables]
            step = int(self.iterations) + 1
            steps = torch.full((), step, dtype=torch.float32, device=grads[0].device)
            scale = None
            if self.global_clipnorm:
                norm = torch.stack(torch._foreach_norm(grads)).norm()
                scale = (norm / self.global_clipnorm).clamp(min=1.0)
            torch._fused_adam_(
                [variable.value.data for variable in trainable_variables],
                grads,
                [self._momentums[i].value.data for i in numbers],
                [self._velocities[i].value.data for i in numbers],
                [],
                [steps.clone() for _ in trainable_variables],
                lr=float(learning_rate),
                beta1=self.beta_1,
                beta2=self.beta_2,
                weight_decay=0.0,
                # Keras adds ε before the second moments are corrected for their start, PyTorch
                # after.
                eps=self.epsilon / math.sqrt(1 - self.beta_2**step),
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=None,
            )


if keras.backend.backend() == "torch":  # in place: half of the time is in allocating otherwise

    @torch.no_grad()
    def _unit_rows(rows):
        rows = ops.convert_to_tensor(rows)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows.div_(norms.clamp_(min=1e-7))

    @torch.no_grad()
    def _without_parallel_part(grad, rows):
        rows = ops.convert_to_tensor(rows)
        return grad.addcmul_(dot_rows(grad, rows)[:, None], rows, value=-1)

else:

    def _unit_rows(rows):
        return rows / ops.maximum(ops.norm(rows, axis=1, keepdims=True), 1e-7)

    def _without_parallel_part(grad, rows):
        return grad - ops.sum(grad * rows, axis=1, keepdims=True) * rows


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

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rise = (step + 1) / max(1.0, self.warmup_share * self.total_steps)
        fall = (self.total_steps - step) / max(1.0, self.decay_share * self.total_steps)
        if self.decay == "cosine":
            fall = (1 - ops.cos(math.pi * ops.clip(fall, 0.0, 1.0))) / 2
        return self.peak * ops.clip(ops.minimum(rise, fall), 0.0, 1.0)

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_share": self.warmup_share,
            "decay_share": self.decay_share,
            "decay": self.decay,
        }
