"""A server with the interface of the Hugging Face Hub for datasets, which counts what it is asked.

Each commit of a dataset is a folder of files.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote


class Sent(NamedTuple):
    """An answer with bytes of a file."""

    commit: str
    file: str
    start: int
    n_bytes: int


class Hub:
    """One dataset, ``name``.

    Attributes:
        commits: The folder of each commit; the last is the newest.
        sent: All answers with bytes of files.
        faults: What goes wrong with the next requests for files: an HTTP status, or "cut" for a
            connection that ends too early.
    """

    def __init__(self, name: str, url: str):
        self.name, self.url = name, url
        self.commits: dict[str, Path] = {}
        self.sent: list[Sent] = []
        self.faults: list[int | str] = []

    def bytes_of(self, file: str) -> int:
        return sum(sent.n_bytes for sent in self.sent if sent.file == file)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        listed = re.fullmatch(rf"/api/datasets/{self.name}(?:/revision/(\w+))?", path)
        resolved = re.fullmatch(rf"/datasets/{self.name}/resolve/(\w+)/(.+)", path)
        if listed:
            self._list(request, listed[1] or [*self.commits][-1])
        elif resolved:
            self._send_range(request, *resolved.groups())
        else:
            found = HTTPStatus.OK if path == "/" else HTTPStatus.NOT_FOUND
            self._send(request, found, b"", {"X-Error-Code": "RepoNotFound"})

    def _list(self, request: BaseHTTPRequestHandler, commit: str) -> None:
        folder = self.commits.get(commit)
        if folder is None:
            missing = {"X-Error-Code": "RevisionNotFound"}
            self._send(request, HTTPStatus.NOT_FOUND, b"", missing)
            return
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        content = {
            "id": self.name, "sha": commit, "siblings": [{"rfilename": name} for name in names],
        }  # fmt: skip
        self._send(request, HTTPStatus.OK, json.dumps(content).encode())

    def _send_range(self, request: BaseHTTPRequestHandler, commit: str, file: str) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            self._send(request, fault, b"")
            return
        content = (self.commits[commit] / file).read_bytes()
        start, last = map(
            int, re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"]).groups()
        )
        part = content[start : last + 1]
        if not part:
            self._send(request, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"")
            return
        self.sent.append(Sent(commit, file, start, len(part)))
        within = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        headers = {"Content-Range": within, "Content-Length": str(len(part))}
        self._send(request, 206, part[: len(part) // 2] if fault == "cut" else part, headers)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)
        request.close_connection = True


@contextlib.contextmanager
def serving(name: str) -> Iterator[Hub]:
    """A hub of one dataset, while open."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.answer(self)

        def do_HEAD(self):
            self.send_response(HTTPStatus.OK)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(name, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
