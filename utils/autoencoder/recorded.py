"""The part of a training step that is the same each time, recorded on a graphics card and replayed.

A step is some three hundred operations, and Python takes longer to ask for them than a card takes
to do them where the dictionary is small, or where threads that read the next pool want Python too.
As a CUDA graph they are one call.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch

WARM_UP = 2  # runs before one is recorded: libraries set themselves up in the first
ROOM = 2  # times what a run takes must be free: for the recorded one, and for others after it


@dataclasses.dataclass(frozen=True)
class Recording:
    """A graph that computes ``results`` from ``batch``, which lie where they were recorded."""

    graph: torch.cuda.CUDAGraph
    batch: torch.Tensor
    results: Any

    def replay(self, batch: torch.Tensor) -> Any:
        self.batch.copy_(batch, non_blocking=True)
        self.graph.replay()
        return self.results


class Recorder:
    """Runs a function of a batch; on a graphics card it records the third run and replays it.

    What the function reads and writes besides must stay where it is in memory, and nothing in it
    may wait for the card. Memory of a recording is kept until `clear`; where there is too little of
    it, the function is run as it is.
    """

    def __init__(self):
        self._runs: collections.Counter[Hashable] = collections.Counter()
        self._recordings: dict[Hashable, Recording | None] = {}  # None: it cannot be recorded

    def run(self, function: Callable[[torch.Tensor], Any], batch: torch.Tensor, form: Hashable):
        """The function's results for a batch; they are overwritten by the next run of that form.

        Args:
            form: What besides the batch's shape decides which operations the function consists of.
        """
        form = form, batch.shape, batch.dtype
        if form not in self._recordings and self._runs[form] >= WARM_UP:
            self._recordings[form] = _record(function, batch) if _has_room() else None
        self._runs[form] += 1
        recording = self._recordings.get(form)
        return function(batch) if recording is None else recording.replay(batch)

    def clear(self) -> None:
        """Give the memory back."""
        self.__init__()


def _record(function: Callable[[torch.Tensor], Any], batch: torch.Tensor) -> Recording | None:
    """Record a run, without making it."""
    graph, batch = torch.cuda.CUDAGraph(), batch.to("cuda", copy=True)
    try:
        # Threads that read the next pool may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = function(batch)
    except RuntimeError as error:  # by card, driver and libraries
        print(f"Steps are made one operation at a time, for they cannot be recorded here: {error}")
        return None
    return Recording(graph, batch, results)


def _has_room() -> bool:
    """Whether there is memory for what a run holds at most, as often as is needed."""
    held = torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - held
    return ROOM * (torch.cuda.max_memory_allocated() - held) <= free
