"""What the terminal shows: features with examples, two texts side by side, what studies found."""

import itertools
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

from utils.settings import require


def show_feature(catalogue: Any, feature: int, width: int, n_examples: int = 3) -> str:
    """A feature's label, frequency and top examples, as lines of at most ``width`` characters."""
    row = catalogue.features.loc[feature]
    examples = catalogue.examples_of([feature])
    top = examples[examples["bucket"] == 0]
    lines = [
        f"Feature {feature}: {one_line(str(row['label']))}",
        f"  active on {100 * row['frequency']:.2g}% of tokens, at most {row['max_activation']:.3g}",
    ]
    for example in top.sort_values("rank").head(n_examples).itertuples():
        text = mark_peak(list(example.pieces), int(example.peak), width - 10)
        lines.append(f"{example.activation:8.3g}  {text}")
    return "\n".join(lines)


def in_words(row: Any) -> str:
    """What a feature, a row of their table, is about and how often it fires, as a sentence."""
    about = row.get("explanation") or row["label"]
    words = f"feature {row['feature']}, {one_line(str(about))}, "
    words += f"fires on {100 * row['frequency']:.2g}% of tokens"
    score = row.get("explanation_score")
    return words + (f" (explanation score {score:.2f})" if score and score == score else "")


def show_found(catalogue: Any, found: Any, width: int) -> str:
    """Features that a search found, two lines each: what it is in words, and its top example.

    Args:
        found: Of `search.search`.
    """
    examples = catalogue.examples_of(found["feature"].tolist())
    top = examples[(examples["bucket"] == 0) & (examples["rank"] == 0)].set_index("feature")
    lines = []
    for row in found.itertuples():
        lines.append(
            f"{row.match:6.2f}  feature {row.feature}, {one_line(str(row.label))}: on "
            f"{100 * row.frequency:.2g}% of tokens, {100 * row.top_subset_share:.0f}% of it in "
            f"{row.top_subset}"
        )
        if row.feature in top.index:
            example = top.loc[row.feature]
            lines.append(" " * 8 + mark_peak(list(example.pieces), int(example.peak), width - 8))
    return "\n".join(lines) or "No feature was found."


def choose_features(
    catalogue: Any, named: Sequence[int | str], n_proposals: int, width: int
) -> list[int]:
    """The features that FEATURE names; prints them, or the candidates each is the first of.

    Raises:
        InputError: One is out of range or dead, or no feature goes by a word.
    """
    chosen = []
    for wanted in named or (None,):
        if isinstance(wanted, int):
            check_feature(catalogue, wanted)
            candidates = [wanted]
        elif wanted is None:
            candidates = catalogue.propose(n_proposals)["feature"].tolist()
        else:
            candidates = catalogue.search(wanted, n_proposals)["feature"].tolist()
        require(
            len(candidates) > 0,
            "FEATURE must be a number, or a word that some feature goes by; it is "
            f"{wanted!r}, and none was found. Try a number or another word.",
        )
        for feature in candidates:
            print(show_feature(catalogue, feature, width) + "\n")
        if not isinstance(wanted, int):
            source = "proposed" if wanted is None else f"found for {wanted!r}"
            print(
                f"Feature {candidates[0]} is taken, the first of {len(candidates)} {source}. To "
                "choose another: --feature NUMBER, or a word to find one by.\n"
            )
        chosen.append(candidates[0])
    return list(dict.fromkeys(chosen))


def check_feature(catalogue: Any, feature: int) -> None:
    """Refuse a feature that is out of range or dead."""
    n_latents = catalogue.summary["n_latents"]
    n_dead = int(catalogue.features["dead"].sum())
    rule = f"FEATURE must be from 0 to {n_latents - 1}, and not one of the {n_dead} dead ones;"
    remedy = "Leave --feature out for proposals, or give a word to find one by."
    require(0 <= feature < n_latents, f"{rule} it is {feature}. {remedy}")
    dead = bool(catalogue.features.loc[feature, "dead"])
    require(not dead, f"{rule} {feature} was active on no token of the analysis. {remedy}")


