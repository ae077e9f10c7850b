"""Questions to a judge about a feature, and how its answers are read.

The tokens of an example that the feature is active on are shown between << and >>, or between
other markers where the texts of a question hold these.

References: EleutherAI's delphi (Paulo et al. 2024) for labels, detection and fuzzing; "Scaling
Monosemanticity", Specificity, for the rubric.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MARKS = ("\ufdd0", "\ufdd1")  # left and right, characters that no text is meant to have
MARKERS = [("<<", ">>"), ("«", "»"), *((f"⟦{n}:", f":{n}⟧") for n in range(1, 1_000))]
LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
TOGETHER = 5  # examples a question, as in delphi: with more, answers lose count
LABEL_TOKENS = 40  # of an answer
GRADES_TOKENS = 24
_NAMES = r"(?:\w+:|begin_of_|end_of_)?(?:think(?:ing)?|thought|reasoning)"
OPENED = rf"(?i:[<\[◁]\|?{_NAMES}\|?[>\]▷]|<\|channel\|>analysis<\|message\|>)"
CLOSED = rf"(?i:[<\[◁]\|?(?:/|(?=end_of)){_NAMES}\|?[>\]▷]|<\|channel\|>final<\|message\|>)"
GREETING = r"(?i)(?:sure|certainly|of course|okay|ok|absolutely|(?:final )?answer|label|phrase)\W*"
INTRODUCED = (
    r"(?i)^(?:(?:sure|certainly|of course|okay|here)\b[^:]*\b(?:answer|label|phrase|description)"
    r"\b[^:]*|(?:the )?(?:final )?(?:answer|label|phrase|description)\W*(?: is)?):\s*"
)
DECLINED = (
    r"(?i)(?:i(?:['’]m| am) )?sorry,? (?:but )?i\b|i(?:['’]m| am) unable to\b|as an ai\b"
    r"|i can(?:not|['’]t) (?:help|assist|provide|identify|determine|answer|comply|fulfill)"
)
MARKED = 0.3  # share of an example's strongest activation from which a token is marked

LABEL = """\
Below are texts that one feature of a language model is active on, strongest between {left} and \
{right}.
Say in one phrase of at most twelve words what the marked tokens, or the texts around them, have \
in common, as specifically as you can. Answer with the phrase alone.

{texts}"""


class Question(NamedTuple):
    """A question on some texts of a feature, answered by a grade for each."""

    name: str  # the kind of question
    text: str  # a template for `label`, `texts`, their number `n`, and an answer as an `example`
    highest: int  # the largest grade; 0 is the smallest


# The form of the answer comes last: small judges forget it if texts follow.
DETECTION = Question(
    "detection",
    """\
A feature of a language model is described as: {label}

{texts}

For each of these {n} texts, is the feature active somewhere in it? Answer with a list of {n} \
numbers, 1 for yes and 0 for no, and nothing else, such as {example}.""",
    1,
)

FUZZING = Question(
    "fuzzing",
    """\
A feature of a language model is described as: {label}

{texts}

In each of these {n} texts some tokens are marked by {left} and {right}. Are the marked tokens the \
ones the feature is active on? Answer with a list of {n} numbers, 1 for yes and 0 for no, and \
nothing else, such as {example}.""",
    1,
)

RUBRIC = Question(
    "rubric",
    """\
A feature of a language model is described as: {label}

{texts}

