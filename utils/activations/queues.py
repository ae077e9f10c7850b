"""Threads beside the model's: contexts are read ahead of it, and shards are written behind it."""

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

from utils.activations.manifest import ShardEntry
from utils.activations.shards import ShardWriter
from utils.backend import ran_out_of_memory
from utils.settings import InputError, TimeIsUp

if TYPE_CHECKING:  # a training has no language model, and reads ahead too
    from utils.activations.capture import Captured

QUEUED = 8  # batches between the model and the disk, in the host's memory

T = TypeVar("T")


def read_ahead(
    items: Iterable[T], n: int = 1, stop: Callable[[], None] = lambda: None
) -> Iterator[T]:
    """Yield ``items`` in their order, while a thread of its own takes up to ``n`` in advance.

    What they raise is raised here, in its place. Closing this iterator ends the thread, after
    ``stop``, which must end a wait that ``items`` may be in.
    """
    remaining, end = iter(items), object()
    with ThreadPoolExecutor(1, "reading") as thread:
        upcoming = collections.deque(thread.submit(next, remaining, end) for _ in range(n))
        try:
            while (item := upcoming.popleft().result()) is not end:
                upcoming.append(thread.submit(next, remaining, end))
                yield item
        finally:
            stop()
            thread.shutdown(cancel_futures=True)


class _Lane:
    """A thread that does tasks in their order, and none after one that failed."""

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, name)
        self.failure: BaseException | None = None

    def add(self, task: Callable[..., None], *arguments: object) -> Future[None]:
        return self._thread.submit(self._do, task, *arguments)

    def _do(self, task: Callable[..., None], *arguments: object) -> None:
        if self.failure is None:
            try:
                task(*arguments)
            except BaseException as error:
                self.failure = error

    def close(self) -> None:
        """Wait until all tasks are done."""
        self._thread.shutdown()


class ShardQueue:
    """Writes shards behind the model, in their order; at most `QUEUED` batches wait.

    One thread writes, another finishes shards (waits for the disk, renames, tells the caller) while
    the next is written. What fails there is raised by the next `append`, or on leaving the context;
    shards that were complete by then are still finished, and the files of others deleted.
    """

    def __init__(self):
        self._room = threading.Semaphore(QUEUED)
        self._writing, self._finishing = _Lane("writing"), _Lane("finishing")
        self._unfinished: list[ShardWriter] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writing.close()  # first, because it adds to the other
        self._finishing.close()
        for writer in self._unfinished:
            writer.discard()
        if kind in (None, TimeIsUp):
            self.raise_failure()

    def begin(self, writer: ShardWriter) -> ShardWriter:
        """Take a shard's writer, to be given batches."""
        self._unfinished.append(writer)
        return writer

    def append(self, writer: ShardWriter, batch: "Captured") -> None:
        """Add a batch to a shard, after waiting while too many are in the queue."""
        self._room.acquire()
        try:
            self.raise_failure()
        except BaseException:
            self._room.release()
            raise
        written = self._writing.add(lambda: writer.append(**batch.arrays()))
        written.add_done_callback(lambda _: self._room.release())

    def finish(
        self,
        writer: ShardWriter,
        crc32: dict[str, int] | None = None,
        then: Callable[[ShardEntry], None] = lambda _: None,
    ) -> None:
        """Finish a shard (see `ShardWriter.finish`) after its batches and the shards before it.

        ``then`` is called with its entry in the finishing thread.
        """
        self._writing.add(self._finishing.add, self._finish, writer, crc32, then)

    def _finish(
        self,
        writer: ShardWriter,
        crc32: dict[str, int] | None,
        then: Callable[[ShardEntry], None],
    ) -> None:
        entry = writer.finish(crc32)
        self._unfinished.remove(writer)
        then(entry)

    def discard(self, writer: ShardWriter) -> None:
        """Delete a shard's files, after its batches that are in the queue."""
        self._writing.add(lambda: None).result()
        writer.discard()
        self._unfinished.remove(writer)

    def raise_failure(self) -> None:
        """Raise what has failed in a thread, if anything has."""
        for lane in (self._finishing, self._writing):
            if lane.failure is None:
                continue
            if ran_out_of_memory(lane.failure):  # a smaller batch of the model's would not help
                raise InputError(
                    "Memory ran out while a shard was written. Free some, and run the same command "
                    "again."
                ) from lane.failure
            raise lane.failure
