"""Judges: language models that are asked short questions about features.

A judge is loaded with transformers, or is behind an endpoint of OpenAI's chat completions. Each
answer is kept in a file as it comes, so that a question is asked and paid for once; an answer that
cannot be read is counted by reason and left out. Failures are not kept: a study made anew, once its
``study-NAME.json`` and the page ``browser/index.html`` were deleted, asks for those alone again.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import openai
import pandas as pd
from dotenv import load_dotenv
from openai.types.chat import ChatCompletion
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
OUTAGES = 8  # failures of the server in a row, after which it counts as down
LONGER = 4_096  # tokens of an answer that did not end in the few it needs: a model that thinks
N_REASONS = 3  # shown, the commonest
CHARACTERS = 4  # in a token of English, by rule of thumb

Parsed = TypeVar("Parsed")


@dataclasses.dataclass(frozen=True)
class Failure:
    """That one question got no answer, and why."""

    reason: str


class Judge(Protocol):
    """A language model that answers prompts.

    Attributes:
        name: Tells one judge's answers from another's.
        earlier_name: The same in the files of earlier versions.
    """

    name: str
    earlier_name: str

    def ask(self, prompts: list[str], max_tokens: int) -> Iterator[tuple[int, str | Failure]]:
        """Yield the index of a prompt and its answer, in any order.

        Answers are of about ``max_tokens``, besides the judge's thinking.
        """


class LocalJudge:
    """An instruct model, loaded at its first question; it answers greedily.

    Args:
        name: A hub name, a folder in the hub's layout, or ``"embedded"``.
    """

    def __init__(self, name: str):
        self.name = self.earlier_name = name
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

    def ask(self, prompts: list[str], max_tokens: int) -> Iterator[tuple[int, str | Failure]]:
        thinking = []
        for i, answer in self._generate(prompts, range(len(prompts)), max_tokens):
            if isinstance(answer, Failure) or questions.after_thinking(answer):
                yield i, answer
            else:
                thinking.append(i)
        yield from self._generate(prompts, thinking, LONGER)

    def _generate(
        self, prompts: list[str], chosen: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[int, str | Failure]]:
        """Answer the ``chosen`` of the prompts."""
        judge = self._load()
        tokens = {i: generation.prompt_tokens(judge, prompts[i], chat=True) for i in chosen}
        context = judge.longest_text or sys.maxsize
        waiting = sorted(chosen, key=lambda i: -tokens[i].shape[1])
        while waiting:
            length = tokens[waiting[0]].shape[1]
            room = min(max_tokens, context - length)
            if room < 1:
                yield waiting.pop(0), Failure("the question is longer than the judge's context")
                continue
            n = max(1, LOCAL_TOKENS // (length + max_tokens))
            batch, waiting = waiting[:n], waiting[n:]
            answers = generation.generate_tokens(judge, [tokens[i] for i in batch], room)
            for i, answer in zip(batch, answers, strict=True):
                # A chat template may open the thinking itself.
                head = generation.decode(judge, tokens[i][0, -16:]).rstrip()
                opening = re.search(rf"{questions.OPENED}$", head)
                text = generation.decode(judge, answer)
                yield i, opening.group() + text if opening else text


class EndpointJudge:
    """A model behind an endpoint; the key is JUDGE_API_KEY of the environment or ``.env``.

    Args:
        url: Up to and with ``/v1``; ``/chat/completions`` is added to it.
        model: As the endpoint names it.
    """

    def __init__(self, url: str, model: str):
        load_dotenv(Path.cwd() / ".env")
        self.name, self.earlier_name = model, f"{model} at {url}"
        self._key = os.environ.get("JUDGE_API_KEY") or "none"
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key, max_retries=RETRIES, timeout=SECONDS
        )
        # What the model takes: newer ones refuse max_tokens and temperature.
        self._limit, self._options = "max_tokens", {"temperature": 0}
        self._thinks = False  # true once an answer needed room for thinking

    def ask(self, prompts: list[str], max_tokens: int) -> Iterator[tuple[int, str | Failure]]:
        """As `Judge.ask`; raises `InputError` if requests fail whatever the prompt.

        Answers to requests under way are yielded before.
        """
        fatal, outages = None, 0
        with ThreadPoolExecutor(AT_ONCE) as pool:
            requests = {
                pool.submit(self._answer, prompt, max_tokens): i for i, prompt in enumerate(prompts)
            }
            try:
                for request in as_completed(requests):
                    if request.cancelled():
                        continue
                    error = request.exception()
                    if error is None:
                        outages = 0
                        yield requests[request], request.result()
                        continue
                    if not isinstance(error, openai.APIError):
                        raise error
                    status = getattr(error, "status_code", None) or 500
                    outages += status >= 500 or status == 403  # some refuse a prompt by 403
                    if status in (401, 402, 404, 429) or outages >= OUTAGES:
                        fatal = fatal or error
                        for waiting in requests:
                            waiting.cancel()
                    yield requests[request], Failure(self._reason(error))
            finally:
                pool.shutdown(cancel_futures=True)
        if fatal is not None:
            raise InputError(
                f"The judge {self.earlier_name} failed: {self._masked(str(fatal))}\n"
                "Check JUDGE_URL, JUDGE, and JUDGE_API_KEY in .env. Answers so far are kept: "
                "run the same command again to go on from here."
            )

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "***").encode("utf-8", "replace").decode()

    def _reason(self, error: openai.APIError) -> str:
        """Why a request failed, in words that are the same for other prompts."""
        code, status = error.code, getattr(error, "status_code", None)
        words = code if isinstance(code, str) and re.search("[a-z]", code) else error.message
        words = re.sub(r"^Error code: \d+ - ", "", self._masked(words).replace("\n", " "))
        words = re.sub(r"\d+", "N", words)[:120]
        return f"HTTP {status}: {words}" if status else words

    def _answer(self, prompt: str, max_tokens: int) -> str | Failure:
        more, refusal = (LONGER, LONGER // 4), None
        for room in more if self._thinks else (max_tokens, *more):
            try:
                answer, is_cut = self._request(prompt, room)
            except openai.BadRequestError as error:
                if room == max_tokens:
                    raise
                refusal = error  # its context may have no room for so many
                continue
            if not is_cut:
                self._thinks |= room > max_tokens
                return answer
            refusal = None
            if room == LONGER:
                break
        if refusal is not None:
            raise refusal
        return Failure("the answer does not end in the tokens there is room for")

    def _request(self, prompt: str, max_tokens: int) -> tuple[str | Failure, bool]:
        """An answer, and whether it was cut off."""
        limit, options = self._limit, self._options
        while True:
            try:
                response = self._client.chat.completions.create(
                    model=self.name,
                    messages=[{"role": "user", "content": prompt}],
                    **{limit: max_tokens},
                    **options,
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                words = f"{error.message} {error.param}"
                if options and "temperature" in words:
                    options = {}
                elif (
                    limit == "max_tokens"
                    and limit in words
                    and not re.search("(?i)too large|context|at most|less than", words)
                ):
                    limit = "max_completion_tokens"
                else:
                    raise
            except ValueError:
                return Failure("no JSON (HTTP 200)"), False
            else:
                self._limit, self._options = limit, options
                return _read_response(response)


def _read_response(response: ChatCompletion | str) -> tuple[str | Failure, bool]:
    """The answer in a response, which may have any content, and whether it was cut off."""
    choices = getattr(response, "choices", None)
    message = choices[0].message if choices else None
    if message is None:
        return Failure("no answer in the response (HTTP 200)"), False
    text = message.content or ""
    if isinstance(text, list):  # of parts, of which some may be thinking
        texts = (part.get("text") for part in text if isinstance(part, dict))
        text = "".join(part for part in texts if isinstance(part, str))
    text = text.encode("utf-8", "replace").decode()  # JSON may escape half of a surrogate pair
    reason = choices[0].finish_reason
    if reason == "content_filter" or getattr(message, "refusal", None):
        return Failure("refused by the judge's content filter"), False
    is_empty = not questions.after_thinking(text)
    if reason == "length" or (is_empty and text.strip()):
        return text, True
    return (Failure("an empty answer") if is_empty else text), False


class Answers:
    """The answers of a judge, read from a file if it has been asked before.

    Args:
        path: The file, a line of JSON an answer.
        price: Of a million tokens in, and out, if known.

    Attributes:
        asked: Number of questions of each kind, answered now or before.
        unparsed: Number of them without an answer that could be read.
        reasons: The same by kind and reason.
    """

    def __init__(self, judge: Judge, path: Path, price: tuple[float, float] | None = None):
        self.judge, self.path, self.price = judge, path, price
        path.open("ab").close()
        records = read_log(path, ("key", "answer"))
        # Earlier versions also kept failures, empty or cut off in the judge's thinking.
        self._kept = {
            record["key"]: record["answer"]
            for record in records
            if questions.after_thinking(str(record["answer"]))
        }
        self.reset_counts()

    def reset_counts(self) -> None:
        """Begin the counts of a study."""
        self.asked, self.unparsed = Counter(), Counter()
        self.reasons: dict[str, Counter[str]] = {}

    def _key(self, prompt: str, max_tokens: int) -> str:
        """What an answer is kept under; that of an earlier version if it is there."""
        names = [self.judge.earlier_name, max_tokens, prompt], [self.judge.name, prompt]
        earlier, key = (
            hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32] for content in names
        )
        return earlier if earlier in self._kept else key

    def estimate(self, prompts: list[str], max_tokens: int) -> str:
        """The questions and tokens that asking these takes, and their price, in words."""
        new = {prompt for prompt in prompts if self._key(prompt, max_tokens) not in self._kept}
        read, written = sum(map(len, new)) / CHARACTERS, len(new) * max_tokens
        words = f"{len(new):,} questions to {self.judge.name}, {len(prompts) - len(new):,} answered"
        words += f" before; about {read:,.0f} tokens in, at most {written:,} out besides thinking"
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
        """Answers to questions of a kind, by ``parse(answer, prompt)``; None if it cannot.

        Raises:
            InputError: None of this kind in the study could be read; names the commonest reasons.
        """
        new = {self._key(prompt, max_tokens): prompt for prompt in prompts}
        new = {key: prompt for key, prompt in new.items() if key not in self._kept}
        failures: dict[str, str] = {}
        if new:
            print(f"{kind.capitalize()}: {self.estimate(prompts, max_tokens)}.")
            keys = list(new)
            answers = self.judge.ask(list(new.values()), max_tokens)
            for i, answer in tqdm(answers, kind, total=len(new), unit="answer"):
                key = keys[i]
                if isinstance(answer, str) and not questions.after_thinking(answer):
                    answer = Failure("an empty answer, or thinking without an end")
                if isinstance(answer, Failure):
                    failures[key] = answer.reason
                    continue
                append_record(self.path, {"key": key, "prompt": new[key], "answer": answer})
                self._kept[key] = answer
        parsed = []
        reasons = self.reasons.setdefault(kind, Counter())
        for prompt in prompts:
            key = self._key(prompt, max_tokens)
            parsed.append(parse(self._kept[key], prompt) if key in self._kept else None)
            if parsed[-1] is None:
                reasons[failures.get(key, "not in the form asked for")] += 1
        self.asked[kind] += len(parsed)
        unparsed = sum(answer is None for answer in parsed)
        self.unparsed[kind] += unparsed
        if unparsed:
            print(f"{unparsed:,} of {len(parsed):,} answers cannot be read and are left out.")
        require(
            self.unparsed[kind] < self.asked[kind] or not prompts,
            f"The judge {self.judge.name} gave no answer ({kind}) that can be read: "
            f"{_in_words(reasons)}. Name another JUDGE, or none, with --overwrite; answers that "
            f"failed are asked for again, those that were given are in {self.path}.",
        )
        return parsed

    def in_words(self) -> list[str]:
        """A sentence for each kind of question."""
        return [
            f"Judge: {self.unparsed[kind]:,} of {n:,} answers ({kind}) could not be read"
            + (f": {_in_words(self.reasons[kind])}." if self.unparsed[kind] else ".")
            for kind, n in self.asked.items()
        ]

    def summary(self) -> dict[str, Json]:
        """The judge's name, and by kind of question how many were asked and could not be read."""
        counts = {"asked": dict(self.asked), "unparsed": dict(self.unparsed)}
        reasons = {kind: dict(counter) for kind, counter in self.reasons.items()}
        return {"judge": self.judge.name, **counts, "reasons": reasons}


def _in_words(reasons: Counter[str]) -> str:
    return "; ".join(f"{reason} ({n:,})" for reason, n in reasons.most_common(N_REASONS))


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
