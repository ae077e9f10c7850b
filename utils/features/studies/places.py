"""Places: the tokens each feature's direction promotes, its neighbours, its place on a map.

    promoted token    the largest of  unembedding(norm(W_dec,i)), both without their constants
    neighbour         the largest cosine of decoder rows

Reference: "Scaling Monosemanticity", Feature Survey, whose map is a UMAP of decoder directions.
"""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import torch
from adjustText import adjust_text
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from utils import plots
from utils.characters import readable
from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import N_NEIGHBOURS, N_PROMOTED, Catalogue, list_column
from utils.features.geometry import map_directions, nearest
from utils.language_model import LanguageModel, read_out

MIXED, OTHER = "mixed (no subset has half)", "other subsets"


@torch.inference_mode()
def promoted_tokens(
    language_model: LanguageModel, directions: np.ndarray, token_texts: list[str], batch: int = 512
) -> pd.DataFrame:
    """The tokens whose logits each feature alone raises and lowers most.

    A decoder row, of ``directions`` (n_latents, d_model), passes the final norm and the unembedding
    without their biases; the norm's division is the same for all tokens and left out. A token's
    logit is counted in standard deviations of that token over all features, for otherwise rare
    tokens of long unembedding rows lead every list.

    Returns:
        Columns ``promoted_tokens`` and ``suppressed_tokens``, each a list of texts, and
        ``promoted_values`` and ``suppressed_values``, their logits in these standard deviations.
    """
    *norm, head = copy.deepcopy(read_out(language_model)).float()
    norm = torch.nn.Sequential(*norm)
    rows = torch.from_numpy(directions.copy()).to(language_model.device)
    rows = rows - rows.mean(dim=0)
    basis = torch.eye(rows.shape[1], device=rows.device)
    # A norm divides every axis by the same; what does not change sign with its input is a bias.
    rows = rows @ ((norm(basis) - norm(-basis)) / 2)
    basis = torch.eye(rows.shape[1], device=rows.device)
    # Some models pad their unembedding beyond the tokens there are.
    unembedding = (head(basis) - head(torch.zeros_like(basis[:1]))).T[: len(token_texts)]
    covariance = rows.T @ rows / len(rows)
    deviation = (unembedding @ covariance).mul(unembedding).sum(dim=1).sqrt()
    unembedding = unembedding / deviation.clamp_min(1e-9)[:, None]
    bos = language_model.bos
    readable_texts = [*map(readable, token_texts)]
    readable_texts[bos] = language_model.tokenizer.decode([bos])
    texts = pyarrow.array(readable_texts)
    n = min(N_PROMOTED, len(unembedding))
    found = {"promoted": [], "suppressed": []}
    for block in rows.split(batch):
        scores = block @ unembedding.T
        for blocks, signed in zip(found.values(), (scores, -scores), strict=True):
            tokens = signed.topk(n).indices
            blocks.append((tokens.int().cpu(), scores.gather(1, tokens).cpu()))
    columns, lengths = {}, [n] * len(rows)
    for name, blocks in found.items():
        tokens, values = (torch.cat(parts).flatten().numpy() for parts in zip(*blocks, strict=True))
        columns[f"{name}_tokens"] = list_column(texts.take(tokens), lengths)
        columns[f"{name}_values"] = list_column(values, lengths)
    return pd.DataFrame(columns)


def neighbour_table(directions: np.ndarray, alive: np.ndarray) -> pd.DataFrame:
    """The `N_NEIGHBOURS` living features nearest to each living one, the feature itself left out.

    Args:
        directions: Decoder rows, shape (n_latents, d_model).
        alive: Shape (n_latents,), bool.

    Returns:
        Columns ``neighbours``, lists of feature numbers, the nearest first, and
        ``neighbour_cosines``; empty lists for dead features.
    """
    numbers = np.flatnonzero(alive)
    indices, cosines = nearest(directions[numbers], directions[numbers], N_NEIGHBOURS + 1)
    others = indices != np.arange(len(numbers))[:, None]  # of equals itself need not be the first
    others &= others.cumsum(axis=1) <= N_NEIGHBOURS
    lengths = np.zeros(len(alive), np.int64)
    lengths[numbers] = others.sum(axis=1)
    rounded = cosines[others].round(4).astype(np.float64)
    return pd.DataFrame(
        {
            "neighbours": list_column(numbers[indices[others]], lengths),
            "neighbour_cosines": list_column(rounded, lengths),
        }
    )


def study(analysis: Analysis) -> Findings:
    """Promoted and suppressed tokens, neighbours and the place on the map of every feature."""
    settings = analysis.settings
    directions, alive = analysis.autoencoder.directions(), ~analysis.features["dead"].to_numpy()
    columns = dict(promoted_tokens(analysis.language_model, directions, analysis.token_texts))
    columns |= dict(neighbour_table(directions, alive))
    places = map_directions(directions, alive, settings.seed, settings.map_features)
    columns["umap_x"], columns["umap_y"] = places.T
    n_mapped, n_alive = int(np.isfinite(places[:, 0]).sum()), int(alive.sum())
    sample = {"mapped": n_mapped, "alive": n_alive} if 0 < n_mapped < n_alive else None
    return Findings(sample, columns=columns)


