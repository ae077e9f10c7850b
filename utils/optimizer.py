"""Adam as one kernel where a backend has it, and the schedules of the learning rate."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable("scaling_monosemanticity")
class Adam(keras.optimizers.Adam):
    """Keras' Adam; on PyTorch all of an update, clipping too, in one pass over the weights.

    Its arguments, variables and results are those of `keras.optimizers.Adam`.
    """


if keras.backend.backend() == "torch":
    import torch

    def _clip_gradients(self, grads):
        return grads  # left to the kernel, which saves a pass over the gradients

    @torch.no_grad()
    def _update(self, grads, variables, learning_rate):
        numbers = [self._get_variable_index(variable) for variable in variables]
        step = int(self.iterations) + 1
        steps = torch.full((), step, dtype=torch.float32, device=grads[0].device)
        scale = None
        if self.global_clipnorm:
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            scale = (norm / self.global_clipnorm).clamp(min=1.0)
        torch._fused_adam_(
            [variable.value.data for variable in variables],
            grads,
            [self._momentums[i].value.data for i in numbers],
            [self._velocities[i].value.data for i in numbers],
            [],
            [steps.clone() for _ in variables],
            lr=float(learning_rate),
            beta1=self.beta_1,
            beta2=self.beta_2,
            weight_decay=0.0,
            # Keras adds ε before the second moments are corrected for their start, PyTorch after.
            eps=self.epsilon / math.sqrt(1 - self.beta_2**step),
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=None,
        )

    Adam._clip_gradients = _clip_gradients
    Adam._backend_update_step = _update


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
