"""A finished analysis sent to Neuronpedia by its API, in batches; killed, it goes on.

uploaded.jsonl in the folder says which analysis is sent and how far Neuronpedia accepted it. A
batch that Neuronpedia gets twice has every example twice there. So one whose fate is unknown, of a
process that was killed or a connection that broke, is looked for before it is sent again.

Reference: hijohnnylin/neuronpedia, apps/webapp/app/api/feature/upload-batch/route.tsx has the
limits; the package neuronpedia 1.2 sends the same.
"""

import email.utils
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
from dotenv import load_dotenv
from tqdm import tqdm

from utils.artifacts import append_record, read_log
from utils.features.catalogue import Catalogue
from utils.features.dashboards import Activation, Dashboard, Source, read_dashboards
from utils.settings import InputError, Json, require
from utils.terminal import in_bytes

ADDRESS = "https://www.neuronpedia.org"  # unless NEURONPEDIA_URL names another
LOG_FILE = "uploaded.jsonl"
MOST_FEATURES = 128  # of a request
MOST_BYTES = 4_000_000  # of a request; Neuronpedia's host takes 4.5 MB
LONGEST_EXPLANATION = 512  # in UTF-16 units, as JavaScript counts
RETRIES = 6  # of a request that fails: after a second, then ever longer
LONGEST_WAIT = 300  # seconds between two tries, unless the server says when
PATIENCE = 5_400  # seconds that a request may wait for; Neuronpedia counts requests by the hour
SECONDS = 120  # to wait for an answer
REFUSALS = {  # by status or its first digit, what to do
    3: "Set NEURONPEDIA_URL to where it moved.",  # not followed: the key goes where it is told
    5: "It also fails so if another user made the source set: then name another "
    "NEURONPEDIA_SOURCE. Else try again later.",
    401: "Check NEURONPEDIA_API_KEY in .env; keys are at neuronpedia.org/account.",
    403: "The key may not do that: only who made a source set may fill it.",
    404: "There is no such model or source. Check NEURONPEDIA_SOURCE and NEURONPEDIA_URL.",
    413: "A request is too large for it. Ask Neuronpedia, or import the files of EXPORT.",
}


class Answer(NamedTuple):
    """A response: its status, 0 for none, its JSON, and after how many seconds to ask again."""

    status: int
    content: Json
    wait: float | None = None


class Batch(NamedTuple):
    """Features that are sent together: the numbers of the first and last, how many, the body."""

    first: int
    last: int
    n_features: int
    body: bytes


def read_address() -> str:
    """Neuronpedia's address: NEURONPEDIA_URL of the environment or ``.env``, or its own.

    Raises:
        InputError: The key would travel unencrypted to another machine.
    """
    load_dotenv(Path.cwd() / ".env")
    address = os.environ.get("NEURONPEDIA_URL") or ADDRESS
    parts = urlsplit(address)
    is_here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    require(not parts.username, "NEURONPEDIA_URL must not hold a name or a password.")
    require(
        bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and is_here)),
        f"NEURONPEDIA_URL must begin with https://, or be of this machine; it is {address!r}.",
    )
    return address.rstrip("/")


def read_key() -> str:
    """The key of Neuronpedia's API, from the environment or ``.env``; never printed or saved.

    Raises:
        InputError: There is none, or it has characters that no key has.
    """
    load_dotenv(Path.cwd() / ".env")
    key = os.environ.get("NEURONPEDIA_API_KEY", "").strip()
    require(
        bool(re.fullmatch(r"[!-~]+", key)),
        "UPLOAD send needs NEURONPEDIA_API_KEY in .env or the environment, in one line of ASCII; "
        f"it {'holds other characters' if key else 'is not set'}. Keys are at "
        "neuronpedia.org/account.",
    )
    return key


