"""An unfinished pass in a file, so that one that was killed or stopped goes on."""

import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from utils.activations.store import Contexts
from utils.artifacts import reading, replacing
from utils.settings import TimeIsUp, TimeLimit

SAVE_EVERY = 600.0  # seconds; a pass of a million features is gigabytes
State = Mapping[str, np.ndarray | torch.Tensor]


class HasState(Protocol):
    """What a backup holds: all that a pass has gathered, as arrays by name."""

    def state(self) -> State: ...

    def restore(self, state: dict[str, np.ndarray]) -> None: ...


class PassBackup:
    """The file that an unfinished pass is kept in.

    Args:
        limit: Of the time; the pass stops when it is saved, if the next time would be too late.
    """

    def __init__(self, path: Path, limit: TimeLimit):
        self.path, self.limit = path, limit
        self._saved = time.monotonic()

    def restore(self, unfinished: HasState, contexts: Contexts) -> int:
        """Take over what was kept; returns how many of the contexts it is of, 0 if there is none.

        In a folder of bounded size there may be others now; the pass then begins anew.

        Raises:
            InputError: The file is damaged.
        """
        if not self.path.exists():
            return 0
        remedy = "Delete it, and run the same command again; the pass then begins anew."
        with reading(self.path, remedy), np.load(self.path) as arrays:
            n_done = int(arrays["n_done"])
            if int(arrays["contexts"]) != _checksum(contexts):
                return 0
            unfinished.restore(dict(arrays))
        print(f"The pass goes on after {n_done:,} contexts.")
        return n_done

    def keep(self, unfinished: HasState, contexts: Contexts, n_done: int) -> None:
        """Save a pass that has gone through so many contexts, if the last time is long ago.

        Raises:
            TimeIsUp: There is no time for as much again.
        """
        if time.monotonic() - self._saved < SAVE_EVERY:
            return
        arrays = {name: as_numpy(values) for name, values in unfinished.state().items()}
        with replacing(self.path) as partial, partial.open("wb") as file:
            np.savez(file, n_done=n_done, contexts=_checksum(contexts), **arrays)
        self._saved = time.monotonic()
        if not self.limit.allows_another():
            raise TimeIsUp(f"the pass has gone through {n_done:,} contexts.")


def _checksum(contexts: Contexts) -> int:
    return zlib.crc32(np.asarray(contexts, np.int64).tobytes())


def as_numpy(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values


def inside(name: str, state: State) -> dict[str, np.ndarray | torch.Tensor]:
    """The state of a part, under its name in that of the whole."""
    return {f"{name}.{key}": values for key, values in state.items()}


def of_part(name: str, state: State) -> dict[str, np.ndarray]:
    """The state of a part, from that of the whole."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): values for key, values in state.items() if key.startswith(prefix)
    }
