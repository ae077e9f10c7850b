"""Neurons of the model's MLPs, and neurons in the place of features.

A neuron is an entry of the input to an MLP's last matrix: act(gate) · up in a LLaMA.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from utils.activations.store import ActivationStore, Contexts
from utils.language_model import (
    LanguageModel,
    replaced_output,
    residual_at,
    tokens_together,
    watched_passes,
)
from utils.settings import InputError
from utils.steering.feature_model import ActiveFeatures


class NoNeurons(InputError):
    """A block of the model has no MLP whose neurons every token runs through."""


@contextlib.contextmanager
def neurons_of(language_model: LanguageModel, n_blocks: int) -> Iterator[list[torch.Tensor]]:
    """While open, a list of the first blocks' neurons in the last forward pass, in order of block.

    The neurons of each are of shape (batch, context, d_mlp).

    Raises:
        NoNeurons: A block has none.
    """
    neurons = [torch.empty(0)] * n_blocks

    def keep(number, values):
        neurons[number] = values.reshape(*passes[0].tokens.shape, -1)

    with watched_passes(language_model) as passes, contextlib.ExitStack() as stack:
        for number, matrix in enumerate(_last_matrices(language_model, n_blocks)):
            handle = matrix.register_forward_pre_hook(
                lambda _module, inputs, number=number: keep(number, inputs[0])
            )
            stack.callback(handle.remove)
        yield neurons


@torch.inference_mode()
def _last_matrices(language_model: LanguageModel, n_blocks: int) -> list[nn.Module]:
    """The last matrix of the MLP of each of the first blocks, whatever its name.

    It is the last that writes a row of d_model numbers, if what it takes at a token is of that
    token alone. This is tried on two texts that have only their last token in common: what blocks
    and matrices give for it in the second text is replaced by what they give in the first, so that
    only a module that looks at other tokens, as attention does, can tell the texts apart.
    """
    blocks, last = language_model.blocks[:n_blocks], {}
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 4]])

    def same_last(values):
        rows = values.reshape(2, -1, values.shape[-1]).clone()
        rows[1, -1] = rows[0, -1]
        return rows.reshape(values.shape)

    def hold(number, module, values, output):
        if output[..., 0].numel() != tokens.numel():  # not a row for each token
            return None
        if output.shape[-1] == language_model.d_model:
            taken = values.reshape(2, -1, values.shape[-1])[:, -1].float()
            last[number] = module, bool((taken[0] - taken[1]).norm() <= 0.01 * taken[0].norm())
        return same_last(output)

    with contextlib.ExitStack() as stack:
        for number, block in enumerate(blocks):
            _require_no_experts(language_model.name, number, block)
            stack.enter_context(replaced_output(block, same_last))
            for matrix in _matrices(block):
                handle = matrix.register_forward_hook(
                    lambda module, inputs, output, number=number: hold(
                        number, module, inputs[0], output
                    )
                )
                stack.callback(handle.remove)
        residual_at(language_model, tokens, n_blocks - 1)
    for number in range(n_blocks):
        matrix, is_local = last.get(number, (None, False))
        if not is_local:
            raise NoNeurons(
                f"Neurons are left out: block {number} of {language_model.name} ends in no MLP."
            )
    return [last[number][0] for number in range(n_blocks)]


def _matrices(block: nn.Module) -> list[nn.Module]:
    """The modules of a block that are a product with a matrix."""
    return [
        module
        for module in block.modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]


def _require_no_experts(name: str, number: int, block: nn.Module) -> None:
    """Refuse a mixture of experts, whose matrices are a list, or lie in weights of three axes."""
    for module in block.modules():
        own = () if isinstance(module, nn.Conv1d) else module.parameters(recurse=False)
        if isinstance(module, nn.ModuleList) or any(p.ndim == 3 and len(p) > 1 for p in own):
            raise NoNeurons(
                f"Neurons are left out: block {number} of {name} is a mixture of experts, of which "
                "a token runs through a few."
            )


def draw_neurons(
    language_model: LanguageModel, layer: int, n_neurons: int, seed: int
) -> np.ndarray:
    """Numbers of neurons of a block, drawn at random."""
    with neurons_of(language_model, layer + 1) as neurons:
        residual_at(language_model, torch.tensor([[language_model.bos]]), layer)
    return np.random.default_rng(seed).permutation(neurons[-1].shape[-1])[:n_neurons]


def neurons_together(language_model: LanguageModel, n_blocks: int) -> int:
    """Tokens to run at once, so that their neurons of the first blocks are in memory, twice."""
    matrices = _last_matrices(language_model, n_blocks)
    width = sum(matrix.weight.numel() for matrix in matrices) // language_model.d_model
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
