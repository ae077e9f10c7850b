"""Several autoencoders by one command, each in a process of its own, on a graphics card of its own.

One is trained for each size in N_LATENTS and, where ACTIVATIONS_DIR holds folders of several
layers, for each of these: into folders of AUTOENCODER_DIR, ``layer-8-16384`` and so on, each as the
command would write that trains it alone. What a process prints goes to ``layer-8-16384.log``.
"""

import contextlib
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from utils.artifacts import SETTINGS_FILE, make_folder
from utils.settings import TO_GO_ON, TimeIsUp, TimeLimit, require

POLL = 0.2  # seconds between looks at the processes


class SeveralSettings(Protocol):
    """The settings of train_autoencoder.py that decide how many are trained."""

    activations_dir: str
    autoencoder_dir: str
    n_latents: int | tuple[int, ...]
    follow: bool
    max_hours: float | None
    sweep_latents: tuple[int, ...]
    import_from: str | None
    export: tuple[str, ...]
    push_to_hub: str | None


class Job(NamedTuple):
    """One of the autoencoders: its name, and the settings that differ from the others'."""

    name: str
    activations_dir: Path
    n_latents: int


def jobs_of(settings: SeveralSettings) -> list[Job]:
    """The autoencoders that settings ask for; none if it is only one.

    Raises:
        InputError: They cannot be trained by one command.
    """
    folder = Path(settings.activations_dir)
    layers = [] if (folder / SETTINGS_FILE).exists() else sorted(
        path for path in folder.glob("layer-*")
        if (path / SETTINGS_FILE).exists() or (settings.follow and path.is_dir())
    )  # fmt: skip
    is_one_size = isinstance(settings.n_latents, int)
    if is_one_size and not layers:
        return []
    sizes = (settings.n_latents,) if is_one_size else settings.n_latents
    require(
        0 < len(sizes) == len(set(sizes)),
        f"N_LATENTS must be one size or several different ones; it is {sizes}.",
    )
    for name in ("sweep_latents", "import_from", "export", "push_to_hub"):
        require(
            not getattr(settings, name),
            f"{name.upper()} is of one autoencoder; here are several sizes or layers. Name one of "
            "each, or leave it out.",
        )
    require(
        not settings.follow or len(sizes) == 1,
        "FOLLOW frees what it has used, so it can train one size of a layer; N_LATENTS is "
        f"{sizes}. Name one.",
    )
    return [
        Job("-".join([*([layer.name] if layers else []), str(size)]), layer, size)
        for layer, size in itertools.product(layers or [folder], sizes)
    ]


def train_several(settings: SeveralSettings, jobs: list[Job]) -> None:
    """Run this process's command once for each job, as many at once as there are cards.

    With FOLLOW all run at once: the extraction waits for the slowest.

    Raises:
        InputError: Some have failed; names them and their logs.
        TimeIsUp: Some were stopped by MAX_HOURS.
    """
    folder, n_cards = make_folder(settings.autoencoder_dir, "--autoencoder-dir"), count_cards()
    waiting, running = list(jobs), {}
    free = list(range(len(jobs) if settings.follow else max(1, n_cards)))
    limit, ended = TimeLimit(settings.max_hours), dict[str, int]()
    with _ending(running):
        while waiting or running:
            if ended and limit.is_over():  # the first is always made
                waiting.clear()
            while waiting and free:
                job, place = waiting.pop(0), free.pop(0)
                card = place % n_cards if n_cards else None
                print(f"{job.name} begins; see {folder / job.name}.log", flush=True)
                running[job] = place, _begin(job, folder, card, limit)
            time.sleep(POLL)
            for job, (place, process) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    free.append(place)
                    ended[job.name] = process.returncode
                    print(f"{job.name}: {_last_line(folder / f'{job.name}.log')}", flush=True)
    failed = [f"{folder / name}.log" for name, code in ended.items() if code not in (0, TO_GO_ON)]
    require(
        not failed,
        f"{len(failed)} of {len(jobs)} failed, the others are saved. What is wrong is at the end "
        f"of {', '.join(failed)}.",
    )
    if TO_GO_ON in ended.values() or len(ended) < len(jobs):
        raise TimeIsUp("Each autoencoder is saved as far as it came.")


def count_cards() -> int:
    """The graphics cards that this process may use."""
    import torch  # which takes seconds that one training does not need

    return torch.cuda.device_count()


def _begin(job: Job, folder: Path, card: int | None, limit: TimeLimit) -> subprocess.Popen:
    """The command of this process again, with the settings of one job behind its own."""
    own = {
        "--activations-dir": job.activations_dir,
        "--autoencoder-dir": folder / job.name,
        "--n-latents": job.n_latents,
    }
    if limit.end < math.inf:  # what is left of it
        own["--max-hours"] = max(0.0, limit.end - time.monotonic()) / 3_600 or 1e-9
    words = [str(word) for pair in own.items() for word in pair]
    environment = dict(os.environ)
    if card is not None:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = shown.split(",")[card] if shown else str(card)
    with open(folder / f"{job.name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *sys.argv, *words], stdout=log, stderr=log, env=environment
        )


@contextlib.contextmanager
def _ending(running: dict[Job, tuple[int, subprocess.Popen]]) -> Iterator[None]:
    """End the processes that run, where this one is stopped."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next(filter(None, map(str.strip, reversed(lines))), "")
