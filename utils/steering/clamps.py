"""Steering: change features inside the autoencoder's reconstruction while the model runs.

With x = x̂ + error, feature activations a_i = f_i ‖W_dec,i‖ and their maxima max_i over the dataset,
features are changed within x̂ and the error is kept (in normalised units; a raw residual stream
changes by the sum divided by the autoencoder's ``scale``):

    x' = x + Σ_i (a'_i − a_i) W_dec,i / ‖W_dec,i‖

Where an imported autoencoder standardises each token, the raw change is also multiplied by the
token's deviation before the change.

    clamp   a'_i = c · max_i         the paper's; c = 0 is the same as ablate
    add     a'_i = a_i + c · max_i
    scale   a'_i = c · a_i
    ablate  a'_i = 0

Shapes: residual (batch, context, d_model) or any other leading axes; latents (..., n_latents).
Reference: "Scaling Monosemanticity", Influence on Behavior and Methodological Details.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from utils.language_model import watched_passes
from utils.settings import require
from utils.steering.feature_model import FeatureEncoder, FeatureModel

INTERVENTIONS = ("clamp", "add", "scale", "ablate")
PLACES = ("everywhere", "generated")


@dataclasses.dataclass(frozen=True)
class Clamp:
    """A change of a feature's activation.

    Attributes:
        feature: Number of the latent.
        strength: c. The useful range is −10 to 10; unused by ablate.
        maximum: The feature's largest activation over the dataset, f_i ‖W_dec,i‖.
        how: One of `INTERVENTIONS`.
    """

    feature: int
    strength: float
    maximum: float
    how: str = "clamp"

    def line(self) -> tuple[float, float]:
        """Offset and slope: the activation a changes by offset + slope · a."""
        target = self.strength * self.maximum
        lines = {"clamp": (target, -1.0), "add": (target, 0.0), "ablate": (0.0, -1.0)}
        return lines.get(self.how, (0.0, self.strength - 1.0))


def change_by(
    encoder: FeatureEncoder,
    clamps: Sequence[Clamp] | Sequence[Sequence[Clamp]],
    device: torch.device | str = "cpu",
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from a raw residual stream (..., d_model) to the change that clamps add to it.

    All clamps see the unchanged residual, so their order is of no matter and their changes add up.

    Args:
        clamps: For all texts, or a sequence for each row of a batch (batch, context, d_model).
        device: Of the residual stream.

    Raises:
        InputError: A feature is out of range or clamped twice, a strength is not finite, or an
            intervention is unknown.
    """
    is_shared = not clamps or isinstance(clamps[0], Clamp)
    rows = [clamps] if is_shared else clamps
    for row in rows:
        _check(row, encoder.n_latents)
    features = sorted({clamp.feature for row in rows for clamp in row})
    lines = torch.zeros(2, len(rows), 1, len(features))
    for number, row in enumerate(rows):
        for clamp in row:
            lines[:, number, 0, features.index(clamp.feature)] = torch.tensor(clamp.line())
    offset, slope = (lines[:, 0, 0] if is_shared else lines).to(device)
    latents = torch.tensor(features, dtype=torch.long, device=device)
    directions = encoder.directions(latents)
    needs_encoding = bool((slope != 0).any())

    def change(residual: torch.Tensor) -> torch.Tensor:
        increase = offset
        if needs_encoding:
            increase = offset + slope * encoder.encode(residual, latents)
        return (increase @ directions * encoder.token_scale(residual)).expand(residual.shape)

    return change


def _check(clamps: Sequence[Clamp], n_latents: int) -> None:
    features = [clamp.feature for clamp in clamps]
    for clamp in clamps:
        feature = clamp.feature
        require(
            0 <= feature < n_latents,
            f"FEATURE must be between 0 and {n_latents - 1}; it is {feature}.",
        )
        require(
            features.count(feature) == 1,
            f"A feature can be clamped once; {feature} is clamped {features.count(feature)} times.",
        )
        require(math.isfinite(clamp.strength), f"STRENGTH must be finite; it is {clamp.strength}.")
        check_change(clamp.how)


def check_change(how: str, where: str | Sequence[int] = "everywhere") -> None:
    """Refuse an unknown intervention, and a ``where`` that is neither of `PLACES` nor positions."""
    require(
        how in INTERVENTIONS,
        f"INTERVENTION must be one of {', '.join(INTERVENTIONS)}; it is {how!r}.",
    )
    require(
        where in PLACES if isinstance(where, str) else len(where) > 0 and min(where) > 0,
        f"WHERE must be {' or '.join(PLACES)}, or positions from 1 on, for BOS, at 0, is never "
        f"changed; it is {where!r}.",
    )


@contextlib.contextmanager
def changed(
    model: FeatureModel,
    change: Callable[[torch.Tensor], torch.Tensor],
    where: str | Sequence[int] = "everywhere",
) -> Iterator[None]:
    """While open, ``change`` of the residual stream at the model's layer is added to it.

    BOS, wherever it is, and norm outliers (a few other positions, 10 to 100 times the rest) stay
    unchanged: they were kept out of training, so latents mean nothing there, and the model uses
    these positions as attention sinks, not for the text.

    A position's change depends on that position alone, so padding and a KV cache do not affect it.

    Args:
        change: From a raw residual stream in float32 to the same shape.
        where: ``"everywhere"``; ``"generated"``, the positions after the first pass, which must be
            the prompt's; or positions.

    Raises:
        InputError: ``where`` is unknown; or, while the model runs, the residual stream leaves the
            range of the model's dtype.
    """
    check_change(INTERVENTIONS[0], where)
    ends = []  # the last position of each prompt

    def replace(residual: torch.Tensor) -> torch.Tensor | None:
        activations = residual.float()
        tokens, positions = passes[0]
        at = model.trained_positions(tokens, activations)
        if where == "generated":
            ends[:] = ends or [positions[:, -1:]]
            at &= positions > ends[0]
        elif where != "everywhere":
            at &= torch.isin(positions, torch.tensor(where, device=positions.device))
        if not at.any():
            return None
        at = at[..., None]
        moved = (activations + change(activations)).to(residual.dtype)
        require(
            bool((moved.isfinite() | ~at).all()),
            f"STRENGTH must keep the residual stream finite in {residual.dtype}; it does not. "
            "−10 to 10 is the useful range.",
        )
        return torch.where(at, moved, residual)

    with watched_passes(model.language_model) as passes, model.replaced(replace):
        yield


def steered(
    model: FeatureModel,
    clamps: Sequence[Clamp] | Sequence[Sequence[Clamp]],
    where: str | Sequence[int] = "everywhere",
) -> contextlib.AbstractContextManager[None]:
    """While open, ``clamps`` are applied; arguments and errors as for `change_by`, `changed`."""
    return changed(model, change_by(model, clamps, model.language_model.device), where)