class Client:
    """Neuronpedia's API at an address, asked with a key."""

    def __init__(self, address: str, key: str):
        self.address, self._key = address, key
        self._http = httpx.Client(
            base_url=address,
            headers={"X-Api-Key": key},
            timeout=SECONDS,
            trust_env=address.startswith("https:"),  # else a proxy would read the key
        )

    def ask(
        self,
        path: str,
        content: Json = None,
        expected: tuple[int, ...] = (),
        is_done: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Post ``content`` (JSON, or its bytes) to ``/api/{path}``, or get it if there is none.

        A server that is busy or fails is asked again, later and later.

        Args:
            expected: Statuses besides success that are an answer.
            is_done: Asked after a failure, before the next try: whether it did what was asked.

        Raises:
            InputError: It refuses, or fails for too long.
        """
        failures, begun = 0, time.monotonic()
        while True:
            answer = self._request(path, content)
            status = answer.status
            if 200 <= status < 300 or status in expected:
                return answer
            failures += 1
            wait = min(2 ** (failures - 1), LONGEST_WAIT) if answer.wait is None else answer.wait
            may_change = status == 429 or (failures <= RETRIES and (status == 0 or status >= 500))
            if not may_change or time.monotonic() + wait > begun + PATIENCE:
                raise self._refusal(path, answer)
            tqdm.write(f"{self._problem(answer)}. Asking again in {wait:.0f} s.")
            time.sleep(wait)
            if status != 429 and is_done():
                return Answer(200, None)

    def _request(self, path: str, content: Json) -> Answer:
        method = "GET" if content is None else "POST"
        body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            response = self._http.request(method, f"/api/{path}", content=body, headers=headers)
        except httpx.TransportError as error:
            return Answer(0, f"{type(error).__name__} {error}")
        if response.has_redirect_location:
            return Answer(response.status_code, f"moved to {response.headers['location']}")
        try:
            return Answer(response.status_code, response.json(), retry_after(response.headers))
        except ValueError:
            status = 406 if response.is_success else response.status_code
            return Answer(status, f"no JSON: {response.text}", retry_after(response.headers))

    def _problem(self, answer: Answer) -> str:
        content = answer.content
        if isinstance(content, dict):
            content = content.get("error") or content.get("message") or content
        words = " ".join(str(content).replace(self._key, "***").split())[:300]
        status = f"HTTP {answer.status}" if answer.status else "no connection"
        return f"{self.address}: {status}, {words}"

    def _refusal(self, path: str, answer: Answer) -> InputError:
        remedy = REFUSALS.get(answer.status) or REFUSALS.get(answer.status // 100)
        words = "What was accepted stays: the same command goes on from there."
        return InputError(
            f"{self._problem(answer)} (/api/{path}).\n{' '.join(filter(None, [remedy, words]))}"
        )

    def has_feature(self, source: Source, feature: int) -> bool:
        """Whether Neuronpedia has a feature of the source."""
        path = f"feature/{source.model}/{source.id}/{feature}"
        answer = self.ask(path, expected=(404,))
        return answer.status != 404 and answer.content is not None

    def make_source(self, source: Source, description: str, count_layers: Callable) -> None:
        """Make the source's set, and its model, unless they are there; they are unlisted.

        Raises:
            InputError: The set is there without the layer.
        """
        found = self.ask(f"source-set/{source.model}/{source.set_name}", expected=(404,))
        sources = found.content if found.status == 200 else None
        if sources is None:
            about = {"name": source.set_name, "modelId": source.model, "description": description}
            made = self.ask("source-set/new", {**about, "url": None}, expected=(400,))
            if made.status == 400 and "Model not found" not in str(made.content):
                raise self._refusal("source-set/new", made)
            if made.status == 400:
                name = source.model_name[-64:]
                model = {"id": source.model, "layers": count_layers(), "displayName": name}
                self.ask("model/new", {**model, "url": None})
                made = self.ask("source-set/new", {**about, "url": None})
            sources = made.content
        names = [each["id"] for each in sources["sources"]]
        require(
            source.id in names,
            f"Neuronpedia has {source.set_name} of {source.model} without {source.id}, with "
            f"{', '.join(names[:5])}. Name another NEURONPEDIA_SOURCE.",
        )


def retry_after(headers: httpx.Headers) -> float | None:
    """After how many seconds a server asks to be asked again, from a number or a date."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------- batches


def read_batches(catalogue: Catalogue, source: Source, words: str, first: int) -> Iterator[Batch]:
    """Requests for all features with examples, from number ``first`` on."""
    lines: dict[int, bytes] = {}  # JSON by feature
    for dashboard in read_dashboards(catalogue, words, first):
        if not dashboard.activations:
            continue  # Neuronpedia takes no feature without
        text = json.dumps(as_feature(dashboard), ensure_ascii=False, allow_nan=False)
        line = text.encode()
        size = sum(map(len, lines.values())) + len(lines) + len(line)
        if lines and (len(lines) == MOST_FEATURES or size > MOST_BYTES):
            yield _batch(source, lines)
            lines = {}
        lines[dashboard.feature] = line
    if lines:
        yield _batch(source, lines)


def _batch(source: Source, lines: dict[int, bytes]) -> Batch:
    head = f'{{"modelId":"{source.model}","source":"{source.id}","features":['
    body = head.encode() + b",".join(lines.values()) + b"]}"
    return Batch(min(lines), max(lines), len(lines), body)


def as_feature(dashboard: Dashboard) -> dict[str, Json]:
    """A feature as the API takes it."""
    text = shortened(dashboard.explanation)
    return {
        "index": dashboard.feature,
        "density": dashboard.density,
        "activations": list(map(_as_activation, dashboard.activations)),
        "explanations": [{"text": text, "methodName": None, "modelName": None}] if text else [],
        "topLogits": [{"token": token, "value": value} for token, value in dashboard.promoted],
        "bottomLogits": [{"token": token, "value": value} for token, value in dashboard.suppressed],
    }


def _as_activation(activation: Activation) -> dict[str, Json]:
    low, high, share = activation.interval
    return {
        "tokens": activation.tokens,
        "values": activation.values,
        "quantileMax": high,
        "quantileMin": low,
        "quantileFraction": share if share >= 0 else None,  # of the highest there is none
    }


def shortened(text: str) -> str:
    """A text of at most `LONGEST_EXPLANATION` UTF-16 units; no character is cut in two."""
    units = text.encode("utf-16-le")[: 2 * LONGEST_EXPLANATION]
    return units.decode("utf-16-le", "ignore")


# ------------------------------------------------------------------------------------------ upload


def preview(catalogue: Catalogue, source: Source, folder: Path, address: str) -> None:
    """Print what `upload` would send."""
    features = catalogue.features
    sent = accepted(folder)
    waiting = features["feature"][~features["dead"] & (features["feature"] > sent)]
    batch = next(read_batches(catalogue, source, "reading", sent + 1), None)
    if batch is None:
        print(f"Nothing is left to send to {address} as {source.model}/{source.id}.")
        return
    size = in_bytes(len(waiting) * len(batch.body) // batch.n_features)
    feature = json.loads(batch.body)["features"][0]
    explanation = "".join(each["text"] for each in feature["explanations"])
    print(
        f"To be sent to {address} as {source.model}/{source.id}: {len(waiting):,} features with "
        f"examples (not {int(features['dead'].sum()):,} dead ones), about {size} in requests of up "
        f"to {MOST_FEATURES}. The first is feature {feature['index']}, {explanation}: density "
        f"{feature['density']:.2g}, {len(feature['activations'])} examples, "
        f"{len(feature['topLogits'])} promoted tokens.\n"
        "Model and source set are made there, unlisted, if they are missing. UPLOAD send sends it."
    )


def accepted(folder: Path) -> int:
    """The number of the last feature that Neuronpedia accepted; −1 for none."""
    return max(_logged(folder, "accepted"), default=-1)


def _logged(folder: Path, name: str) -> list[Json]:
    log = folder / LOG_FILE
    return [record[name] for record in read_log(log, [name])] if log.exists() else []


def upload(
    catalogue: Catalogue, source: Source, folder: Path, analysis: str, client: Client
) -> None:
    """Send what Neuronpedia has not accepted yet, to a source that is there.

    Args:
        folder: Of the log.
        analysis: Fingerprint of the analysis.

    Raises:
        InputError: The source holds another analysis, or features that were not sent from here.
    """
    log, name = folder / LOG_FILE, f"{source.model}/{source.id}"
    begun = _logged(folder, "analysis")
    require(
        begun in ([], [analysis]),
        f"{name} must hold one analysis; {log} says that it has features of another, and "
        "Neuronpedia keeps what it has. Name another NEURONPEDIA_SOURCE.",
    )
    in_doubt = True  # of the first, an earlier process may have been killed before it was logged
    for batch in read_batches(catalogue, source, "uploading", accepted(folder) + 1):
        is_there = functools.partial(client.has_feature, source, batch.first)
        is_sent = in_doubt and is_there()
        require(
            bool(begun) or not is_sent,
            f"{name} must be empty; it has feature {batch.first}, and not from {folder}. Name "
            "another NEURONPEDIA_SOURCE.",
        )
        if not begun:
            append_record(log, {"analysis": analysis})
            begun = [analysis]
        if not is_sent:
            client.ask("feature/upload-batch", batch.body, is_done=is_there)
        append_record(log, {"accepted": batch.last})
        in_doubt = False
