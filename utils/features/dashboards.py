"""Dashboards: what the pages of other tools show of a feature, read from a finished analysis.

One feature after another, so that a dictionary of any size fits in memory. neuronpedia,
saedashboard and upload turn them into what each tool reads.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow
from tqdm import tqdm

from utils.characters import readable, whole_characters
from utils.features.catalogue import Catalogue
from utils.features.examples import N_BUCKETS
from utils.settings import Json, require

TOGETHER = 1_024  # features whose examples are in memory at once
PART = "\ufffd"  # in place of a token at a peak that is a part of a character and nothing else
NUL = "\u2400"  # the sign for U+0000, which PostgreSQL, and so Neuronpedia, cannot store
# The rules of Neuronpedia for new models and source sets.
MODEL = re.compile(r"(?!.*(--|\.\.))[a-z][a-z0-9.-]{0,30}[a-z0-9]")
SET = re.compile(r"(?!.*--)(?!neurons$)([a-z][a-z0-9-]*)?[a-z0-9]")


class Source(NamedTuple):
    """Where features belong on Neuronpedia, and the texts that they were found in."""

    model: str
    layer: int
    set_name: str
    model_name: str  # as the project names it
    dataset: str
    n_contexts: int
    context_length: int

    @property
    def id(self) -> str:
        """The source's name among those of the model: ``15-topk-res-65k``."""
        return f"{self.layer}-{self.set_name}"


class Interval(NamedTuple):
    """A group of examples: activations from ``low`` to ``high``, and the share of a feature's.

    Of the highest, ``low`` and ``share`` are −1, as in SAEDashboard.
    """

    low: float
    high: float
    share: float


class Activation(NamedTuple):
    """An example: texts of tokens, none empty, the feature's activation on each, and its peak."""

    tokens: list[str]
    values: list[float]
    peak: int
    interval: Interval


class Dashboard(NamedTuple):
    """All that is shown of one feature; a dead one has no activations."""

    feature: int
    density: float  # share of tokens on which it is active
    maximum: float
    explanation: str  # empty: there is none
    promoted: list[tuple[str, float]]  # tokens and values, the largest first
    suppressed: list[tuple[str, float]]
    neighbours: list[tuple[int, float]]  # features and cosines of decoder rows
    histogram: list[tuple[float, int]]  # middles of bins of activation, and counts of tokens
    activations: list[Activation]


def model_id(model_name: str) -> str:
    """A model's name by the rules of Neuronpedia, llama-3.2-3b for meta-llama/Llama-3.2-3B.

    Models that it has may be named otherwise there. ``model_name`` is a hub name, a folder, or
    "embedded".
    """
    return re.sub(r"[^a-z0-9.]+|\.\.+", "-", Path(model_name).name.lower()).strip("-.")


def default_set(kind: str, n_latents: int) -> str:
    """A name for a source set by the rules of Neuronpedia: topk-res-65k."""
    size = f"{n_latents // 1_000}k" if n_latents >= 1_000 else str(n_latents)
    return f"{kind.replace('_', '-')}-res-{size}"


def parse_source(name: str) -> tuple[str, int, str]:
    """Model, layer and set of ``model/layer-set``; raises `InputError` if it is none."""
    model, _, source = name.partition("/")
    layer, _, set_name = source.partition("-")
    require(
        bool(MODEL.fullmatch(model) and SET.fullmatch(set_name)) and layer.isdecimal(),
        "NEURONPEDIA_SOURCE must be MODEL/LAYER-SET in small letters, digits and single hyphens, "
        f"such as llama-3.2-3b/15-topk-res-65k; it is {name!r}.",
    )
    return model, int(layer), set_name


def read_dashboards(catalogue: Catalogue, words: str, first: int = 0) -> Iterator[Dashboard]:
    """The dashboard of every feature from ``first`` on, in order.

    A progress bar in these ``words`` shows how many were taken.
    """
    texts = np.array([text.replace("\0", NUL) for text in catalogue.token_texts], object)
    is_part = np.array([readable(text) != text for text in texts])
    n = len(catalogue.features)
    with tqdm(desc=words, total=n, initial=first, unit="feature", unit_scale=True) as progress:
        for start, examples in catalogue.example_blocks(TOGETHER, first):
            features = catalogue.features.iloc[start : start + TOGETHER]
            groups = _activations(examples, features, texts, is_part)
            for row, activations in zip(_rows(features), groups, strict=True):
                progress.update()
                yield _dashboard(row, activations)


def _rows(features: pd.DataFrame) -> Iterator[dict[str, Json]]:
    """The rows of the table of features, as plain values."""
    columns = [features[name].tolist() for name in features]
    for values in zip(*columns, strict=True):
        yield dict(zip(features, values, strict=True))