def mark_peak(pieces: Sequence[str], peak: int, width: int) -> str:
    """One line of the text around the token ``pieces[peak]``, which is put in « »."""
    pieces = [one_line(piece) for piece in pieces]
    left, right = "".join(pieces[:peak]), "".join(pieces[peak + 1 :])
    word = pieces[peak].lstrip() or pieces[peak]
    left += pieces[peak][: len(pieces[peak]) - len(word)]
    room = max(2, width - len(word) - 2)
    # What the token means to the model comes from the left, so that side gets more of the line.
    kept_right = min(len(right), max(room // 3, room - len(left)))
    kept_left = room - kept_right
    if len(left) > kept_left:
        left = "…" + left[len(left) - kept_left + 1 :]
    if len(right) > kept_right:
        right = right[: max(0, kept_right - 1)] + "…"
    return f"{left}«{word}»{right}"


def one_line(text: str) -> str:
    """Text as it can be printed within a line: line breaks as ⏎, control characters as spaces."""
    return "".join(c if c.isprintable() else " " for c in text.replace("\n", "⏎"))


def show_record(record: dict[str, Any], width: int) -> str:
    """The two texts of a record under their titles, as lines of at most ``width`` characters."""
    title = change_title(record["request"])
    if record.get("was_recorded"):
        title += " (recorded)"
    return side_by_side(("untouched", title), (record["untouched"], record["steered"]), width)


def change_title(request: dict[str, Any]) -> str:
    """What a request of `generations` does to its features, in words."""
    features, c, how = request["features"], request["strength"], request["intervention"]
    several = len(features) > 1
    name = f"feature{'s' * several} {', '.join(map(str, features))}"
    if how == "ablate" or (how == "clamp" and c == 0):
        return f"{name} at 0: ablation"
    its = "their" if several else "its"
    return {
        "clamp": f"{name} at {c:g} × {its} maximum",
        "add": f"{c:g} × {its} maximum added to {name}",
        "scale": f"{name} scaled by {c:g}",
    }[how]


def show_evidence(found: dict[str, Any], max_perplexity: float) -> str:
    """What `evidence.summarise` found, in a few lines."""
    concept, p = found["concept"], found["p_feature_greater"]
    lines = [
        f"{found['n_features']} features, of {found['n_tried']} proposed the first that steer on "
        "trial prompts,",
        f"clamped at the strength found there (median {found['median_strength']:g} × the maximum), "
        "judged on other prompts:",
        f"  concept score above the untouched text's for {found['share_raised']:.0%}",
        f"  perplexity {found['perplexity']:.2f} × the untouched on average, below "
        f"{max_perplexity:g} × for {found['share_fluent']:.0%}; both for {found['share_both']:.0%}",
        "",
        f"{'':44s}  concept score, % of the maximum",
    ]
    for method, values in concept.items():
        mean, low, high = (100 * value for value in values)
        line = f"  {method:42s}  {mean:5.1f}  ({low:.1f} to {high:.1f})"
        lines.append(line + (f"  p = {p[method]:.1e}" if method in p else ""))
    return "\n".join(lines)


def show_attribution(pair: Sequence[str], difference: float, top: Any, prompt: str) -> str:
    """The features that most raise or lower one token's logit over another's, a line each.

    Args:
        pair: Texts of the two tokens.
        difference: Of their logits.
        top: A row a feature: ``feature, label, activation, attribution, ablation``.
    """
    first, second = (repr(one_line(word)) for word in pair)
    lines = [
        f"Prompt: {one_line(prompt)}",
        f"The logit of {first} is {abs(difference):.2f} {'below' if difference < 0 else 'above'} "
        f"that of {second}. What adds to the first:",
        "",
        "feature  attribution  ablation  activation  label",
    ]
    for row in top.itertuples():
        lines.append(
            f"{row.feature:7d}  {row.attribution:11.3f}  {row.ablation:8.3f}  "
            f"{row.activation:10.2f}  {one_line(str(row.label))}"
        )
    return "\n".join(lines)


def show_correlations(found: dict[str, Any]) -> str:
    """How well attribution, and mere activation, tell what ablation does, with 95% intervals."""
    lines = [
        f"\nCorrelation with the effect of ablation, over {found['n_features']:,} active features "
        f"of {found['n_prompts']} held-out prompts:"
    ]
    for name in ("attribution", "activation"):
        value, low, high = found[name]
        lines.append(f"  {name:12s} {value:5.2f}  ({low:.2f} to {high:.2f})")
    return "\n".join(lines)


def side_by_side(
    titles: tuple[str, str], texts: tuple[str, str], width: int, narrowest: int = 28
) -> str:
    """Two columns, or one text under the other where columns would be under ``narrowest`` wide."""
    column = (width - 3) // 2
    stacked = column < narrowest
    column = width if stacked else column
    blocks = []
    for title, text in zip(titles, texts, strict=True):
        heading = wrap(title, column)
        blocks.append([*heading, "─" * column, *wrap(text, column)])
    if stacked:
        rows = [*blocks[0], "", *blocks[1]]
    else:
        pairs = itertools.zip_longest(*blocks, fillvalue="")
        rows = [f"{left}{' ' * (column - cells(left))} │ {right}" for left, right in pairs]
    return "\n".join(rows)


def wrap(text: str, width: int) -> list[str]:
    """Lines that take at most ``width`` columns of a terminal; line breaks of the text are kept."""
    lines = []
    for line in map(one_line, text.strip().split("\n")):
        # A NUL after each wide character makes the length of a line its width; a character cut
        # from its NUL at the end of a line takes the column that is left for it.
        spaced = "".join(c + "\0" if cells(c) == 2 else c for c in line)
        wrapped = textwrap.wrap(spaced, width - ("\0" in spaced))
        lines += [row.replace("\0", "") for row in wrapped] or [""]
    return lines if any(lines) else ["(nothing: the text ends)"]


def cells(text: str) -> int:
    """Columns of a terminal that a text takes: a wide character (Chinese, emoji) takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
