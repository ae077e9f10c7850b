"""Cross-entropy: the model's loss when its residual stream is replaced by the reconstruction.

    loss recovered = (L_zero − L_reconstruction) / (L_zero − L_untouched)

with L the mean cross-entropy of the next token, L_zero that with zeros in place of the stream.

Reference: "Update on how we train SAEs" (Circuits Updates, April 2024), which calls it so.
"""

import collections
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils import plots
from utils.activations.store import ActivationStore, Contexts, spread
from utils.autoencoder.fidelity import Fidelity, loss_recovered
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.language_model import LanguageModel, read_out, tokens_together
from utils.steering.feature_model import FeatureEncoder, FeatureModel

LEAST_SHOWN = 200  # tokens of a subset; the losses of one with fewer may be chance


def measure_losses(
    model: FeatureModel,
    store: ActivationStore,
    contexts: Contexts,
    n_tokens: int,
) -> pd.DataFrame:
    """The model's loss when its residual stream is replaced, in all text and by corpus subset.

    The stream is replaced at the positions that the store kept. BOS and norm outliers always stay,
    since the autoencoder is not trained on them; predictions of BOS do not count.

    Args:
        contexts: Contexts of the store to spread over, best those held out of training.
        n_tokens: Tokens to run, if ``contexts`` have so many.

    Returns:
        A row for ``"all"`` and for each subset: mean cross-entropy of the next token in nats,
        ``untouched``, with the ``reconstruction`` and ``zero_ablated``; ``kl``, the mean
        divergence of the reconstruction's prediction from the untouched one, in nats;
        ``n_tokens``, the number of predictions; ``fvu``, ``cosine`` and ``l0`` of the activations.
    """
    contexts = spread(contexts, -(-n_tokens // store.context_length))
    replacements = {
        "untouched": lambda residual: residual,
        "reconstruction": model.reconstruct,
        "zero_ablated": torch.zeros_like,
    }
    names = np.array(store.subset_names)
    together = logits_together(model.language_model)
    rows = []
    fidelities = collections.defaultdict(lambda: Fidelity(store.d_model))
    for batch in store.batches(contexts, together, "cross-entropy"):
        tokens, subsets = torch.from_numpy(batch.tokens), names[batch.subsets]
        counted = (tokens[:, 1:] != model.language_model.bos).numpy()
        values, expected = {"subset": subsets[:, 1:][counted]}, None
        for name, replace in replacements.items():
            logits = logits_of(model, tokens, torch.from_numpy(batch.kept), replace)
            losses, kl, predicted = losses_of(logits, tokens, expected)
            expected = predicted if expected is None else expected
            values[name] = losses[counted]
            if name == "reconstruction":
                values["kl"] = kl[counted]
        rows.append(pd.DataFrame(values))
        _add_fidelity(fidelities, model, batch.rows, subsets[batch.kept])
    rows = pd.concat(rows, ignore_index=True)
    grouped = pd.concat([rows.assign(subset="all"), rows]).groupby("subset", sort=False)
    table = grouped.mean().assign(n_tokens=grouped.size())
    for measure in ("fvu", "cosine", "l0"):
        table[measure] = [getattr(fidelities[name], measure) for name in table.index]
    return table


def logits_together(language_model: LanguageModel) -> int:
    """Tokens to run at once; each takes rows over the whole vocabulary: logits, probabilities."""
    n_words = len(read_out(language_model)[-1].weight)
    return tokens_together(language_model.device, 32 * n_words, elsewhere=1_024)


def _add_fidelity(
    fidelities: dict[str, Fidelity],
    encoder: FeatureEncoder,
    activations: np.ndarray,
    subsets: np.ndarray,
) -> None:
    """Add raw activations (rows, d_model) to the sums of their subset, and to those of all."""
    activations = torch.from_numpy(activations).to(encoder.norms.device)
    row, _, _, reconstruction = encoder.active_tensors(activations)
    n_active = torch.bincount(row, minlength=len(activations))
    for name in ("all", *np.unique(subsets)):
        rows = np.flatnonzero((subsets == name) | (name == "all"))
        rows = torch.from_numpy(rows).to(row.device)
        fidelities[name].add(activations[rows], reconstruction[rows], n_active[rows])


@torch.inference_mode()
def logits_of(
    model: FeatureModel,
    tokens: torch.Tensor,
    kept: torch.Tensor,
    replace: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Logits of each next token, shape (batch, context - 1, vocabulary)."""
    device = model.language_model.device
    kept = kept.to(device)[..., None]

    def replace_kept(residual):
        return torch.where(kept, replace(residual).to(residual.dtype), residual)

    with model.replaced(replace_kept):
        outputs = model.language_model.model(tokens.long().to(device), use_cache=False)
    return outputs.logits[:, :-1]


@torch.inference_mode()
def losses_of(
    logits: torch.Tensor, tokens: torch.Tensor, expected: list[torch.Tensor] | None
) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    """Cross-entropy of each next token, and the divergence of its prediction from an expected one.

    A context at a time, for log-probabilities over a whole vocabulary are large. ``expected`` are
    those by context; None for those of these logits.

    Returns:
        Two arrays (batch, context - 1), in nats; and the log-probabilities by context.
    """
    predicted = [context.float().log_softmax(dim=-1) for context in logits]
    targets = tokens[:, 1:, None].long().to(logits.device)
    pairs = zip(predicted, targets, strict=True)
    losses = [-context.gather(1, target)[:, 0] for context, target in pairs]
    divergence = torch.nn.functional.kl_div
    pairs = zip(predicted, expected or predicted, strict=True)
    kl = [divergence(q, p, reduction="none", log_target=True).sum(1) for q, p in pairs]
    return torch.stack(losses).cpu().numpy(), torch.stack(kl).cpu().numpy(), predicted


def study(analysis: Analysis) -> Findings:
    """Losses on ``N_LOSS_TOKENS`` held-out tokens, in all text and by corpus subset."""
    n_tokens = analysis.settings.n_loss_tokens
    table = measure_losses(analysis.model, analysis.store, analysis.held_out, n_tokens)
    names = ["untouched", "reconstruction", "zero_ablated", "kl", "n_tokens"]
    table["loss_recovered"] = loss_recovered(table)
    summary = {name: table.at["all", name].item() for name in names}  # a count stays whole
    words = (
        f"Cross-entropy {summary['untouched']:.3f} untouched, {summary['reconstruction']:.3f} with "
        f"the reconstruction, {summary['zero_ablated']:.3f} zero-ablated: "
        f"{loss_recovered(summary):.1%} of the loss recovered."
    )
    return Findings(summary, words, {"fidelity": table.reset_index()})


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """Losses in all text, and by corpus subset."""
    whole = catalogue.folder / "fidelity.png"
    by_subset = catalogue.folder / "fidelity_by_subset.png"
    plot_fidelity(catalogue.summary, whole)
    plot_fidelity_by_subset(catalogue.table("fidelity"), by_subset)
    return {
        "What the model loses with the reconstruction": whole,
        "In which kind of text it loses most": by_subset,
    }


def plot_fidelity(summary: dict, path: Path) -> None:
    """Next-token cross-entropy of the model untouched, reconstructed and ablated.

    Args:
        summary: Holds ``layer``, ``loss_recovered`` and ``cross_entropy``: ``untouched``,
            ``reconstruction``, ``zero_ablated``, in nats a token, and perhaps ``n_tokens``.
    """
    cross_entropy, layer = summary["cross_entropy"], summary["layer"]
    title = f"The reconstruction recovers {summary['loss_recovered']:.1%} of the loss"
    if "n_tokens" in cross_entropy:
        title += f" (n = {cross_entropy['n_tokens']:,} tokens)"
    names = ("untouched", f"layer {layer}\nreconstructed", f"layer {layer}\nzero-ablated")
    values = [cross_entropy[name] for name in ("untouched", "reconstruction", "zero_ablated")]
    with plots.picture(path, title, (7.5, 3.1)) as (_, axes):
        bars = axes.barh(names, values, 0.62, color=(plots.GREY, plots.BLUE, plots.ORANGE))
        axes.bar_label(bars, fmt="{:.3f}", padding=5, path_effects=plots.HALO)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        note = "100% recovered: as good as the untouched model; 0%: as bad as zeros"
        axes.set(title=note, xlabel="cross-entropy (nats a token)", xlim=(0, 1.12 * max(values)))


def plot_fidelity_by_subset(table: pd.DataFrame, path: Path) -> None:
    """What the reconstruction misses in each kind of text, the least first; dashed, in all text.

    Kinds of fewer than `LEAST_SHOWN` tokens are left out, unless all are.

    Args:
        table: Of `measure_losses`, with ``subset`` and ``loss_recovered``.
    """
    table = table.assign(fvu=100 * table.fvu, lost=100 * (1 - table.loss_recovered))
    overall, subsets = table.set_index("subset").loc["all"], table[table.subset != "all"]
    subsets = subsets[subsets.n_tokens >= min(LEAST_SHOWN, subsets.n_tokens.max())]
    subsets = subsets.sort_values("kl")
    title = f"The reconstruction misses least in {subsets.subset.iloc[0]}"
    title += f" (n = {overall.n_tokens:,.0f} tokens)"
    panels = (
        ("fvu", "Variance unexplained", "% of variance"),
        ("lost", "Loss not recovered", "% of what zeros lose"),
        ("kl", "KL from the untouched", "nats a token"),
    )
    names = [f"{row.subset}  (n = {row.n_tokens:,})" for row in subsets.itertuples()]
    size = (10, 1.4 + 0.27 * len(names))
    with plots.picture(path, title, size, ncols=3, sharey=True) as (_, grid):
        for axes, (column, heading, unit) in zip(grid, panels, strict=True):
            axes.barh(names, subsets[column], 0.66, color=plots.BLUE)
            axes.axvline(overall[column], color=plots.ORANGE, linestyle="--", linewidth=1.2)
            axes.set(title=f"{heading}; all text: {overall[column]:.3g}", xlabel=unit)
            axes.grid(axis="y", visible=False)
        grid[0].invert_yaxis()
