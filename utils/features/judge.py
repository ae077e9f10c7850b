"""Judges: language models that are asked short questions about features.

One that transformers loads, or one behind any endpoint that speaks OpenAI's chat completions. Each
answer is kept in a file as it comes, so that a question is asked and paid for once; one that cannot
be read is counted and left out.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import openai
import pandas as pd
from dotenv import load_dotenv
from tqdm import tqdm

from utils.artifacts import append_record, read_log
from utils.features.questions import (
    GRADES_TOKENS,
    LABEL_TOKENS,
    TOGETHER,
    Question,
    grade_questions,
    label_question,
    marked_tokens,
    read_grades,
    read_label,
    show,
)
from utils.language_model import LanguageModel, load_language_model
from utils.settings import InputError, Json, require
from utils.steering.generation import decode, generate_tokens, prompt_tokens

LOCAL_TOKENS = 8_192  # of prompts answered together by a local judge
AT_ONCE = 8  # requests to an endpoint under way together
RETRIES = 6  # of a request: after half a second, then ever longer, or as long as the server says
SECONDS = 120  # to wait for one answer
CHARACTERS = 4  # of a token of English, by rule of thumb

Parsed = TypeVar("Parsed")


class Judge(Protocol):
    """A language model that answers prompts; ``name`` tells one judge's answers from another's."""

    name: str

    def ask(self, prompts: list[str], max_tokens: int) -> Iterator[tuple[int, str]]:
        """Yield the place of a prompt and its answer, in whatever order they come."""


class LocalJudge:
    """An instruct model, loaded at its first question; it answers greedily.

    Args:
        name: A hub name, a folder in the hub's layout, or ``"embedded"``.
    """

    def __init__(self, name: str):
        self.name = name
        self._loaded: LanguageModel | None = None

    def _load(self) -> LanguageModel:
        if self._loaded is None:
            self._loaded = load_language_model(self.name, layer=0)
            require(
                self._loaded.tokenizer.chat_template is not None,
                f"JUDGE must be an instruct model; {self.name} has no chat template. Name the "
                "instruct version of it, or another.",
            )
        return self._loaded

    def ask(self, prompts: list[str], max_tokens: int) -> Iterator[tuple[int, str]]:
        judge = self._load()
        asked = [prompt_tokens(judge, prompt, chat=True) for prompt in prompts]
        waiting = sorted(range(len(asked)), key=lambda i: -asked[i].shape[1])
        while waiting:
            n = max(1, LOCAL_TOKENS // (asked[waiting[0]].shape[1] + max_tokens))
            some, waiting = waiting[:n], waiting[n:]
            answers = generate_tokens(judge, [asked[i] for i in some], max_tokens)
            yield from ((i, decode(judge, answer)) for i, answer in zip(some, answers, strict=True))


class EndpointJudge:
    """A model behind an endpoint; the key is JUDGE_API_KEY of the environment or ``.env``.

    Args:
        url: Up to and with ``/v1``; ``/chat/completions`` is added to it.
        model: As the endpoint names it.
    """

    def __init__(self, url: str, model: str):
        load_dotenv(Path.cwd() / ".env")
        self.name, self.url, self._model = f"{model} at {url}", url, model
        self._key = os.environ.get("JUDGE_API_KEY") or "none"
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key, max_retries=RETRIES, timeout=SECONDS
        )

    def ask(self, prompts: list[str], max_tokens: int) -> Iterator[tuple[int, str]]:
        """As `Judge.ask`; raises `InputError` if a request fails for good."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = {
                pool.submit(self._answer, prompt, max_tokens): place
                for place, prompt in enumerate(prompts)
            }
            try:
                for answer in as_completed(asked):
                    yield asked[answer], answer.result()
            except openai.APIError as error:
                raise InputError(
                    f"The judge {self.name} failed: {str(error).replace(self._key, '***')}\n"
                    "Check JUDGE_URL, JUDGE, and JUDGE_API_KEY in .env. Answers so far are kept: "
                    "run the same command again to go on from here."
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: str, max_tokens: int) -> str:
        done = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0,
        )
        return (done.choices[0].message.content or "") if done.choices else ""


