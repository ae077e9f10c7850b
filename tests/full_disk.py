"""A disk that is soon full: a small one in memory; where none may be mounted, limited files."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, size: int, file_size: int) -> Iterator[Callable[[], object]]:
    """Make ``folder`` a disk of ``size`` bytes, else limit files to ``file_size``.

    Yields a function that makes room.
    """

    def mount(*words: object) -> bool:
        command = ["mount", *map(str, words), str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    folder.mkdir(exist_ok=True)
    if shutil.which("mount") and mount("-t", "tmpfs", "-o", f"size={size}", "none"):
        try:
            yield lambda: mount("-o", "remount,size=64m")
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, limits[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
