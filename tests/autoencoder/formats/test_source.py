"""Sources on the hub: a local server with its interface, gated and missing ones, no network."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from full_disk import small_disk
from hand_set import array
from test_layouts import dl_batch_topk, rows_of

from utils.autoencoder.formats.importing import find
from utils.autoencoder.formats.source import Source
from utils.settings import FULL, InputError, disk_error

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/saes"
TOKEN = "hf_not-to-be-shown"


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks of it: what a repository holds, and its files."""

    folder: Path
    asked: list[tuple[str, str, str | None]]  # method, path and authorization

    def do_GET(self):
        self.asked.append((self.command, self.path, self.headers["Authorization"]))
        owner_and_name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if self.path == "/":
            self.answer(200, b"")
        elif owner_and_name == "owner/gated" and not self.path.startswith("/api"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif owner_and_name not in (NAME, "owner/gated"):
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif self.path.startswith("/api"):
            paths = (path for path in self.folder.rglob("*") if path.is_file())
            files = [{"rfilename": path.relative_to(self.folder).as_posix()} for path in paths]
            content = {"id": owner_and_name, "sha": COMMIT, "siblings": files}
            self.answer(200, json.dumps(content).encode())
        else:
            file = self.path.partition(f"/resolve/{COMMIT}/")[2]
            content = (self.folder / file).read_bytes()
            self.answer(
                200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{file.replace("/", "-")}"'}
            )

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """A hub with two autoencoders in `NAME`; its ``folder``, and what it was ``asked``."""
    folder, draw = tmp_path / "repository", np.random.default_rng(0)
    rows = rows_of(draw)
    for layer in (3, 7):
        expected = dl_batch_topk(folder / f"layer_{layer}", draw, rows)
    (folder / "README.md").write_text("# Two")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield SimpleNamespace(asked=handler.asked, expected=expected, rows=rows, address=address)
        server.shutdown()


def test_of_a_repository_only_what_is_read_is_fetched(hub):
    source = Source(NAME)
    assert source.revision == COMMIT and "README.md" in source.files
    with pytest.raises(InputError, match="one of the 2 that owner/saes holds: layer_3, layer_7"):
        find(source, None)
    assert not [path for _, path, _ in hub.asked if "resolve" in path]
    made = find(source, "layer_7").build()
    np.testing.assert_allclose(array(made.encode(hub.rows)), hub.expected[0], rtol=1e-5, atol=1e-5)
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"}
    assert fetched >= {"ae.pt", "config.json"} and "README.md" not in fetched
    assert not [path for _, path, _ in hub.asked if "layer_3" in path]
    of_files = [authorization for _, path, authorization in hub.asked if "saes" in path]
    assert set(of_files) == {f"Bearer {TOKEN}"}


def test_without_a_network_what_was_fetched_is_read(hub, monkeypatch):
    find(Source(NAME), "layer_7")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    source = Source(NAME)
    assert source.files == ["layer_7/ae.pt", "layer_7/config.json"] and source.revision == COMMIT
    assert find(source, None).kind == "batch_topk"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"owner/other is no folder here, .* cannot be reached"):
        Source("owner/other")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/nothing", "Cannot load owner/nothing: 401"),
        ("owner/gated", r"If it is gated, accept its licence at .*owner/gated.* is set now"),
    ],
)
def test_what_cannot_be_read_is_said_without_the_token(hub, name, says):
    with pytest.raises(InputError, match=rf"(?s){says}") as raised:
        find(Source(name), "layer_7")
    assert TOKEN not in str(raised.value) and raised.value.__suppress_context__


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_goes_up_as_it_is(hub, tmp_path):
    source = Source(NAME)
    with small_disk(tmp_path / "cache", 8_192, 4_096), pytest.raises(OSError) as raised:
        find(source, "layer_7")
    assert disk_error(raised.value).errno in FULL
