"""Features against neurons: is a feature not merely a neuron of the model?

    r = Pearson correlation over tokens of a feature's activation and a neuron

with the neuron of the blocks up to the layer for which it is largest.

Reference: "Scaling Monosemanticity", Features vs. Neurons: for 82% of features no neuron of the
preceding layers has a Pearson correlation above 0.3.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils import plots
from utils.activations.store import ActivationStore, Contexts
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils.features.neurons import NoNeurons, neurons_of, neurons_together
from utils.features.sampling import LEAST_ACTIVE, draw_features
from utils.steering.feature_model import FeatureModel

LOW = 0.3  # the paper's line


class Correlations:
    """Pearson correlations between the columns of two matrices, whose rows come in batches."""

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
            _deviation(squares / self.n, mean)
            for squares, mean in zip(self.squares, means, strict=True)
        ]
        # Row by row of the left side, for the whole matrix may be the largest thing in memory.
        pearson = torch.empty(self.products.shape)
        for i, product in enumerate(self.products):
            covariance = product.cpu().double() / self.n - means[0][i] * means[1]
            both = deviations[0][i] * deviations[1]
            pearson[i] = torch.where(both > 0, covariance / both, 0.0)
        return pearson


def _deviation(mean_square: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Standard deviations; 0 where the variance is no more than rounding in float32."""
    variance = mean_square - mean.square()
    return torch.where(variance > 1e-6 * mean_square, variance, 0.0).sqrt()


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """``n_features``, their ``median`` correlation, the share ``at_most`` `LOW`; {} if no rows."""
    if table.empty:
        return {}
    return {
        "n_features": len(table),
        "median": float(table["correlation"].median()),
        "at_most": float((table["correlation"] <= LOW).mean()),
    }


@torch.inference_mode()
def correlate_with_neurons(
    model: FeatureModel,
    store: ActivationStore,
    contexts: Contexts,
    features: np.ndarray,
) -> pd.DataFrame:
    """For each feature the neuron that it correlates with most, of blocks up to the layer.

    The contexts run through the model again. Memory is 4 bytes for each pair of a feature and a
    neuron, whatever the number of tokens.

    Returns:
        A row a feature: ``feature, block, neuron, correlation``, the largest.
    """
    numbers = torch.as_tensor(np.array(features), device=model.language_model.device)
    together = neurons_together(model.language_model, store.layer + 1)
    correlations = None
    with neurons_of(model.language_model, store.layer + 1) as neurons:
        for batch in store.batches(contexts, together, "neurons"):
            kept = torch.from_numpy(batch.kept)
            residual = model.residual(torch.from_numpy(batch.tokens))[kept]
            activations = model.encode(residual, numbers)
            values = torch.cat([block[kept].float() for block in neurons], dim=1)
            if correlations is None:
                correlations = Correlations(len(numbers), values.shape[1], values.device)
            correlations.add(activations, values)
    largest, index = correlations.pearson().max(dim=1)
    width = correlations.products.shape[1] // (store.layer + 1)
    return pd.DataFrame(
        {
            "feature": features,
            "block": (index // width).numpy(),
            "neuron": (index % width).numpy(),
            "correlation": largest.numpy(),
        }
    )


def study(analysis: Analysis) -> Findings:
    """The neuron that each of ``N_STUDIED`` features correlates with most."""
    store, settings = analysis.store, analysis.settings
    contexts = store.sample(settings.n_neuron_tokens)
    frequency = analysis.features["frequency"].to_numpy()
    n_tokens = len(contexts) * store.context_length
    features = draw_features(frequency, n_tokens, settings.n_studied, settings.seed)
    try:
        table = correlate_with_neurons(analysis.model, store, contexts, features)
    except NoNeurons as missing:
        return Findings(None, str(missing))
    if table.empty:
        return Findings({}, tables={"neurons": table})
    summary = summarise(table)
    words = (
        f"Neurons: {summary['at_most']:.0%} of {summary['n_features']:,} features, of those active "
        f"on at least {LEAST_ACTIVE} of the tokens, correlate at most {LOW} with any neuron of the "
        "model up to the layer."
    )
    return Findings(summary, words, {"neurons": table})


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """The largest correlation of each feature with a neuron."""
    correlations = catalogue.table("neurons")["correlation"].to_numpy()
    path = catalogue.folder / "neurons.png"
    share, n = (correlations <= LOW).mean(), len(correlations)
    title = f"{share:.0%} of features correlate at most {LOW} with any neuron (n = {n:,} features)"
    with plots.picture(path, title, (7.5, 3.6)) as (_, axes):
        bins = np.arange(0, 1.0001, 0.025)
        _, _, bars = axes.hist(correlations, bins, edgecolor="white", linewidth=0.5)
        for bar, start in zip(bars, bins, strict=False):
            bar.set_facecolor(plots.BLUE if start < LOW - 1e-9 else plots.PALE)
        axes.axvline(LOW, color=plots.GREY, linestyle="--", linewidth=1)
        axes.set(xlabel="largest Pearson correlation with a neuron of the blocks up to the layer")
        axes.set(xlim=(0, 1), ylabel="features")
    return {"Is a feature merely a neuron?": path}
