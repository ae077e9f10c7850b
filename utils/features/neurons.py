"""Neurons of the model's MLPs, and neurons in the place of features.

A neuron is an entry of the input to an MLP's last matrix: act(gate) · up in a LLaMA.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from utils.activations.store import ActivationStore, Contexts
from utils.language_model import LanguageModel, residual_at, tokens_together
from utils.settings import require
from utils.steering.feature_model import ActiveFeatures


@contextlib.contextmanager
def neurons_of(language_model: LanguageModel, n_blocks: int) -> Iterator[list[torch.Tensor]]:
    """While open, a list of the first blocks' neurons in the last forward pass, in order of block.

    The neurons of each are of shape (batch, context, d_mlp).
    """
    neurons: list[torch.Tensor] = []

    def start(_module, _inputs):
        neurons.clear()

    def keep(_module, inputs):
        neurons.append(inputs[0])

    blocks = language_model.blocks[:n_blocks]
    handles = [blocks[0].register_forward_pre_hook(start)]
    handles += [_last_matrix(block).register_forward_pre_hook(keep) for block in blocks]
    try:
        yield neurons
    finally:
        for handle in handles:
            handle.remove()


def _last_matrix(block: nn.Module) -> nn.Linear:
    """The last matrix of a block's MLP, whatever its name.

    Raises:
        InputError: The MLP is a mixture of experts.
    """
    matrices = [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and "attn" not in name and "attention" not in name
    ]
    widths = [matrix.out_features for matrix in matrices]
    require(
        len(matrices) in (2, 3) and widths[-1] == matrices[0].in_features,
        "The studies neurons and explanations need blocks with one MLP of two or three matrices; "
        f"those of {type(block).__name__} write {widths}. Leave these studies out of --studies.",
    )
    return matrices[-1]


def draw_neurons(
    language_model: LanguageModel, layer: int, n_neurons: int, seed: int
) -> np.ndarray:
    """Numbers of neurons of a block, drawn at random."""
    width = _last_matrix(language_model.blocks[layer]).in_features
    return np.random.default_rng(seed).permutation(width)[:n_neurons]


def neurons_together(language_model: LanguageModel, n_blocks: int) -> int:
    """Tokens to run at once, so that their neurons of the first blocks are in memory, twice."""
    width = sum(_last_matrix(block).in_features for block in language_model.blocks[:n_blocks])
    return tokens_together(language_model.device, 16 * width, elsewhere=2_048)


@torch.inference_mode()
def neuron_values(
    language_model: LanguageModel,
    store: ActivationStore,
    contexts: Contexts,
    chosen: np.ndarray,
    k: int,
) -> np.ndarray:
    """Chosen neurons of the block ``store.layer``, (contexts, context_length, neurons), float32.

    They are 0 where negative, or not among the block's ``k`` largest on the token.
    """
    values, together = [], neurons_together(language_model, store.layer + 1)
    with neurons_of(language_model, store.layer + 1) as neurons:
        for batch in store.batches(contexts, together, "neurons"):
            residual_at(language_model, torch.from_numpy(batch.tokens), store.layer)
            block = neurons[-1].float()
            smallest = block.topk(k, dim=-1).values[..., -1:]
            largest = torch.where(block >= smallest, block.clamp_min(0), 0)[..., chosen]
            values.append(largest.cpu().numpy())
    return np.concatenate(values)


class NeuronStore(ActivationStore):
    """Activations whose rows are neurons, for a pass in place of the residual stream.

    Args:
        store: Holds the tokens and their sources.
        values: Of some of its contexts, shape (contexts, context_length, neurons).
        contexts: The numbers of these.
    """

    def __init__(self, store: ActivationStore, values: np.ndarray, contexts: Contexts):
        vars(self).update(vars(store))
        self._values = dict(zip(contexts, values, strict=True))
        self.d_model = values.shape[-1]

    def kept_rows(self, contexts: Iterable[int]) -> np.ndarray:
        return np.concatenate([self._values[c][self.read("kept", [c])[0]] for c in contexts])


class TopNeurons:
    """Neurons of a `NeuronStore` as features: each is active where its value is positive."""

    def __init__(self, n_neurons: int):
        self.n_latents = n_neurons

    def active_tensors(self, activations: torch.Tensor) -> ActiveFeatures:
        row, neuron = torch.nonzero(activations > 0, as_tuple=True)
        return ActiveFeatures(row, neuron, activations[row, neuron], activations)

    def active(self, activations: np.ndarray) -> ActiveFeatures:
        return self.active_tensors(torch.from_numpy(activations)).numpy()
