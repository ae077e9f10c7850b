"""Features against neurons: is a feature not merely a neuron of the model?

A neuron is an entry of what an MLP's last product takes in: act(gate) · up in a LLaMA. Features are
correlated over tokens with every neuron of the blocks up to their own layer.

Reference: "Scaling Monosemanticity", Features vs. Neurons: for 82% of features no neuron of the
preceding layers has a Pearson correlation above 0.3.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from utils.activations.store import ActivationStore
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.features.analysis import Analysis, Findings
from utils.language_model import LanguageModel, residual_at
from utils.steering.clamps import encode

LEAST_ACTIVE = 30  # tokens of the sample
LOW = 0.3  # the paper's line
N_TOGETHER = 2_048  # tokens whose neurons, up to the layer, are in memory


@contextlib.contextmanager
def neurons_of(language_model: LanguageModel, n_blocks: int) -> Iterator[list[torch.Tensor]]:
    """While open, a list of the neurons of the first blocks: (batch, context, d_mlp) each.

    It holds those of the last forward pass, in order of block.
    """
    found: list[torch.Tensor] = []

    def start(_module, _inputs):
        found.clear()

    def keep(_module, inputs):
        found.append(inputs[0])

    blocks = language_model.blocks[:n_blocks]
    handles = [blocks[0].register_forward_pre_hook(start)]
    handles += [block.mlp.down_proj.register_forward_pre_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Correlations:
    """Pearson correlations of the columns of a stream of pairs of matrices."""

    def __init__(self, n_left: int, n_right: int, device: torch.device):
        self.n = 0
        # On the CPU, for not every accelerator has float64.
        self.sums = [torch.zeros(n, dtype=torch.float64) for n in (n_left, n_right)]
        self.squares = [torch.zeros(n, dtype=torch.float64) for n in (n_left, n_right)]
        self.products = torch.zeros(n_left, n_right, device=device)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add rows: left (rows, n_left), right (rows, n_right), float32."""
        self.n += len(left)
        for side, values in enumerate((left, right)):
            self.sums[side] += values.sum(dim=0).cpu()
            self.squares[side] += values.square().sum(dim=0).cpu()
        self.products.addmm_(left.T, right)

    def pearson(self) -> torch.Tensor:
        """Shape (n_left, n_right); 0 where a column does not vary."""
        means = [total / self.n for total in self.sums]
        deviations = [
            (squares / self.n - mean.square()).clamp_min(0).sqrt()
            for squares, mean in zip(self.squares, means, strict=True)
        ]
        # Row by row of the left side, for the whole may be the largest thing in memory.
        pearson = torch.empty(self.products.shape)
        for i, product in enumerate(self.products):
            covariance = product.cpu().double() / self.n - means[0][i] * means[1]
            both = deviations[0][i] * deviations[1]
            pearson[i] = torch.where(both > 1e-12, covariance / both, 0.0)
        return pearson


def draw_features(frequency: np.ndarray, n_tokens: int, n_features: int, seed: int) -> np.ndarray:
    """Numbers of features drawn at random among those to be active on `LEAST_ACTIVE` of the tokens.

    Of a rarer one the largest of thousands of correlations would be chance.
    """
    common = np.flatnonzero(frequency * n_tokens >= LEAST_ACTIVE)
    return np.sort(np.random.default_rng(seed).permutation(common)[:n_features])


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """``n_features``, their ``median`` correlation, and the share ``at_most`` `LOW`.

    Nothing if no feature is active often enough.
    """
    if table.empty:
        return {}
    return {
        "n_features": len(table),
        "median": float(table["correlation"].median()),
        "at_most": float((table["correlation"] <= LOW).mean()),
    }


