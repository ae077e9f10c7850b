"""A server with the part of Neuronpedia's API that the project uses, as strict as its own.

The rules are those of hijohnnylin/neuronpedia, apps/webapp/app/api: feature/upload-batch/route.tsx,
feature/[modelId]/[layer]/[index], source-set and model. Strings that `yup` requires are not empty.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-np-7f3a9b2c4d5e6f708192"
USER = "user-1"


class Wrong(Exception):
    """A request that Neuronpedia refuses: status and words."""


def check(condition: bool, words: str, status: int = 400) -> None:
    if not condition:
        raise Wrong(status, words)


def is_number(value: object, low: float = -1e300, high: float = 1e300) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_text(value: object, longest: int = 10**9) -> bool:
    """A string that is not empty, of at most so many UTF-16 units, that PostgreSQL can store."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    return len(value.encode("utf-16-le")) // 2 <= longest  # an error for half of a surrogate pair


def check_batch(body: dict) -> None:
    """uploadBatchSchema, and the checks after it."""
    check(set(body) == {"modelId", "source", "features"}, "fields of the body")
    features = body["features"]
    check(isinstance(features, list) and 1 <= len(features) <= 128, "1 to 128 features")
    for feature in features:
        names = {"index", "density", "topLogits", "bottomLogits", "explanations", "activations"}
        check(set(feature) <= names, "fields of a feature")
        index, density = feature["index"], feature["density"]
        check(isinstance(index, int) and 0 <= index <= 10_000_000, "index")
        check(is_number(density, 0, 1), "density")
        for logits in (feature["topLogits"], feature["bottomLogits"]):
            check(logits is None or len(logits) <= 20, "at most 20 logits")
            for logit in logits or ():
                check(set(logit) == {"token", "value"}, "fields of a logit")
                check(is_text(logit["token"]) and is_number(logit["value"]), "a logit")
        for explanation in feature["explanations"]:
            check(is_text(explanation["text"], 512), "explanation of 1 to 512 characters")
            check(explanation["methodName"] is None, "Invalid Explanation Method Names", 500)
            check(explanation["modelName"] is None, "Invalid Explanation Model Names", 500)
        check(len(feature["activations"]) >= 1, "at least 1 activation")
        for activation in feature["activations"]:
            check_activation(activation)
    check(len({feature["index"] for feature in features}) == len(features), "indexes unique", 500)


def check_activation(activation: dict) -> None:
    quantiles = {"quantileMax", "quantileMin", "quantileFraction"}
    check(set(activation) == {"tokens", "values", *quantiles}, "fields of an activation")
    tokens, values = activation["tokens"], activation["values"]
    check(1 <= len(tokens) <= 1024 and all(map(is_text, tokens)), "1 to 1024 tokens")
    check(len(values) == len(tokens) and all(map(is_number, values)), "as many values", 500)
    for name in ("quantileMax", "quantileMin"):
        check(activation[name] is None or is_number(activation[name], high=99_999_999), name)
    share = activation["quantileFraction"]
    check(share is None or is_number(share, 0, 1), "quantileFraction")


def strict(text: str) -> float:
    raise Wrong(400, f"{text} is no JSON")


