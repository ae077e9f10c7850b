"""Steering: change features inside what an autoencoder reconstructs, and let the model go on.

With x = x̂ + error and a_i = f_i ‖W_dec,i‖ the activation of feature i as it is reported, a change
of a_i is made within x̂ and keeps the error, so that

    x' = x + Σ_i (a'_i − a_i) W_dec,i / ‖W_dec,i‖

    clamp   a'_i = c · max_i         the paper's; c = 0 is the same as ablate
    add     a'_i = a_i + c · max_i
    scale   a'_i = c · a_i
    ablate  a'_i = 0

in normalised units; residual streams here are raw, so the sum is divided by the autoencoder's
``scale``. max_i is the feature's maximum over the dataset.

Shapes: residual (batch, context, d_model) or any other leading axes; latents (..., n_latents).
Reference: "Scaling Monosemanticity", Influence on Behavior and Methodological Details.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from utils.language_model import watched_tokens
from utils.settings import require
from utils.steering.feature_model import FeatureEncoder, FeatureModel

INTERVENTIONS = ("clamp", "add", "scale", "ablate")
PLACES = ("everywhere", "generated")


@dataclasses.dataclass(frozen=True)
class Clamp:
    """What a feature's activation is changed to; a clamp, unless ``how`` says otherwise.

    Attributes:
        feature: Number of the latent.
        strength: c. Multiples of ``maximum``: 0 ablates the feature, a negative one reverses it.
            The useful range is −10 to 10. To scale, multiples of the present activation; of no
            matter to ablate.
        maximum: The feature's largest reported activation over the dataset, f_i ‖W_dec,i‖.
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
    """What clamps add to a raw residual stream (..., d_model): a function to the same shape.

    Every clamp is measured on the residual as it was given, so clamps do not depend on their order
    and the change of several is the sum of their changes.

    Args:
        clamps: Of all texts, or of each row of a batch its own, (batch, context, d_model).
        device: Of the residual stream.

    Raises:
        InputError: A feature is out of range or clamped twice, a strength is not finite, or an
            intervention is unknown.
    """
    of_all = not clamps or isinstance(clamps[0], Clamp)
    rows = [clamps] if of_all else clamps
    for row in rows:
        _check(row, encoder.n_latents)
    features = sorted({clamp.feature for row in rows for clamp in row})
    lines = torch.zeros(2, len(rows), 1, len(features))
    for number, row in enumerate(rows):
        for clamp in row:
            lines[:, number, 0, features.index(clamp.feature)] = torch.tensor(clamp.line())
    offset, slope = (lines[:, 0, 0] if of_all else lines).to(device)
    chosen = torch.tensor(features, dtype=torch.long, device=device)
    directions = encoder.directions(chosen)
    present_matters = bool((slope != 0).any())

    def change(residual: torch.Tensor) -> torch.Tensor:
        rises = offset
        if present_matters:
            rises = offset + slope * encoder.encode(residual, chosen)
        return (rises @ directions).expand(residual.shape)

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
    """Refuse what is none of `INTERVENTIONS`, and neither a name of `PLACES` nor positions."""
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
    """While open, ``change`` of it is added to the residual stream at the model's layer.

    BOS, wherever it is, and norm outliers (a few other positions, 10 to 100 times the rest) are
    left alone: they were kept out of training, so the latents there mean nothing, and the model
    uses these positions as attention sinks, whose content is not about the text.

    A position's change depends on that position alone, so batches work, padded or not, and so does
    a KV cache: with and without it the model says the same. Computed in float32, returned in the
    model's dtype.

    Args:
        model: The model to change.
        change: Of a raw residual stream in float32, to the same shape.
        where: ``"everywhere"``; ``"generated"``, from the first generated token on: what comes
            after the first pass while this is open, which is the prompt's; or positions.

    Raises:
        InputError: ``where`` is neither; while running, a change takes the residual stream out of
            the range of the model's dtype.
    """
    check_change(INTERVENTIONS[0], where)
    ends = []  # the last position of each prompt

    def replace(residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        activations = residual.float()
        at = model.trained_positions(fed[0], activations)
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

    with watched_tokens(model.language_model) as fed, model.replaced(replace, True):
        yield


def steered(
    model: FeatureModel,
    clamps: Sequence[Clamp] | Sequence[Sequence[Clamp]],
    where: str | Sequence[int] = "everywhere",
) -> contextlib.AbstractContextManager[None]:
    """While open, the residual stream has ``clamps`` applied; see `changed`.

    Args:
        clamps: Of different features; for all texts, or for each row of a batch its own.

    Raises:
        InputError: As for `change_by` and `changed`.
    """
    return changed(model, change_by(model, clamps, model.language_model.device), where)