In each of these {n} texts the tokens that a feature is active on are marked by {left} and \
{right}. How well does the description fit?
0: it has nothing to do with the text
1: it is related to the text, but not near the marked tokens, or only vaguely
2: it is related to the text near the marked tokens, or loosely to these
3: it clearly describes the marked tokens
Answer with a list of {n} numbers from 0 to 3 and nothing else, such as {example}.""",
    3,
)


def marked_tokens(activations: np.ndarray) -> np.ndarray:
    """Which tokens of an example to mark, bool, of its length; at least its strongest."""
    return (activations >= MARKED * activations.max()) & (activations > 0)


def show(token_texts: Sequence[str], marked: Sequence[bool]) -> str:
    """An example as one line, runs of marked tokens between `MARKS`, for a question to replace."""
    text, inside = "", False
    for piece, mark in zip(token_texts, marked, strict=True):
        if piece and mark != inside:
            text, inside = text + MARKS[not mark], mark
        text += re.sub("[" + "".join(MARKS) + "]", "\ufffd", piece)
    return LINE_BREAK.sub("⏎", text + (MARKS[1] if inside else ""))


def _numbered(texts: Sequence[str]) -> dict[str, str]:
    """The ``texts``, a numbered line each, and the markers ``left`` and ``right`` in them."""
    lines = "\n".join(f"Text {number}: {text}" for number, text in enumerate(texts, 1))
    for markers in MARKERS:
        marked = lines
        for mark, marker in zip(MARKS, markers, strict=True):
            marked = marked.replace(mark, marker)
        # Overlapping ones count too, as before a text that begins with a part of the marker.
        counts = [len(re.findall(f"(?={re.escape(marker)})", marked)) for marker in markers]
        if counts == list(map(lines.count, MARKS)):
            break
    return {"texts": marked, "left": markers[0], "right": markers[1]}


def label_question(texts: Sequence[str]) -> str:
    return LABEL.format(**_numbered(texts))


def after_thinking(answer: str) -> str:
    """What follows the thinking in an answer; empty if the thinking does not end.

    A chat template may have opened it, so that only its end is in the answer.
    """
    opened = re.match(rf"\s*{OPENED}", answer)
    # An end in the midst of a line may be a quotation, but for a model that certainly thought.
    ends = list(re.finditer(rf"(?m)^[ \t]*{CLOSED}|{CLOSED}[ \t]*$", answer))
    if opened and not ends:
        ends = list(re.finditer(CLOSED, answer))
    return answer[ends[-1].end() :].strip() if ends else "" if opened else answer.strip()


def read_label(answer: str) -> str | None:
    """The phrase in an answer, at most 200 characters, without what introduces or wraps it.

    None if there are no letters or digits, or the judge declines.
    """
    for line in after_thinking(answer).splitlines():
        label = _unwrapped(re.sub(INTRODUCED, "", _unwrapped(line)))
        if re.match(DECLINED, label):
            return None
        is_preamble = re.search(r"[:：][\s*_]*$", line) or re.fullmatch(GREETING, label)
        if re.search(r"\w", label) and not is_preamble:
            return label[:200]
    return None


def _unwrapped(line: str) -> str:
    """A line without the marks of quotations, lists, headings, code and JSON around it."""
    line = re.sub(r"^\s*(?:[-*•>]|#+)\s+|^\s*```\w*|^\s*\{(?=.*\}\s*$)", "", line)
    return line.strip(" \t\"'*`.“”" + "}" * ("{" not in line))


def grade_questions(question: Question, label: str, texts: Sequence[str]) -> Iterator[str]:
    """A question on every `TOGETHER` of the texts."""
    for start in range(0, len(texts), TOGETHER):
        batch = texts[start : start + TOGETHER]
        values = {"n": len(batch), **_numbered(batch)}
        values["example"] = [place % 2 for place in range(len(batch))]
        yield question.text.format(label=label, **values)


def read_grades(answer: str, n: int, highest: int) -> list[int] | None:
    """The last list of ``n`` numbers in an answer, in brackets or else a line of its own.

    Lines "Text 1: 1", in order, are a list too. None unless all are grades from 0 to ``highest``.
    """
    answer = after_thinking(answer)
    numbered = re.findall(r"(?mi)^\W*text (\d+)\W+(\d+)\W*$", answer)
    candidates = [" ".join(grade for _, grade in numbered)]
    if [int(number) for number, _ in numbered] != list(range(1, n + 1)):
        candidates = []
    candidates += [line.rpartition(":")[2].strip(" \t*`.") for line in answer.splitlines()]
    candidates += re.findall(r"\(([^()]*)\)", answer) + re.findall(r"\[([^\[\]]*)\]", answer)
    for candidate in reversed(candidates):
        parts = re.split(r"\s*,\s*|\s+", candidate.strip())
        if len(parts) == n and all(re.fullmatch("[0-9]+", part) for part in parts):
            grades = [int(part) for part in parts]
            return grades if max(grades) <= highest else None
    return None
