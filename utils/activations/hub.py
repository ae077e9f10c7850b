"""Datasets of the Hugging Face Hub: their files at one commit, read where they lie.

A file is read by HTTP in blocks of bytes, so that reading can begin anywhere in it, and a request
that fails is made again without those before it.
"""

import io
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar
from urllib.parse import quote

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from tqdm import tqdm

from utils.language_model import look_for_hub
from utils.settings import InputError, hub_token

BLOCK = 2**23  # bytes of a request
N_TRIES = 9
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try, doubled up to the longest
TIMEOUT = 60.0  # seconds without an answer, after which a request has failed
BUSY = (408, 429)  # HTTP statuses that pass, besides those from 500 on

T = TypeVar("T")
_retries: Counter[str] = Counter()  # of this process, by reason


class HubPath(PurePosixPath):
    """``NAME@COMMIT/FILE``, a file of a dataset; it opens as a local path does."""

    __slots__ = ()

    def open(self, _mode: str = "rb") -> BinaryIO:
        """The file's bytes; reading them may raise `InputError`."""
        return io.BufferedReader(_RemoteFile(self), BLOCK)

    def is_file(self) -> bool:
        return True


class _RemoteFile(io.RawIOBase):
    """A file of the hub: each read is a request for as many bytes."""

    def __init__(self, path: HubPath):
        self._name, _, rest = str(path).partition("@")
        commit, _, file = rest.partition("/")
        self._url = f"{_endpoint()}/datasets/{self._name}/resolve/{commit}/{quote(file)}"
        self._at, self._size = 0, None  # the size is known from the first answer on

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END and self._size is None:
            self._fetch(0, 1)
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        content = self._fetch(self._at, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _fetch(self, start: int, n: int) -> bytes:
        """Up to ``n`` bytes from ``start`` on; none beyond the end."""
        if self._size is not None and start >= self._size:
            return b""
        try:
            return patiently(self._request, start, n)
        except Exception as error:  # of whichever HTTP library the hub's client is made with
            raise refusal(self._name, error) from None

    def _request(self, start: int, n: int) -> bytes:
        headers = build_hf_headers(token=hub_token())
        headers |= {"Range": f"bytes={start}-{start + n - 1}", "Accept-Encoding": "identity"}
        session = huggingface_hub.get_session()
        response = session.get(self._url, headers=headers, timeout=TIMEOUT)
        if response.status_code == 416:  # nothing there: the file is empty
            self._size = start
            return b""
        hf_raise_for_status(response)
        if response.status_code != 206:  # all of the file, whatever was asked for
            self._size = len(response.content)
            return response.content[start : start + n]
        self._size = int(response.headers["Content-Range"].rpartition("/")[2])
        return response.content


def list_dataset(name: str, commit: str | None = None) -> tuple[HubPath, list[HubPath]]:
    """The root and all files of a dataset, at a commit or its newest; the root ends in ``@COMMIT``.

    Raises:
        InputError: There is no such dataset or commit, no access to it, or no network.
    """
    look_for_hub()
    api = huggingface_hub.HfApi(endpoint=_endpoint(), token=hub_token())
    try:
        found = patiently(api.dataset_info, name, revision=commit, timeout=TIMEOUT)
    except RevisionNotFoundError:
        raise InputError(
            f"The text was begun with revision {commit} of {name}, which is gone from the hub, so "
            "what follows it cannot be known. Delete ACTIVATIONS_DIR, or name another, to start "
            "anew with the present revision; or name as DATASET a folder with a copy of the "
            "earlier one, in another ACTIVATIONS_DIR."
        ) from None
    except Exception as error:  # many kinds: not found, gated, offline, connection
        raise refusal(name, error) from None
    root = HubPath(f"{name}@{found.sha}")
    return root, sorted(root / sibling.rfilename for sibling in found.siblings)


def commit_of(root: HubPath) -> str:
    return str(root).rpartition("@")[2]


def patiently(request: Callable[..., T], *arguments: object, **options: object) -> T:
    """What a request gives, made again while it fails by what may pass: a busy hub, a network.

    Each time is printed, and counted for `retries_in_words`.
    """
    wait = FIRST_WAIT
    for n_try in range(1, N_TRIES):
        try:
            return request(*arguments, **options)
        except Exception as error:
            if not _may_pass(error):
                raise
            reason, asked = _in_words(error), _asked_wait(error)
        _retries[reason] += 1
        pause = max(wait, asked)
        tqdm.write(f"The hub: {reason}. Trying again in {pause:g} s ({n_try} of {N_TRIES - 1}).")
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT)
    return request(*arguments, **options)


def retries_in_words() -> str:
    """A line on the requests that this process had to repeat; empty if there were none."""
    reasons = ", ".join(f"{reason} ({n:,})" for reason, n in _retries.items())
    n = _retries.total()
    return f"Asked the hub again {n:,} {'time' if n == 1 else 'times'}: {reasons}.\n" if n else ""


def refusal(name: str, error: Exception) -> InputError:
    """The error for a dataset that cannot be read. To be raised "from None", because the errors
    behind it may show request headers."""
    return InputError(
        f"{name} is no local file or folder, and could not be read from the hub "
        f"({_in_words(error)}).\n"
        f"Check the name and the network; what was saved stays, and the same command goes on. For "
        "a gated dataset accept its licence on its hub page and set HF_TOKEN in .env. Without a "
        "hub: --dataset embedded."
    )


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in BUSY or error.response.status_code >= 500
    return not isinstance(error, (OfflineModeIsEnabled, ValueError))


def _asked_wait(error: Exception) -> float:
    """Seconds that a busy hub asks to wait; at most `LONGEST_WAIT`."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    asked = headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0


def _in_words(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and _may_pass(error):
        return f"HTTP {error.response.status_code}"
    token, reason = hub_token(), f"{type(error).__name__}: {error}".split("\n")[0]
    return reason.replace(token, "<token>") if token else reason


def _endpoint() -> str:
    return huggingface_hub.constants.ENDPOINT