def draw(catalogue: Catalogue) -> dict[str, Path]:
    """The map, if there is one."""
    if not catalogue.features["umap_x"].notna().any():
        return {}
    plot_umap(catalogue.features, catalogue.folder / "umap.png")
    caption, sample = "Features by the direction they write", catalogue.summary.get("places")
    if sample:
        caption += f" (a random sample of {sample['mapped']:,} of {sample['alive']:,})"
    return {caption: catalogue.folder / "umap.png"}


def plot_umap(features: pd.DataFrame, path: Path, n_labels: int = 25) -> None:
    """A map of the decoder directions, coloured by the corpus subset a feature belongs to.

    Features with less than half of their activation in one subset are grey.

    Args:
        features: Columns ``umap_x, umap_y`` (NaN where dead), ``frequency, label, top_subset,
            top_subset_share``.
    """
    # Grey lowest; then the most frequent first, so that no large dot hides a small one.
    drawn = features[features.umap_x.notna()].sort_values("frequency", ascending=False)
    drawn = drawn.sort_values("top_subset_share", key=lambda share: share >= 0.5, kind="stable")
    mixed = drawn.top_subset_share < 0.5
    subsets = drawn.top_subset[~mixed].value_counts().index[: len(plots.COLOURS)]
    colours = {OTHER: "#8D939B", MIXED: plots.PALE}
    colours |= dict(zip(subsets, plots.COLOURS, strict=False))
    group = drawn.top_subset.where(drawn.top_subset.isin(subsets), OTHER).mask(mixed, MIXED)
    counts = group.value_counts()
    title = f"{len(drawn):,} features, all of them active in one kind of text alone"
    if drawn.top_subset.nunique() > 1:
        title = f"{(~mixed).sum():,} of {len(drawn):,} features have half of their activation in "
        title += "one kind of text"
    with plots.picture(path, title, (11, 8)) as (figure, axes):
        points = drawn[["umap_x", "umap_y"]].to_numpy()
        grown = np.clip(np.log10(drawn.frequency) / 4 + 1.25, 0, 1)  # 1 in 100,000 to 1 in 10
        areas = np.clip(60_000 / max(1, len(drawn)), 3, 40) * (0.4 + 2.4 * grown**1.5)
        axes.scatter(*points.T, areas, group.map(colours).tolist(), alpha=0.85, linewidths=0)
        note = "UMAP of decoder directions by cosine; larger dots: active on more tokens"
        axes.set(title=note, aspect="equal", adjustable="datalim")
        axes.set_axis_off()
        dots = [Line2D([], [], ls="", marker="o", c=colours[name]) for name in counts.index]
        names = [rf"{name}  {n:,}".replace("$", r"\$") for name, n in counts.items()]
        style = {"title": "Top subset, features", "alignment": "left", "labelspacing": 0.8}
        figure.legend(dots, names, loc="outside right upper", **style)
        _write_labels(axes, drawn, points, n_labels)


def _write_labels(axes: Axes, drawn: pd.DataFrame, points: np.ndarray, n_labels: int) -> None:
    """Label features spread over the map, beside one another."""
    texts = []
    for i in _spread_features(drawn, points, n_labels):
        axes.plot(*points[i], "o", ms=5, mfc="none", mec=plots.INK, mew=0.8)
        label = _short(drawn.label.iloc[i])
        style = {"fontsize": 7.5, "parse_math": False, "path_effects": plots.HALO}
        texts.append(axes.text(*points[i], label, **style))
    line = {"arrowstyle": "-", "color": plots.INK, "linewidth": 0.6}
    # A number of rounds, not of seconds: the same picture on every machine.
    adjust_text(texts, ax=axes, iter_lim=300, expand=(1.1, 1.4), arrowprops=line)


def _spread_features(drawn: pd.DataFrame, points: np.ndarray, n_labels: int) -> list[int]:
    """Indices of features to label: words and the most specific first, far apart, none twice."""
    glyphs = font_manager.get_font(font_manager.findfont(plots.FONT)).get_charmap()
    wordless = ~drawn.label.str.contains(r"[^\W\d_]{3}")
    order = np.lexsort((-drawn.top_subset_share, wordless))
    spacing = 0.6 * np.sqrt(np.ptp(points, axis=0).prod() / max(1, n_labels))
    distance = np.full(len(points), np.inf)  # to the nearest chosen one
    chosen, labels = [], set()
    for i in order:
        label = _short(drawn.label.iloc[i])
        can_draw = label and label not in labels and glyphs.keys() >= set(map(ord, label))
        if len(chosen) < n_labels and can_draw and distance[i] >= spacing:
            chosen.append(int(i))
            labels.add(label)
            distance = np.minimum(distance, np.hypot(*(points - points[i]).T))
    return chosen


def _short(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:27].rstrip()}…"
