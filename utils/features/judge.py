"""Judges: language models that are asked short questions about features.

A judge is loaded with transformers, or is behind an endpoint of OpenAI's chat completions. Each
answer is kept in a file as it comes, so that a question is asked and paid for once; an answer that
cannot be read is counted and left out.
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
from utils.features import questions
from utils.language_model import LanguageModel, load_language_model
from utils.settings import InputError, Json, require
from utils.steering import generation

LOCAL_TOKENS = 8_192  # of prompts answered together by a local judge
AT_ONCE = 8  # requests to an endpoint under way together
RETRIES = 6  # of a request: after half a second, then ever longer, or when the server says
SECONDS = 120  # to wait for one answer
CHARACTERS = 4  # in a token of English, by rule of thumb

Parsed = TypeVar("Parsed")


class Judge(Protocol):
    """A language model that answers prompts; ``name`` tells one judge's answers from another's."""

    name: str

    def ask(self, prompts: list[str], max_tokens: int) -> Iterator[tuple[int, str]]:
        """Yield the index of a prompt and its answer, in any order."""


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
        tokens = [generation.prompt_tokens(judge, prompt, chat=True) for prompt in prompts]
        waiting = sorted(range(len(tokens)), key=lambda i: -tokens[i].shape[1])
        while waiting:
            n = max(1, LOCAL_TOKENS // (tokens[waiting[0]].shape[1] + max_tokens))
            batch, waiting = waiting[:n], waiting[n:]
            answers = generation.generate_tokens(judge, [tokens[i] for i in batch], max_tokens)
            texts = (generation.decode(judge, answer) for answer in answers)
            yield from zip(batch, texts, strict=True)


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
            requests = {
                pool.submit(self._answer, prompt, max_tokens): i for i, prompt in enumerate(prompts)
            }
            try:
                for request in as_completed(requests):
                    yield requests[request], request.result()
            except openai.APIError as error:
                raise InputError(
                    f"The judge {self.name} failed: {str(error).replace(self._key, '***')}\n"
                    "Check JUDGE_URL, JUDGE, and JUDGE_API_KEY in .env. Answers so far are kept: "
                    "run the same command again to go on from here."
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: str, max_tokens: int) -> str:
        response = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0,
        )
        return (response.choices[0].message.content or "") if response.choices else ""


class Answers:
    """The answers of a judge, read from a file if it has been asked before.

    Args:
        path: The file, a line of JSON an answer.
        price: Of a million tokens in, and out, if known.

    Attributes:
        asked: Number of questions of each kind, answered now or before.
        unparsed: Number of their answers that could not be read.
    """

    def __init__(self, judge: Judge, path: Path, price: tuple[float, float] | None = None):
        self.judge, self.path, self.price = judge, path, price
        path.open("ab").close()
        records = read_log(path, ("key", "answer"))
        self._kept = {record["key"]: record["answer"] for record in records}
        self.reset_counts()

    def reset_counts(self) -> None:
        """Begin the counts of a study."""
        self.asked, self.unparsed = Counter(), Counter()

    def _key(self, prompt: str, max_tokens: int) -> str:
        content = json.dumps([self.judge.name, max_tokens, prompt])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def estimate(self, prompts: list[str], max_tokens: int) -> str:
        """The questions and tokens that asking these takes, and their price, in words."""
        new = {prompt for prompt in prompts if self._key(prompt, max_tokens) not in self._kept}
        read, written = sum(map(len, new)) / CHARACTERS, len(new) * max_tokens
        words = f"{len(new):,} questions to {self.judge.name}, {len(prompts) - len(new):,} answered"
        words += f" before; about {read:,.0f} tokens in, at most {written:,} out"
        if self.price:
            price = (read * self.price[0] + written * self.price[1]) / 1e6
            words += f", {price:.2f} by JUDGE_PRICE"
        return words

    def ask(
        self,
        kind: str,
        prompts: list[str],
        max_tokens: int,
        parse: Callable[[str, str], Parsed | None],
    ) -> list[Parsed | None]:
        """Answers to questions of a kind, by ``parse(answer, prompt)``; None if it cannot."""
        new = {self._key(prompt, max_tokens): prompt for prompt in prompts}
        new = {key: prompt for key, prompt in new.items() if key not in self._kept}
        if new:
            print(f"{kind.capitalize()}: {self.estimate(prompts, max_tokens)}.")
            keys = list(new)
            answers = self.judge.ask(list(new.values()), max_tokens)
            for i, answer in tqdm(answers, kind, total=len(new), unit="answer"):
                key = keys[i]
                append_record(self.path, {"key": key, "prompt": new[key], "answer": answer})
                self._kept[key] = answer
        kept = (self._kept[self._key(prompt, max_tokens)] for prompt in prompts)
        parsed = list(map(parse, kept, prompts))
        self.asked[kind] += len(parsed)
        unparsed = sum(answer is None for answer in parsed)
        self.unparsed[kind] += unparsed
        if unparsed:
            print(f"{unparsed:,} of {len(parsed):,} answers cannot be read and are left out.")
        return parsed

    def summary(self) -> dict[str, Json]:
        """The judge's name, and by kind of question how many were asked and could not be read."""
        counts = {"asked": dict(self.asked), "unparsed": dict(self.unparsed)}
        return {"judge": self.judge.name, **counts}