def _dashboard(row: dict[str, Json], activations: list[Activation]) -> Dashboard:
    counts = np.trim_zeros(row["histogram"], "b")
    width = row["histogram_range"] / len(row["histogram"])
    middles = rounded((np.arange(len(counts)) + 0.5) * width)
    explanation = row.get("explanation")
    words = explanation if isinstance(explanation, str) and explanation else row["label"] or ""
    neighbours = zip(as_list(row["neighbours"]), as_list(row["neighbour_cosines"]), strict=True)
    return Dashboard(
        row["feature"],
        *rounded([row["frequency"], row["max_activation"]]),
        words.replace("\0", NUL),
        _weighed(row, "promoted"),
        _weighed(row, "suppressed"),
        list(neighbours),
        list(zip(middles, map(int, counts), strict=True)),
        activations,
    )


def _weighed(row: dict[str, Json], name: str) -> list[tuple[str, float]]:
    """Promoted or suppressed tokens with their values; none in analyses of earlier versions."""
    values = rounded(as_list(row.get(f"{name}_values")))
    pairs = zip(as_list(row[f"{name}_tokens"]), values, strict=bool(values))
    return [(text.replace("\0", NUL), value) for text, value in pairs if text]


def _activations(
    examples: pyarrow.Table, features: pd.DataFrame, texts: np.ndarray, is_part: np.ndarray
) -> Iterator[list[Activation]]:
    """The activations of each of some features, from the examples of all of them.

    ``texts`` are those of tokens, the last of none; ``is_part``: whether one needs its neighbours'.
    """
    tokens, values = (
        examples[name].combine_chunks().flatten().to_numpy().reshape(len(examples), -1)
        for name in ("tokens", "activations")
    )
    rows = zip(
        texts[tokens].tolist(), values.tolist(), is_part[tokens].any(axis=1).tolist(),
        examples["peak"].to_pylist(), examples["bucket"].to_pylist(), strict=True,
    )  # fmt: skip
    counts = np.bincount(
        examples["feature"].to_numpy() - features.index[0], minlength=len(features)
    )
    histograms = zip(
        features["histogram"], features["histogram_range"], features["max_activation"], strict=True
    )
    for count, (histogram, end, maximum) in zip(counts, histograms, strict=True):
        between = intervals(histogram, end, maximum) if count else []
        yield [
            _activation(pieces, activations, has_part, peak, between[bucket])
            for pieces, activations, has_part, peak, bucket in itertools.islice(rows, count)
        ]


def _activation(
    pieces: list[str], values: list[float], has_part: bool, peak: int, interval: Interval
) -> Activation:
    """An example, without the tokens that have no text: none there, or a part of a character."""
    if has_part:
        pieces = whole_characters(pieces, values)
    pieces[peak] = pieces[peak] or PART
    values = rounded(values)
    if "" in pieces:
        shown = [place for place, text in enumerate(pieces) if text]
        pieces, values = ([one[place] for place in shown] for one in (pieces, values))
        peak = shown.index(peak)
    return Activation(pieces, values, peak, interval)


def shared_fields(dashboard: Dashboard) -> dict[str, Json]:
    """What both tools' features have by the same names; empty lists for what is not known here."""
    unknown = (
        "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
        "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
        "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    )  # fmt: skip
    return {
        **{name: [] for name in unknown},
        "neg_str": [text for text, _ in dashboard.suppressed],
        "neg_values": [value for _, value in dashboard.suppressed],
        "pos_str": [text for text, _ in dashboard.promoted],
        "pos_values": [value for _, value in dashboard.promoted],
        "frac_nonzero": dashboard.density,
        "freq_hist_data_bar_heights": [count for _, count in dashboard.histogram],
        "freq_hist_data_bar_values": [middle for middle, _ in dashboard.histogram],
    }


def intervals(histogram: Sequence[int], end: float, maximum: float) -> list[Interval]:
    """By bucket, the interval that its examples are from: the highest, then downwards to 0.

    Args:
        histogram: Counts of tokens in equal bins of activation from 0 to ``end``.
        maximum: The largest activation.
    """
    below = np.r_[0, np.cumsum(histogram)] / max(1, np.sum(histogram))
    edges = maximum * (1 - np.arange(N_BUCKETS + 1) / N_BUCKETS)
    shares = -np.diff(np.interp(edges, np.linspace(0, end, len(below)), below))
    edges, shares = rounded(edges), rounded(shares)
    downwards = zip(edges[1:], edges[:-1], shares, strict=True)
    return [Interval(-1.0, edges[0], -1.0), *(Interval(*each) for each in downwards)]


def rounded(values: Sequence[float]) -> list[float]:
    """Numbers to four significant digits."""
    return [float(f"{value:.4g}") if value else 0.0 for value in values]


def as_list(values: object) -> list:
    """A cell of a list column, which may be missing."""
    return values if isinstance(values, list) else []
