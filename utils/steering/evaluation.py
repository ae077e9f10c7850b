"""What the language model loses when its residual stream is replaced by the reconstruction."""

import collections
from collections.abc import Callable

import keras
import numpy as np
import pandas as pd
import torch
from keras import ops
from tqdm import tqdm

from utils.activations.store import ActivationStore, spread
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.fidelity import Fidelity
from utils.language_model import LanguageModel, replaced_residual


def as_torch(values) -> torch.Tensor:
    """Cross from Keras to torch: a Keras tensor or weight as a torch tensor, without its history.

    Keras on its torch backend computes with torch tensors, so this copies nothing; the other way
    needs no function, since `keras.ops` takes torch tensors as they are.
    """
    assert keras.backend.backend() == "torch", "needs use_backend('torch')"
    return ops.convert_to_tensor(values).detach()


@torch.no_grad()
def split_reconstruction(
    autoencoder: SparseAutoencoder, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the autoencoder explains of a raw residual stream (..., d_model), and what it does not.

    Returns:
        ``reconstruction`` and ``error``, both of the residual's shape, in float32; their sum is
        the residual.
    """
    rows = residual.float()
    reconstruction = as_torch(autoencoder(rows.reshape(-1, rows.shape[-1]))).reshape(rows.shape)
    reconstruction = reconstruction.to(residual.device)
    return reconstruction, rows - reconstruction


def measure_losses(
    language_model: LanguageModel,
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    contexts: range,
    n_tokens: int,
    batch_size: int = 1_024,
) -> pd.DataFrame:
    """What the model loses when its residual stream is replaced, in all text and by corpus subset.

    The stream is replaced at the positions that the store kept. BOS and norm outliers stay as they
    are in every case, since the autoencoder is not made for them; no prediction of a BOS counts.

    Args:
        contexts: Contexts of the store to spread over, best those held out of training.
        n_tokens: Tokens to run, if ``contexts`` have so many.
        batch_size: Tokens run together; each takes a row of logits over the whole vocabulary.

    Returns:
        A row for ``"all"`` and for each subset: mean cross-entropy of the next token in nats,
        ``untouched``, with the ``reconstruction`` and ``zero_ablated``; ``kl``, the mean
        divergence of the reconstruction's prediction from the untouched one, in nats;
        ``n_tokens``, the number of predictions; ``fvu``, ``cosine`` and ``l0`` of the activations.
    """
    contexts = spread(contexts, -(-n_tokens // store.context_length))
    per_batch = max(1, batch_size // store.context_length)
    replacements = {
        "untouched": lambda residual: residual,
        "reconstruction": lambda residual: split_reconstruction(autoencoder, residual)[0],
        "zero_ablated": torch.zeros_like,
    }
    rows = []
    fidelities = collections.defaultdict(lambda: Fidelity(store.d_model))
    for start in tqdm(range(0, len(contexts), per_batch), "cross-entropy", unit="batch"):
        chosen = contexts[start : start + per_batch]
        tokens = torch.from_numpy(np.stack([store["tokens"][c] for c in chosen]))
        kept = np.stack([store["kept"][c] for c in chosen])
        subsets = np.array([store.subset_names(c) for c in chosen])
        counted = (tokens[:, 1:] != language_model.bos).numpy()
        values, expected = {"subset": subsets[:, 1:][counted]}, None
        for name, replace in replacements.items():
            logits = _logits(language_model, store.layer, tokens, torch.from_numpy(kept), replace)
            losses, kl, found = _losses(logits, tokens, expected)
            expected = found if expected is None else expected
            values[name] = losses[counted]
            if name == "reconstruction":
                values["kl"] = kl[counted]
        rows.append(pd.DataFrame(values))
        _add_fidelity(fidelities, autoencoder, store.kept_rows(chosen), subsets[kept])
    rows = pd.concat(rows, ignore_index=True)
    everything = rows.assign(subset="all")
    grouped = pd.concat([everything, rows]).groupby("subset", sort=False)
    table = grouped.mean().assign(n_tokens=grouped.size())
    for measure in ("fvu", "cosine", "l0"):
        table[measure] = pd.Series(
            {name: getattr(fidelities[name], measure) for name in table.index}
        )
    return table


def _add_fidelity(
    fidelities: dict[str, Fidelity],
    autoencoder: SparseAutoencoder,
    activations: np.ndarray,
    subsets: np.ndarray,
) -> None:
    """Add raw activations (rows, d_model) to the sums of their subset, and to those of all."""
    activations = activations.astype(np.float32)
    row, _, _, reconstruction = autoencoder.encode_active(activations)
    n_active = np.bincount(row, minlength=len(activations))
    for name in ("all", *np.unique(subsets)):
        own = slice(None) if name == "all" else subsets == name
        fidelities[name].add(activations[own], reconstruction[own], n_active[own])


@torch.inference_mode()
def _logits(
    language_model: LanguageModel,
    layer: int,
    tokens: torch.Tensor,
    kept: torch.Tensor,
    replace: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Logits of each next token, shape (batch, context - 1, vocabulary)."""
    device = language_model.device
    kept = kept.to(device)[..., None]

    def replace_kept(residual):
        return torch.where(kept, replace(residual).to(residual.dtype), residual)

    with replaced_residual(language_model.blocks[layer], replace_kept):
        return language_model.model(tokens.long().to(device), use_cache=False).logits[:, :-1]


@torch.inference_mode()
def _losses(
    logits: torch.Tensor, tokens: torch.Tensor, expected: list[torch.Tensor] | None
) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    """Cross-entropy of each next token, and the divergence of its prediction from an expected one.

    A context at a time, for log-probabilities over a whole vocabulary are large.

    Args:
        logits: Shape (batch, context - 1, vocabulary).
        tokens: Shape (batch, context).
        expected: Log-probabilities by context; None for those of these logits.

    Returns:
        Two arrays (batch, context - 1), in nats; and the log-probabilities by context.
    """
    found = [own.float().log_softmax(dim=-1) for own in logits]
    targets = tokens[:, 1:, None].long().to(logits.device)
    losses = [-own.gather(1, target)[:, 0] for own, target in zip(found, targets, strict=True)]
    pairs = zip(found, expected or found, strict=True)
    kl = [
        torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1) for q, p in pairs
    ]
    return torch.stack(losses).cpu().numpy(), torch.stack(kl).cpu().numpy(), found


def loss_recovered(cross_entropy: dict[str, float]) -> float:
    """Share of the loss from zero-ablation that the reconstruction wins back; 1 is the identity."""
    lost = cross_entropy["zero_ablated"] - cross_entropy["untouched"]
    return (cross_entropy["zero_ablated"] - cross_entropy["reconstruction"]) / lost
