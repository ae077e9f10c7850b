"""The check of an imported autoencoder on the activations at hand.

An autoencoder that is read by another convention than it was trained by still loads, and is wrong.
So its figures are measured, and compared with those that its source states and with those that it
has by other conventions, and on the outputs of the blocks before and after.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from keras import ops

from utils.activations.capture import CPU_BATCH, release_memory
from utils.activations.store import ActivationStore, spread
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.fidelity import measure_fidelity
from utils.autoencoder.formats.conventions import Weights, changes
from utils.autoencoder.formats.folded import as_array
from utils.autoencoder.formats.imported import Imported
from utils.autoencoder.training import measured_together
from utils.language_model import load_language_model, residual_at
from utils.settings import InputError, Settings

N_TOKENS = 4_096  # that FVU and L0 are measured on
N_DEAD_TOKENS = 65_536  # a latent that is active in none of them counts as dead
LEAST_DEAD = 0.01  # of the latents; a difference of fewer is the text's
TOLERANCE = 0.2  # share by which a stated figure may be missed
GAIN = 0.9  # a convention is better by which FVU is lower than this times what it is as read
ALIKE = 0.02  # share within which figures do not tell one convention from another


@dataclasses.dataclass(frozen=True)
class Figures:
    """FVU and L0 of an autoencoder by a convention, in words, and the weights that it changes."""

    fvu: float
    l0: float
    convention: str = "as read"
    changed: Weights = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"FVU {self.fvu:.3f}, L0 {self.l0:.1f}"

    @property
    def cost(self) -> float:
        """log(FVU · √L0): how little is reconstructed for the latents that are active.

        The more are active, the better does any autoencoder reconstruct.
        """
        return math.log(max(self.fvu, 1e-9) * math.sqrt(max(self.l0, 1)))

    def is_better_than(self, other: "Figures") -> bool:
        """Whether FVU is not higher, and lower by `GAIN` for as many active latents."""
        return self.fvu <= other.fvu and self.cost < other.cost + math.log(GAIN)

    def is_like(self, other: "Figures") -> bool:
        """Whether they do not tell one convention from the other."""
        pairs = (self.fvu, other.fvu), (self.l0, other.l0)
        return all(math.isclose(a, b, rel_tol=ALIKE) for a, b in pairs)


class Trial:
    """An imported autoencoder on held-out activations, as read and by other conventions."""

    def __init__(self, autoencoder: SparseAutoencoder, store: ActivationStore, settings: Settings):
        self.autoencoder, self.store = autoencoder, store
        self.together = measured_together(settings.batch_size, autoencoder.n_latents)
        held_out = store.split(settings.held_out, settings.n_held_out_tokens).held_out
        self.contexts = spread(held_out, -(-N_TOKENS // store.context_length))
        self.rows = store.kept_rows(self.contexts).astype(np.float32)

    def figures(self, rows: np.ndarray, convention: str, changed: Weights) -> Figures:
        """FVU and L0 on raw activations (rows, d_model), with some weights changed meanwhile."""
        batches = (rows[i : i + self.together] for i in range(0, len(rows), self.together))
        with self._changed(changed):
            fidelity = measure_fidelity(self.autoencoder, batches)
        return Figures(fidelity.fvu, fidelity.l0, convention, changed)

    @contextlib.contextmanager
    def _changed(self, changed: Weights) -> Iterator[None]:
        earlier = {name: np.array(as_array(getattr(self.autoencoder, name))) for name in changed}
        try:
            self._assign(changed)
            yield
        finally:
            self._assign(earlier)

    def _assign(self, weights: Weights) -> None:
        for name, values in weights.items():
            getattr(self.autoencoder, name).assign(ops.convert_to_tensor(values, "float32"))

    def as_read(self) -> Figures:
        return self.figures(self.rows, "as read", {})

    def with_bos(self) -> Figures:
        """As read, at all positions, BOS and outliers among them."""
        rows = self.store.read("activations", self.contexts).astype(np.float32)
        return self.figures(rows.reshape(-1, self.store.d_model), "with BOS", {})

    def by_conventions(self, beside: str | None = None) -> list[Figures]:
        """By every other convention alone, or beside one that is changed too."""
        counters = ("step", "idle_tokens")
        every = self.autoencoder.weights
        weights = {weight.name: as_array(weight) for weight in every if weight.name not in counters}
        found = list(changes(weights, self.store, beside))
        return [self.figures(self.rows, *each) for each in found]

    def on_other_layers(self) -> list[Figures]:
        """As read, on the outputs of the blocks before and after, at the same tokens.

        Raises:
            InputError: The language model cannot be loaded.
        """
        store = self.store
        language_model = load_language_model(store.model_name, store.layer, store.dtype)
        figures = []
        for layer in (store.layer - 1, store.layer + 1):
            if 0 <= layer < len(language_model.blocks):
                rows = []
                for batch in store.batches(self.contexts, CPU_BATCH):
                    tokens, kept = torch.from_numpy(batch.tokens), torch.from_numpy(batch.kept)
                    rows.append(residual_at(language_model, tokens, layer).cpu()[kept].float())
                rows = torch.cat(rows).numpy()
                words = f"it reads the output of block {layer}, which --layer {layer} saves"
                figures.append(self.figures(rows, words, {}))
        device = language_model.device
        del language_model
        release_memory(device)
        return figures

    def dead_fraction(self) -> tuple[float, int]:
        """Share of the latents that are active in none of about `N_DEAD_TOKENS`; the tokens."""
        active, n_tokens = np.zeros(self.autoencoder.n_latents, bool), 0
        for batch in self.store.batches(self.store.sample(N_DEAD_TOKENS), self.together):
            active[self.autoencoder.encode_active(batch.rows)[1]] = True
            n_tokens += len(batch.rows)
        return float(1 - active.mean()), n_tokens


@dataclasses.dataclass(frozen=True)
class Expected:
    """What figures must be: those that the source states, and k."""

    fvu: float | None
    l0: float | None
    k: int | None

    def faults(self, figures: Figures) -> list[str]:
        """What is wrong with figures, a clause each.

        A lower FVU than stated is not, with as many active latents: no convention but the right one
        gives it.
        """
        faults, l0 = [], self.l0 or self.k
        if not figures.fvu < 1:  # or not a number
            faults.append(f"FVU is {figures.fvu:.3g}, and the mean of the activations alone has 1")
        if figures.l0 == 0:
            faults.append("no latent is active")
        is_as_sparse = l0 is not None and _is_near(figures.l0, l0)
        is_better = figures.fvu < (self.fvu or 0) and is_as_sparse
        if self.fvu and not is_better and not _is_near(figures.fvu, self.fvu):
            faults.append(f"FVU is {figures.fvu:.3g}, and its source states {self.fvu:.3g}")
        if self.l0 and not is_as_sparse:
            faults.append(f"L0 is {figures.l0:.3g}, and its source states {self.l0:.3g}")
        if self.k and not 0.1 <= figures.l0 / self.k <= 10:
            faults.append(f"L0 is {figures.l0:.3g}, and K is {self.k}")
        return faults

    def rank(self, figures: Figures) -> tuple[int, float]:
        """How little figures fit, for sorting: their number of faults, and then a distance.

        Of what is stated, |log(FVU / stated)| and |log(L0 / stated)|, k counting as a stated L0. Of
        FVU that is not stated, log FVU; and their cost where neither is.
        """
        l0 = self.l0 or self.k
        if not (self.fvu or l0):
            return len(self.faults(figures)), figures.cost
        fvu = math.log(max(figures.fvu, 1e-9) / (self.fvu or 1))
        off = abs(fvu) if self.fvu else fvu
        off += abs(math.log(max(figures.l0, 1e-9) / l0)) if l0 else 0
        return len(self.faults(figures)), off

    def is_better(self, figures: Figures, than: Figures) -> bool:
        """Whether figures have fewer faults than others; or as few, and are better by themselves.

        Or have k latents active, where the others have twice or half as many: thresholds that are
        too low give an FVU lower than the right ones do.
        """
        fewer = len(self.faults(figures)) - len(self.faults(than))
        if self.k and not self.l0 and abs(math.log2(max(than.l0, 1e-9) / self.k)) > 1:
            return fewer < 0 or (fewer == 0 and _is_near(figures.l0, self.k))
        return fewer < 0 or (fewer == 0 and figures.is_better_than(than))


def check(
    imported: Imported, autoencoder: SparseAutoencoder, store: ActivationStore, settings: Settings
) -> float:
    """Refuse an imported autoencoder that is wrong as it is read; names the convention it fits.

    What is measured is printed beside what the source states.

    Args:
        imported: As read.
        autoencoder: Built from it. Its weights are changed for a while, and put back.
        settings: Those of train_autoencoder.py.

    Returns:
        The share of latents that are active in none of about `N_DEAD_TOKENS` tokens.

    Raises:
        InputError: FVU is 1 or more; no latent is active; L0 is ten times off k; a stated figure
            is missed by more than `TOLERANCE`; or another convention has an FVU lower than `GAIN`
            times this. With ACCEPT_MISMATCH that is printed.
    """
    origin, trial = imported.origin, Trial(autoencoder, store, settings)
    as_read, (dead_fraction, n_dead_tokens) = trial.as_read(), trial.dead_fraction()
    print(
        f"Checked on {len(trial.rows):,} tokens: FVU {as_read.fvu:.3f}{_stated(origin.fvu)}, "
        f"L0 {as_read.l0:.1f}{_stated(origin.l0)}; in {n_dead_tokens:,} tokens "
        f"{dead_fraction:.2%} of the latents are dead{_stated(origin.dead_fraction)}."
    )
    if origin.dtype != "float32":
        print(f"Its weights are stored in {origin.dtype}, which rounds them.")
    expected = Expected(origin.fvu, origin.l0, imported.options.get("k"))
    is_stated = origin.fvu or origin.l0
    if is_stated and expected.faults(as_read) and not expected.faults(with_bos := trial.with_bos()):
        print(f"With BOS and outliers, which its source counts, it has {with_bos}, as stated.")
        expected = Expected(None, None, expected.k)
    faults = expected.faults(as_read)
    # Fewer tokens than the source's can only make more latents seem dead.
    stated = origin.dead_fraction or 0.0
    if stated - dead_fraction > max(TOLERANCE * stated, LEAST_DEAD):
        faults.append(
            f"{dead_fraction:.1%} of the latents are dead; its source states {stated:.1%}"
        )
    better = _better(trial, expected, as_read)
    if faults or better:
        name = f"The autoencoder {origin.hookpoint} ({origin.format})"
        _refuse(f"{name} {_in_words(as_read, faults, better)}", settings)
    return dead_fraction


def _is_near(measured: float, stated: float) -> bool:
    return abs(measured / stated - 1) <= TOLERANCE


def _stated(figure: float | None) -> str:
    return "" if figure is None else f" (its source states {figure:.3g})"


def _better(trial: Trial, expected: Expected, as_read: Figures) -> list[Figures]:
    """Figures by other conventions that fit better than those as read, the best first.

    Two conventions are tried together only where one is better or something is wrong, other layers
    only where no convention explains it.
    """
    singles = trial.by_conventions()
    better = [figures for figures in singles if expected.is_better(figures, as_read)]
    if singles and (better or expected.faults(as_read)):
        best = min(singles, key=expected.rank)
        for figures in trial.by_conventions(beside=best.convention):
            if all(expected.is_better(figures, than) for than in (as_read, best)):
                better.append(figures)
    if all(expected.faults(figures) for figures in better):
        try:
            layers = trial.on_other_layers()
            better += [figures for figures in layers if expected.is_better(figures, as_read)]
        except InputError as error:
            print(f"Other layers could not be tried. {error}")
    return sorted(better, key=expected.rank)


def _in_words(as_read: Figures, faults: list[str], better: list[Figures]) -> str:
    """What is wrong, the convention that fits best, and the remedy."""
    words = f"is wrong for these activations as it is read: {'; '.join(faults) or as_read}."
    if not better:
        return (
            f"{words} None of the conventions tried explains it (utils/autoencoder/formats/"
            "conventions.py has them). Is it for this model, and for text like this?"
        )
    best = better[0]
    alike = [figures.convention for figures in better[1:] if figures.is_like(best)]
    words += f" It fits if {best.convention}: {best}, instead of {as_read}."
    if alike:
        words += f" These activations do not tell that from: {', '.join(alike)}."
    return f"{words} Compare with its tool's own code, and correct its weights or what says so."


def _refuse(message: str, settings: Settings) -> None:
    if not settings.accept_mismatch:
        raise InputError(f"{message} To take it as it is read: --accept-mismatch.")
    print(f"Accepted: {message}")
