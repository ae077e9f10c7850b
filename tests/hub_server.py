"""A server with the interface of the Hugging Face Hub that its client uses, without Xet: accounts,
repositories, uploads (LFS and regular), commits, downloads."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

OWN, ORGANISATION = "me", "lab"
LFS = (".keras", ".safetensors", ".png")


class Repository:
    """Files by path, at one commit after another."""

    def __init__(self, private: bool):
        self.private, self.gated = private, False
        self.files: dict[str, bytes] = {}

    @property
    def commit(self) -> str:
        content = json.dumps({path: digest(file) for path, file in sorted(self.files.items())})
        return hashlib.sha1(content.encode()).hexdigest()


class Hub:
    """What the server holds, and the requests that it was asked.

    Attributes:
        token: Of the account `OWN`, the only one.
        repositories: By owner/name.
        requests: Method and path of each.
        is_broken: Answer uploads of large files with an error.
        is_read_only: Refuse commits.
    """

    def __init__(self, token: str):
        self.token, self.url = token, ""
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.requests: list[str] = []
        self.is_broken = self.is_read_only = False

    def count(self, start: str) -> int:
        return sum(request.startswith(start) for request in self.requests)

    def fetched(self) -> set[str]:
        """The files, of any repository, whose content was asked for."""
        asked = (request.split("/resolve/") for request in self.requests)
        return {path[-1].partition("/")[2] for method, *path in asked if path and "GET" in method}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """While open, the hub answers at ``hub.url``."""
    handler = type("Handler", (Answer,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def reach(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client ask this hub, with its token, instead of the real one."""
    url_of_files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url_of_files,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,  # put back after a test without a network
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.token)


class Answer(BaseHTTPRequestHandler):
    """Answers a request of the hub's client."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self._read()
        given = self.headers.get("Authorization")
        self.is_known = given == f"Bearer {self.hub.token}"
        parts = path.strip("/").split("/")
        if path == "/":
            self._send(200)
        elif given and not self.is_known:
            self._send(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": OWN, "orgs": [{"name": ORGANISATION}]})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif parts[0] == "stored":
            self._store(parts[1])
        else:
            self._answer_of_repository(parts)

    def _answer_of_repository(self, parts: list[str]) -> None:
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        name = name.removesuffix(".git")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and not self.is_known):
            self._send(401 if repository else 404, {}, {"X-Error-Code": "RepoNotFound"})
        elif is_api and rest[:1] == ["preupload"]:
            self._send(200, {"files": [_mode_of(file["path"]) for file in self._json()["files"]]})
        elif is_api and rest[:1] == ["commit"]:
            self._commit(repository, f"{owner}/{name}")
        elif is_api:
            siblings = [{"rfilename": file} for file in sorted(repository.files)]
            facts = {"id": f"{owner}/{name}", "sha": repository.commit, "siblings": siblings}
            self._send(200, {**facts, "private": repository.private, "tags": [], "downloads": 0})
        elif rest[:1] == ["info"]:
            self._send(
                200,
                {"transfer": "basic", "objects": list(map(self._action, self._json()["objects"]))},
            )
        else:
            self._resolve(repository, "/".join(rest[2:]))

    # ---- answers

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "It exists", "url": f"{self.hub.url}/{name}"})
        elif asked["organization"] not in (OWN, ORGANISATION) or not self.is_known:
            self._send(403, {"error": "You don't have the rights to create a model there"})
        else:
            self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
            self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _action(self, wanted: dict) -> dict:
        """How a large file is uploaded; not at all if it is here."""
        if wanted["oid"] in self.hub.stored:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/stored/{wanted['oid']}"}}}

    def _store(self, oid: str) -> None:
        if self.hub.is_broken or digest(self.body) != oid:
            self._send(400, {"error": "It broke"})
        else:
            self.hub.stored[oid] = self.body
            self._send(200)

    def _commit(self, repository: Repository, name: str) -> None:
        if self.hub.is_read_only:
            self._send(403, {"error": "This token may only read"})
            return
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.stored[value["oid"]]
        url = f"{self.hub.url}/{name}/commit/{repository.commit}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": repository.commit})

    def _resolve(self, repository: Repository, file: str) -> None:
        if repository.gated:
            self._send(403, {}, {"X-Error-Code": "GatedRepo"})
        elif file not in repository.files:
            self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = repository.files[file]
            headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": repository.commit}
            self._send(200, content, headers)

    # ---- bytes

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self) -> dict:
        return json.loads(self.body)

    def _send(self, status: int, content: dict | bytes = b"", headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode_of(path: str) -> dict:
    mode = "lfs" if path.endswith(LFS) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}