@torch.inference_mode()
def correlate_with_neurons(
    language_model: LanguageModel,
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    contexts: range,
    features: np.ndarray,
    batch_size: int,
) -> pd.DataFrame:
    """For each feature the neuron that it correlates with most, of blocks up to the layer.

    Memory is 4 bytes for each pair of a feature and a neuron, whatever the number of tokens.

    Args:
        contexts: Contexts of the store to run through the model again.
        features: Numbers of the features, shape (n_features,).
        batch_size: Tokens run together.

    Returns:
        A row a feature: ``feature, block, neuron, correlation``, the largest.
    """
    chosen = torch.as_tensor(np.array(features), device=language_model.device)
    per_batch = max(1, batch_size // store.context_length)
    found = None
    with neurons_of(language_model, store.layer + 1) as neurons:
        for start in tqdm(range(0, len(contexts), per_batch), "neurons", unit="batch"):
            some = contexts[start : start + per_batch]
            tokens = torch.from_numpy(np.stack([store["tokens"][c] for c in some])).long()
            kept = torch.from_numpy(np.stack([store["kept"][c] for c in some]))
            residual = residual_at(language_model, tokens, store.layer)[kept].float()
            latents = encode(autoencoder, residual, chosen)
            values = torch.cat([block[kept].float() for block in neurons], dim=1)
            if found is None:
                found = Correlations(len(chosen), values.shape[1], values.device)
            found.add(latents, values)
    largest, at = found.pearson().max(dim=1)
    width = found.products.shape[1] // (store.layer + 1)
    return pd.DataFrame(
        {
            "feature": features,
            "block": (at // width).numpy(),
            "neuron": (at % width).numpy(),
            "correlation": largest.numpy(),
        }
    )


def draw_neurons(
    language_model: LanguageModel, layer: int, n_neurons: int, seed: int
) -> np.ndarray:
    """Numbers of neurons of a block, drawn at random."""
    width = language_model.blocks[layer].mlp.down_proj.in_features
    return np.random.default_rng(seed).permutation(width)[:n_neurons]


@torch.inference_mode()
def neuron_values(
    language_model: LanguageModel,
    store: ActivationStore,
    contexts: range,
    chosen: np.ndarray,
    k: int,
) -> np.ndarray:
    """Some neurons of the block ``store.layer`` where they are among the ``k`` largest of a token.

    Returns:
        Shape (contexts, context_length, neurons), float16; 0 elsewhere, and where negative.
    """
    values = np.zeros((len(contexts), store.context_length, len(chosen)), np.float16)
    per_batch = max(1, N_TOGETHER // store.context_length)
    with neurons_of(language_model, store.layer + 1) as found:
        for start in tqdm(range(0, len(contexts), per_batch), "neurons", unit="batch"):
            some = contexts[start : start + per_batch]
            tokens = torch.from_numpy(np.stack([store["tokens"][c] for c in some])).long()
            residual_at(language_model, tokens, store.layer)
            block = found[-1].float()
            least = block.topk(k, dim=-1).values[..., -1:]
            largest = torch.where(block >= least, block.clamp_min(0), 0)[..., chosen]
            values[start : start + len(some)] = largest.clamp_max(6e4).cpu().numpy()
    return values


class NeuronStore:
    """Activations whose rows are neurons, for a pass that else reads the residual stream.

    Args:
        store: Where the tokens and their sources are.
        values: Of its first contexts, shape (contexts, context_length, neurons).
    """

    def __init__(self, store: ActivationStore, values: np.ndarray):
        self._store, self._values = store, values
        self.d_model = values.shape[-1]

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def __getitem__(self, array: str):
        return self._store[array]

    def kept_rows(self, contexts: Iterable[int]) -> np.ndarray:
        return np.concatenate([self._values[c][self._store["kept"][c]] for c in contexts])


class TopNeurons:
    """Neurons as latents of a `NeuronStore`: each active where its value is positive."""

    def __init__(self, n_neurons: int):
        self.n_latents = n_neurons

    def decoder_norms(self) -> np.ndarray:
        return np.ones(self.n_latents, np.float32)

    def encode_active(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        row, neuron = np.nonzero(rows > 0)
        return row, neuron, rows[row, neuron], rows


def study(analysis: Analysis) -> Findings:
    """The neuron that each of ``N_STUDIED`` features correlates with most, and how often little."""
    store, settings = analysis.store, analysis.settings
    contexts = store.first(settings.n_neuron_tokens)
    frequent = draw_features(
        analysis.features["frequency"].to_numpy(),
        len(contexts) * store.context_length,
        settings.n_studied,
        settings.seed,
    )
    correlations = correlate_with_neurons(
        analysis.language_model, analysis.autoencoder, store, contexts, frequent, N_TOGETHER
    )
    found = summarise(correlations)
    words = (
        f"Neurons: {found['at_most']:.0%} of {found['n_features']:,} features, of those active on "
        f"at least {LEAST_ACTIVE} of the tokens, correlate at most {LOW} with any neuron of the "
        "model up to the layer."
        if found
        else ""
    )
    return Findings(found, words, {"neurons": correlations})