class Neuronpedia:
    """What the server holds, and how it is to behave.

    Attributes:
        models, sets: As they were made; a set's value is its source's ids.
        features: By model, source and index, each feature as often as it was accepted.
        failures: Answers for the next uploads: (status, headers, whether it is stored all the same)
            each; None for the usual.
        requests: Method, path and time of each.
        accepted: Called after an upload is stored, before it is answered.
    """

    def __init__(self) -> None:
        self.models: dict[str, int] = {}
        self.sets: dict[tuple[str, str], list[str]] = {}
        self.features: dict[tuple[str, str, int], list[dict]] = {}
        self.failures: list[tuple[int, dict[str, str], bool] | None] = []
        self.requests: list[tuple[str, str, float]] = []
        self.accepted = lambda: None
        self.address = ""

    def answer(self, method: str, path: str, body: dict | None) -> tuple[int, object, dict]:
        if method == "POST":
            return getattr(self, "post_" + path.replace("/", "_").replace("-", "_"))(body)
        if found := re.fullmatch(r"source-set/([^/]+)/([^/]+)", path):
            return 200, self._set(*found.groups()), {}
        found = re.fullmatch(r"feature/([^/]+)/([^/]+)/(\d+)", path)
        check(bool(found), "no such address", 404)
        stored = self.features.get((found[1], found[2], int(found[3])))
        check(stored is not None, "Not found", 404)
        return 200, stored[0], {}

    def _set(self, model: str, name: str) -> dict | None:
        ids = self.sets.get((model, name))
        return ids and {"name": name, "modelId": model, "sources": [{"id": each} for each in ids]}

    def post_model_new(self, body: dict) -> tuple[int, object, dict]:
        name = body["id"]
        check(bool(re.fullmatch(r"[a-z][a-z0-9.-]*[a-z0-9]", name)) and len(name) <= 32, "model id")
        check(not re.search(r"--|\.\.", name), "double")
        check(isinstance(body["layers"], int) and 1 <= body["layers"] <= 127, "layers")
        check(1 <= len(body["displayName"]) <= 64 and body["url"] is None, "displayName, url")
        check(name not in self.models, "Model already exists")
        self.models[name] = body["layers"]
        return 200, {"id": name}, {}

    def post_source_set_new(self, body: dict) -> tuple[int, object, dict]:
        model, name = body["modelId"], body["name"]
        check(bool(re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name)) and "--" not in name, "name")
        check(len(body["description"]) <= 128 and body["url"] is None, "description, url")
        check(model in self.models, "Model not found")
        check((model, name) not in self.sets, "Source set name already exists for this model.")
        self.sets[model, name] = [f"{layer}-{name}" for layer in range(self.models[model])]
        return 200, self._set(model, name), {}

    def post_vector_new(self, body: dict) -> tuple[int, object, dict]:
        model, layer, label = body["modelId"], body["layerNumber"], body["vectorLabel"]
        check(body["hookType"] in ("hook_resid_pre", "hook_resid_post"), "hookType")
        check(len(body["vector"]) <= 24_576 and all(map(is_number, body["vector"])), "vector")
        check(is_number(body["vectorDefaultSteerStrength"], -300, 300) and is_text(label), "label")
        check(layer < self.models.get(model, 0), "Model not found")
        made = {"modelId": model, "source": f"{layer}-neuronpedia-resid-post", "index": "0"}
        made |= {"label": label, "hookName": f"blocks.{layer}.{body['hookType']}"}
        made |= {"values": body["vector"]}
        made |= {"defaultSteerStrength": body["vectorDefaultSteerStrength"]}
        return 200, {"message": "Success", "url": f"{self.address}/v", "vector": made}, {}

    def post_feature_upload_batch(self, body: dict) -> tuple[int, object, dict]:
        failure = self.failures.pop(0) if self.failures else None
        if failure is None or failure[2]:
            self._store(body)
        if failure is None:
            self.accepted()
            return 200, {"message": f"{len(body['features'])} features created."}, {}
        return failure[0], {"error": f"as the test asks; the key was {KEY}"}, failure[1]

    def _store(self, body: dict) -> None:
        check_batch(body)
        model, source = body["modelId"], body["source"]
        ids = self.sets.get((model, source.split("-", 1)[1]))
        check(ids is not None and source in ids, "Something went wrong on our end.", 500)
        for feature in body["features"]:
            stored = self.features.setdefault((model, source, feature["index"]), [])
            stored.append(feature)


@contextmanager
def serving() -> Iterator[Neuronpedia]:
    """A server at ``address``, while open."""
    state, lock = Neuronpedia(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with lock:
                self._answer()

        do_GET = do_POST

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            text = self.rfile.read(length)
            path = self.path.removeprefix("/api/")
            state.requests.append((self.command, path, time.monotonic()))
            headers: dict[str, str] = {}
            try:
                key = self.headers["X-Api-Key"]
                check(key == KEY, f"no such key: {key}", 401)
                check(length <= 4_500_000, "FUNCTION_PAYLOAD_TOO_LARGE", 413)
                if self.command == "POST":
                    check(self.headers["Content-Type"] == "application/json", "content type")
                body = json.loads(text, parse_constant=strict) if text else None
                status, content, headers = state.answer(self.command, path, body)
            except Wrong as wrong:
                (status, words) = wrong.args
                content = {"error": words, "message": words}
            written = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(written))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(written)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