class Answers:
    """What a judge answers, read from the file where it has been asked before.

    Args:
        judge: Any judge.
        path: The file, a line of JSON an answer.
        price: Of a million tokens in, and out; None if it is not known.

    Attributes:
        asked: Number of questions of each sort, answered now or before.
        unparsed: How many of their answers could not be read.
    """

    def __init__(self, judge: Judge, path: Path, price: tuple[float, float] | None = None):
        self.judge, self.path, self.price = judge, path, price
        path.open("ab").close()
        records = read_log(path, ("key", "answer"))
        self._kept = {record["key"]: record["answer"] for record in records}
        self.count_anew()

    def count_anew(self) -> None:
        """Let the counts be those of the study that begins."""
        self.asked, self.unparsed = Counter(), Counter()

    def _key(self, prompt: str, max_tokens: int) -> str:
        content = json.dumps([self.judge.name, max_tokens, prompt])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def estimate(self, prompts: list[str], max_tokens: int) -> str:
        """What asking these will take, in words."""
        new = {prompt for prompt in prompts if self._key(prompt, max_tokens) not in self._kept}
        read, written = sum(map(len, new)) / CHARACTERS, len(new) * max_tokens
        words = f"{len(new):,} questions to {self.judge.name}, {len(prompts) - len(new):,} answered"
        words += f" before; about {read:,.0f} tokens in, at most {written:,} out"
        if self.price:
            words += (
                f", {(read * self.price[0] + written * self.price[1]) / 1e6:.2f} by JUDGE_PRICE"
            )
        return words

    def ask(
        self,
        what: str,
        prompts: list[str],
        max_tokens: int,
        parse: Callable[[str, str], Parsed | None],
    ) -> list[Parsed | None]:
        """The answers as ``parse`` reads them, None where it cannot.

        Args:
            what: The sort of question, to count and show it by.
            parse: Reads an answer to a prompt, which it is given too.
        """
        new = {self._key(prompt, max_tokens): prompt for prompt in prompts}
        new = {key: prompt for key, prompt in new.items() if key not in self._kept}
        if new:
            print(f"{what.capitalize()}: {self.estimate(prompts, max_tokens)}.")
            keys = list(new)
            answers = self.judge.ask(list(new.values()), max_tokens)
            for place, answer in tqdm(answers, what, total=len(new), unit="answer"):
                key = keys[place]
                append_record(self.path, {"key": key, "prompt": new[key], "answer": answer})
                self._kept[key] = answer
        kept = (self._kept[self._key(prompt, max_tokens)] for prompt in prompts)
        parsed = list(map(parse, kept, prompts))
        self.asked[what] += len(parsed)
        unparsed = sum(answer is None for answer in parsed)
        self.unparsed[what] += unparsed
        if unparsed:
            print(f"{unparsed:,} of {len(parsed):,} answers cannot be read and are left out.")
        return parsed

    def summary(self) -> dict[str, Json]:
        """Which judge, and by sort of question how many were asked and could not be read."""
        return {
            "judge": self.judge.name,
            "asked": dict(self.asked),
            "unparsed": dict(self.unparsed),
        }


def ask_labels(examples: pd.DataFrame, answers: Answers) -> dict[int, str]:
    """A phrase for each feature of some examples (``feature, token_texts, activations``).

    None for those whose answer cannot be read.
    """
    prompts = {}
    for feature, group in examples.groupby("feature"):
        marks = [marked_tokens(np.asarray(values)) for values in group["activations"]]
        texts = map(show, group["token_texts"], marks)
        prompts[int(feature)] = label_question(list(texts))
    labels = answers.ask(
        "labels", list(prompts.values()), LABEL_TOKENS, lambda answer, _: read_label(answer)
    )
    return {f: label for f, label in zip(prompts, labels, strict=True) if label is not None}


def ask_grades(
    question: Question,
    features: pd.Series,
    labels: dict[int, str],
    shown: Sequence[str],
    answers: Answers,
) -> np.ndarray:
    """A grade for each text; NaN where an answer cannot be read.

    Args:
        question: Asked on some texts of one feature at a time.
        features: Whose text each is.
        labels: What each feature is described as; one without is not asked about.
        shown: The texts.
    """
    prompts, places = [], []
    for feature, numbers in pd.Series(range(len(shown))).groupby(features.to_numpy()):
        if feature in labels:
            numbers = numbers.to_numpy()
            prompts += grade_questions(question, labels[feature], [shown[i] for i in numbers])
            starts = range(0, len(numbers), TOGETHER)
            places += [numbers[start : start + TOGETHER] for start in starts]
    grades = np.full(len(shown), np.nan)
    sizes = dict(zip(prompts, map(len, places), strict=True))
    read = answers.ask(
        question.name,
        prompts,
        GRADES_TOKENS,
        lambda answer, prompt: read_grades(answer, sizes[prompt], question.highest),
    )
    for some, given in zip(places, read, strict=True):
        if given is not None:
            grades[some] = given
    return grades


class JudgeSettings(Protocol):
    """Which judge, of the settings of analyze_features.py."""

    judge: str | None
    judge_url: str | None
    judge_price: tuple[float, float] | None


def open_judge(settings: JudgeSettings, folder: Path) -> Answers | None:
    """The judge that ``judge``, ``judge_url`` and ``judge_price`` of the settings name, if any."""
    if settings.judge is None:
        return None
    judge = (
        EndpointJudge(settings.judge_url, settings.judge)
        if settings.judge_url
        else LocalJudge(settings.judge)
    )
    return Answers(judge, folder / "judge.jsonl", settings.judge_price)