def ask_labels(examples: pd.DataFrame, answers: Answers) -> dict[int, str]:
    """A phrase for each feature of some examples (``feature, token_texts, activations``).

    Features whose answer cannot be read are left out.
    """
    prompts = {}
    for feature, group in examples.groupby("feature"):
        marks = [questions.marked_tokens(np.asarray(values)) for values in group["activations"]]
        texts = map(questions.show, group["token_texts"], marks)
        prompts[int(feature)] = questions.label_question(list(texts))

    def parse(answer, _prompt):
        return questions.read_label(answer)

    labels = answers.ask("labels", list(prompts.values()), questions.LABEL_TOKENS, parse)
    return {f: label for f, label in zip(prompts, labels, strict=True) if label is not None}


def ask_grades(
    question: questions.Question,
    features: pd.Series,
    labels: dict[int, str],
    shown: Sequence[str],
    answers: Answers,
) -> np.ndarray:
    """A grade for each text; NaN where an answer cannot be read.

    Args:
        features: The feature of each text.
        labels: The description of each feature; one without is not asked about.
        shown: The texts.
    """
    prompts, batches = [], []
    for feature, rows in pd.Series(range(len(shown))).groupby(features.to_numpy()):
        if feature in labels:
            texts = [shown[i] for i in rows]
            prompts += questions.grade_questions(question, labels[feature], texts)
            starts = range(0, len(rows), questions.TOGETHER)
            batches += [rows.to_numpy()[start : start + questions.TOGETHER] for start in starts]
    sizes = dict(zip(prompts, map(len, batches), strict=True))

    def parse(answer, prompt):
        return questions.read_grades(answer, sizes[prompt], question.highest)

    grades = np.full(len(shown), np.nan)
    results = answers.ask(question.name, prompts, questions.GRADES_TOKENS, parse)
    for batch, result in zip(batches, results, strict=True):
        if result is not None:
            grades[batch] = result
    return grades


class JudgeSettings(Protocol):
    """The settings of analyze_features.py that name a judge."""

    judge: str | None
    judge_url: str | None
    judge_price: tuple[float, float] | None


def open_judge(settings: JudgeSettings, folder: Path) -> Answers | None:
    """The judge that the settings name, if any."""
    if settings.judge is None:
        return None
    url, name = settings.judge_url, settings.judge
    judge = EndpointJudge(url, name) if url else LocalJudge(name)
    return Answers(judge, folder / "judge.jsonl", settings.judge_price)
