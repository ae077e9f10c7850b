"""The static feature browser: one report.html that needs no network, no server and no scripts."""

import base64
import struct
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from utils.artifacts import replacing

N_BUCKETS = 5  # random examples come from fifths of the range between the maximum and zero
N_TOP = 8  # top examples in sight; the others unfold
# Control characters become visible signs, in tags that set them apart from the text.
SIGNS = {code: f"<i>{chr(0x2400 + code)}</i>" for code in range(32)}
SIGNS |= {ord("\n"): "<i>↵</i>", ord("\t"): "<i>⇥</i>", ord("\r"): ""}


def write_report(
    path: Path,
    summary: dict,
    features: pd.DataFrame,
    examples: pd.DataFrame,
    plots: dict[str, Path],
    shown: dict[str, list[int]],
) -> None:
    """Write the report of an analysis, with pictures and styles inside the file.

    Args:
        path: The HTML file.
        summary: What the summary table shows: ``model_name, layer, kind, n_latents, n_alive,
            dataset, n_tokens, fvu, l0, dead_fraction, cosine, loss_recovered``, ``cross_entropy``
            by intervention, ``excluded`` positions by reason.
        features: A row a feature: ``feature, label, frequency, max_activation, top_subset,
            top_subset_share``, and lists ``promoted_tokens, suppressed_tokens``.
        examples: A row an example: ``feature, bucket`` (0 for the top ones, then 1 for the fifth
            next to the maximum, to 5), ``rank, activation, peak, document, subset``, and lists
            ``pieces`` and ``activations``, one entry a token.
        plots: Picture files by caption.
        shown: Feature numbers under ``"random"`` and ``"selected"``.

    Raises:
        KeyError: A feature to be shown is not in ``features``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = features.set_index("feature")
    wanted = examples[examples.feature.isin([*shown["random"], *shown["selected"]])]
    by_feature = dict(list(wanted.sort_values(["bucket", "rank"]).groupby("feature")))
    cards = {
        section: [_card(rows.loc[i], by_feature.get(i, wanted[:0])) for i in shown[section]]
        for section in ("random", "selected")
    }
    html = environment.get_template("report.html.jinja").render(
        summary=summary,
        facts=_facts(summary),
        plots=[_picture(caption, Path(file)) for caption, file in plots.items()],
        cards=cards,
        n_top=N_TOP,
    )
    with replacing(Path(path)) as partial:
        partial.write_text(html, encoding="utf-8", errors="replace")


def _held_out(summary: dict) -> str:
    """The variance explained on tokens held out of training, where it was measured."""
    if "held_out_fvu" not in summary:
        return ""
    return f"; {1 - summary['held_out_fvu']:.1%} on tokens held out of training"


def _facts(summary: dict) -> list[tuple[str, str, str]]:
    """Rows of the summary table: a name, its value, what it means in plain words."""
    cross_entropy = summary["cross_entropy"]
    excluded = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in summary["excluded"].items()]
    return [
        (
            "Tokens analysed",
            f"{summary['n_tokens']:,}",
            f"Tokens of {summary['dataset']} on which the features were counted.",
        ),
        (
            "Live features",
            f"{summary['n_alive']:,} of {summary['n_latents']:,}",
            "Features active at least once on these tokens, and the size of the dictionary.",
        ),
        (
            "Dead latents",
            f"{summary['dead_fraction']:.1%}",
            "The rest: directions that were learnt but never used here.",
        ),
        (
            "L0",
            f"{summary['l0']:,.1f}",
            "Features active on a token, on average. Few are easier to understand than many.",
        ),
        (
            "Variance explained",
            f"{1 - summary['fvu']:.1%}" + _held_out(summary),
            "How much of what distinguishes activations the features rebuild; FVU is what is left.",
        ),
        (
            "Cosine similarity",
            f"{summary['cosine']:.3f}",
            "Between an activation and its reconstruction; 1 is the same direction.",
        ),
        (
            "Cross-entropy, untouched",
            f"{cross_entropy['untouched']:.3f} nats",
            "How badly the model itself predicts the next token; lower is better.",
        ),
        (
            "Cross-entropy, reconstructed",
            f"{cross_entropy['reconstruction']:.3f} nats",
            f"The same when the features alone stand in for layer {summary['layer']}.",
        ),
        (
            "Cross-entropy, zero-ablated",
            f"{cross_entropy['zero_ablated']:.3f} nats",
            f"The same when zeros stand in for layer {summary['layer']}.",
        ),
        (
            "Loss recovered",
            f"{summary['loss_recovered']:.1%}",
            "Where the reconstruction lies between zeros (0%) and the untouched model (100%).",
        ),
        (
            "Excluded positions",
            "; ".join(excluded) or "none",
            "Positions left out of training and of every number here, by reason.",
        ),
    ]


def _picture(caption: str, file: Path) -> dict:
    png = file.read_bytes()
    width, height = struct.unpack(">II", png[16:24])  # of the header, so that text does not jump
    encoded = base64.b64encode(png).decode()
    return {"caption": caption, "png": encoded, "width": width, "height": height}


def _card(row: pd.Series, examples: pd.DataFrame) -> dict:
    """What the template shows of one feature."""
    often = f"{100 * row.frequency:.2g}% of tokens"
    if 0 < row.frequency < 0.1:
        often += f" (1 in {1 / row.frequency:,.0f})"
    groups = {
        bucket: [_example(example, row.max_activation) for example in group.itertuples()]
        for bucket, group in examples.groupby("bucket")
    }
    return {
        "feature": row.name,
        "label": row.label,
        "frequency": often,
        "max_activation": f"{row.max_activation:.2f}",
        "subset": f"{row.top_subset} ({row.top_subset_share:.0%})",
        "chips": {
            name: [_visible(token, spaces=True) for token in _as_list(row[f"{name}_tokens"])]
            for name in ("promoted", "suppressed")
        },
        "top": groups.pop(0, []),
        "buckets": {
            f"{100 * (N_BUCKETS - b) // N_BUCKETS}–{100 * (N_BUCKETS + 1 - b) // N_BUCKETS}%": group
            for b, group in groups.items()
        },
    }


def _example(example: tuple, maximum: float) -> dict:
    """An example as one line of HTML, each active token marked in proportion to ``maximum``."""
    line = Markup()
    mark = Markup('<mark{} style="--a:{:.2f}" title="{:.2f}">{}</mark>')
    tokens = zip(example.pieces, example.activations, strict=True)
    for position, (piece, activation) in enumerate(tokens):
        is_peak = position == example.peak
        if activation <= 0 and not is_peak:
            line += _visible(piece)
            continue
        word = piece.lstrip(" ") or piece  # the space before a word stays out of its box
        share = np.clip(activation / maximum, 0, 1) if maximum > 0 else 0
        line += piece[: len(piece) - len(word)]
        peak = Markup(' class="peak"') if is_peak else ""
        line += mark.format(peak, share, activation, _visible(word))
    return {
        "line": line.lstrip(" "),
        "activation": f"{example.activation:.2f}",
        "source": f"{example.subset} · document {example.document}",
    }


def _visible(piece: str, spaces: bool = False) -> Markup:
    """Escaped text with line breaks and other control characters (and spaces) made visible."""
    signs = SIGNS | {ord(" "): "<i>␣</i>"} if spaces else SIGNS
    return Markup(str(escape(piece)).translate(signs))


def _as_list(tokens: object) -> list[str]:
    """A cell of a list column; dead features have None or NaN there."""
    return list(tokens) if isinstance(tokens, list | tuple | np.ndarray) else []
