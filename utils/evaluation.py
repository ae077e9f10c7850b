"""What the language model loses when its residual stream is replaced by the reconstruction."""

from collections.abc import Callable

import keras
import numpy as np
import torch
from keras import ops
from tqdm import tqdm

from utils.activations import ActivationStore
from utils.autoencoder import SparseAutoencoder
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


def cross_entropies(
    language_model: LanguageModel,
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    contexts: range,
    n_tokens: int,
    batch_size: int = 1_024,
) -> dict[str, float]:
    """Mean cross-entropy of the next token, in nats, with the residual stream replaced or not.

    The stream is replaced at the positions that the store kept. BOS and norm outliers stay as they
    are in every case, since the autoencoder is not made for them; no prediction of a BOS counts.

    Args:
        contexts: Contexts of the store to take from, best those held out of training.
        n_tokens: Tokens to run, if ``contexts`` have so many.
        batch_size: Tokens run together; each takes a row of logits over the whole vocabulary.

    Returns:
        ``untouched``; with the ``reconstruction``; ``zero_ablated``; and ``n_tokens``, the number
        of predictions.
    """
    contexts = contexts[: -(-n_tokens // store.context_length)]
    per_batch = max(1, batch_size // store.context_length)
    replacements = {
        "untouched": lambda residual: residual,
        "reconstruction": lambda residual: split_reconstruction(autoencoder, residual)[0],
        "zero_ablated": torch.zeros_like,
    }
    totals = dict.fromkeys(replacements, 0.0)
    n_predictions = 0
    for start in tqdm(range(0, len(contexts), per_batch), "cross-entropy", unit="batch"):
        chosen = contexts[start : start + per_batch]
        tokens = torch.from_numpy(np.stack([store["tokens"][c] for c in chosen]))
        kept = torch.from_numpy(np.stack([store["kept"][c] for c in chosen]))
        counted = tokens[:, 1:] != language_model.bos
        n_predictions += int(counted.sum())
        for name, replace in replacements.items():
            losses = _losses(language_model, store.layer, tokens, kept, replace)
            totals[name] += float(losses[counted].sum())
    means = {name: total / n_predictions for name, total in totals.items()}
    return {**means, "n_tokens": n_predictions}


@torch.inference_mode()
def _losses(
    language_model: LanguageModel,
    layer: int,
    tokens: torch.Tensor,
    kept: torch.Tensor,
    replace: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Cross-entropy of each next token, shape (batch, context - 1), on the CPU."""
    device = language_model.device
    tokens, kept = tokens.long().to(device), kept.to(device)[..., None]

    def replace_kept(residual):
        return torch.where(kept, replace(residual).to(residual.dtype), residual)

    with replaced_residual(language_model.blocks[layer], replace_kept):
        logits = language_model.model(tokens, use_cache=False).logits[:, :-1]
    # Flat, for along another axis than the last the loss takes six times as long on a CPU.
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return losses.view(logits.shape[:2]).cpu()


def loss_recovered(cross_entropy: dict[str, float]) -> float:
    """Share of the loss from zero-ablation that the reconstruction wins back; 1 is the identity."""
    lost = cross_entropy["zero_ablated"] - cross_entropy["untouched"]
    return (cross_entropy["zero_ablated"] - cross_entropy["reconstruction"]) / lost
