"""Shards shared out among any number of processes, which agree by files in the folder alone.

All cut one stream of contexts into shards, so the shards are the same for any number of processes.
Where a shard begins is known once all before it are tokenised: ``cursor.json`` tells how far that
is. Who takes the next shard tokenises it, and moves the cursor to where the one after it begins. A
process locks a shard while it makes it; when the process dies the lock is gone, and another makes
the shard from its start.
"""

import collections
import contextlib
import copy
import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from utils.activations.contexts import Context, pack_contexts
from utils.activations.corpus import BEGINNING, Corpus, Document, Place, Position
from utils.activations.layers import LayerFolder
from utils.activations.manifest import ShardEntry, SubsetNumbers
from utils.artifacts import replacing
from utils.settings import Json

WAIT = 0.5  # seconds between looks at what other processes are making
TURN = 0.01  # and at whether the cursor is free
SHARD_LOCK = ".lock-shard-"


class Stream:
    """The contexts of a corpus from any position on; from a later one without reading it anew.

    Args:
        rank, world_size: Of the documents, as earlier versions shared them out.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.corpus = copy.copy(corpus)  # whose count of skipped records is of this stream alone
        self._tokenizer, self._context_length = tokenizer, context_length
        self.rank, self.world_size = rank, world_size
        self._position: Position | None = None  # where `_contexts` goes on
        self._contexts: Iterator[Context] = iter(())
        self._source: Iterator[Document] = iter(())
        # Documents read from the source: those still to be given out, and those given out since the
        # one in which the latest context ends.
        self._upcoming: collections.deque[Document] = collections.deque()
        self._given: collections.deque[Document] = collections.deque()

    def at(self, start: Position) -> "Stream":
        """This one, or another of the same contexts for a position that this one is beyond."""
        if self._position is None or self._position[:2] <= start[:2]:
            return self
        return Stream(
            self.corpus, self._tokenizer, self._context_length, self.rank, self.world_size
        )

    def take(self, start: Position, n: int) -> list[Context]:
        """Up to ``n`` contexts from a position on; fewer where the corpus ends."""
        if start != self._position:
            self._contexts = pack_contexts(
                self._documents_from(start), self._tokenizer, self._context_length, start
            )
        taken = list(itertools.islice(self._contexts, n))
        self._position = taken[-1].next_position if taken else start
        while taken and self._given and self._given[0].index < taken[-1].documents[-1]:
            self._given.popleft()
        return taken

    def _documents_from(self, start: Position) -> Iterator[Document]:
        self._upcoming.extendleft(reversed(self._given))
        self._given.clear()
        at = start.place
        if at and not at.byte and self._upcoming and self._upcoming[0].place[:2] <= at[:2]:
            while (document := self._next()) and document.place[:2] != at[:2]:
                pass  # others made contexts of these
            if start.token == 0:  # and of this one
                while document and not document.ends:
                    document = self._next()
            elif document:
                self._upcoming.appendleft(document)
        else:
            self._upcoming.clear()
            self._source = self.corpus.documents(start, self.rank, self.world_size)
        return self._giving_out()

    def _next(self) -> Document | None:
        return self._upcoming.popleft() if self._upcoming else next(self._source, None)

    def _giving_out(self) -> Iterator[Document]:
        while document := self._next():
            self._given.append(document)
            yield document


@dataclasses.dataclass
class Cursor:
    """How far the stream is cut into shards.

    Attributes:
        index: Of the next shard.
        start: Where that begins; a `Position`.
        subsets: The names of those before it, in the order of their numbers.
        begun: The starts of shards that may not be recorded yet, by index.
        skipped: Records of the whole corpus that cannot be used, by reason, once its end is found.
    """

    index: int
    start: list[Json]
    subsets: list[str]
    begun: dict[str, list[Json]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, int] | None = None


@dataclasses.dataclass
class Claim:
    """A shard that this process makes: its number and start, contexts, and all subsets so far."""

    number: int
    start: Position
    contexts: list[Context]
    subsets: list[str]


class _AllDone(Exception):
    """All shards are recorded."""


class Claims:
    """Hands out the shards of a run, each to one process at a time.

    Args:
        layers: Each of them has every shard.
        stream: Of the contexts; its rank and world size decide the numbers of its shards.
        n_contexts: In all.
        per_shard: Contexts in a shard.
        while_waiting: Called between looks at what others do, with whether there is no room for the
            next shard. What it raises ends the waiting.
    """

    def __init__(
        self,
        layers: list[LayerFolder],
        stream: Stream,
        n_contexts: int,
        per_shard: int,
        while_waiting: Callable[[bool], None] = lambda for_room: None,
    ):
        self.layers, self.stream, self._while_waiting = layers, stream, while_waiting
        self.n_contexts, self.per_shard = n_contexts, per_shard
        part = "" if stream.world_size == 1 else f"-{stream.rank:05d}"
        folder = layers[0].folder
        self.path, self._turn = folder / f"cursor{part}.json", folder / f".lock-cursor{part}"
        self.has_ended = False  # the corpus, before there were enough contexts
        self.skipped: dict[str, int] | None = None  # up to the last context, or the corpus' end
        self._locks: dict[int, list[FileLock]] = {}
        self._is_stopped, self._changed = False, threading.Event()

    def shards(self) -> Iterator[Claim]:
        """Claim shards until none is left, waiting for those that other processes make."""
        self._begin()
        with contextlib.suppress(_AllDone):
            while not self._is_stopped:
                claim = self._claim_begun() or self._claim_next()
                if claim:
                    yield claim
                elif not self._is_made_elsewhere():
                    return
                else:
                    cursor = self._read()
                    self._while_waiting(not (self._is_at_end(cursor) or self._has_room(cursor)))
                    self._changed.wait(WAIT)
                    self._changed.clear()

    def stop(self) -> None:
        """Claim nothing more, and wait for nothing."""
        self._is_stopped = True
        self._changed.set()

    def close(self) -> None:
        """Let go of what is claimed and was not made."""
        for number in list(self._locks):
            self.release(number, is_recorded=False)

    def lock(self, number: int) -> bool:
        """Keep other processes from making a shard; False if one is."""
        locks = []
        for layer in self.layers:
            lock = FileLock(layer.folder / f"{SHARD_LOCK}{number:05d}", 0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                for taken in locks:
                    taken.release()
                return False
            locks.append(lock)
        self._locks[number] = locks
        return True

    def settle(self, number: int) -> None:
        """Let go of a shard that is recorded, and say so to processes that do not see it yet, as
        on a network's disk."""
        index = (number - self.stream.rank) // self.stream.world_size
        with contextlib.suppress(_AllDone), FileLock(self._turn, poll_interval=TURN):
            cursor = self._read()
            if cursor.begun.pop(str(index), None):
                self._write(cursor)
        self.release(number)

    def release(self, number: int, is_recorded: bool = True) -> None:
        """Let go of a shard."""
        for lock in self._locks.pop(number, ()):
            if is_recorded:  # who locks the file nevertheless looks again and finds it recorded
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        self._changed.set()

    # ---- claiming

    def _recorded(self) -> dict[int, ShardEntry]:
        """An entry of each shard that all layers have."""
        first, *others = [layer.recorded() for layer in self.layers]
        return {n: entry for n, entry in first.items() if all(n in other for other in others)}

    def _number(self, index: int) -> int:
        return self.stream.rank + index * self.stream.world_size

    def _claim_begun(self) -> Claim | None:
        """A shard that was begun, by a process that is not there any more."""
        cursor, recorded = self._read(), self._recorded()
        for index in sorted(map(int, cursor.begun)):
            number = self._number(index)
            if number in recorded or not self.lock(number):
                continue
            if number in self._recorded():  # meanwhile
                self.release(number)
                continue
            start = as_position(cursor.begun[str(index)])
            contexts = self.stream.at(start).take(start, self._size(index))
            return Claim(number, start, contexts, cursor.subsets)
        return None

    def _claim_next(self) -> Claim | None:
        """The shard at the cursor, which is moved beyond it."""
        with FileLock(self._turn, poll_interval=TURN):
            cursor, recorded = self._read(), self._recorded()
            while not self._is_at_end(cursor):
                number, start = self._number(cursor.index), as_position(cursor.start)
                # Not locked while there is no room for it: another may have to be made before.
                if number not in recorded and not (self._has_room(cursor) and self.lock(number)):
                    return None
                contexts = self._advance(cursor)
                cursor.begun = {
                    index: begun
                    for index, begun in cursor.begun.items()
                    if self._number(int(index)) not in recorded
                }
                self._write(cursor)
                if contexts and number not in recorded:
                    return Claim(number, start, contexts, cursor.subsets)
                self.release(number)
        return None

    def _has_room(self, cursor: Cursor) -> bool:
        """Whether the next shard may be begun."""
        number = self._number(cursor.index)
        return all(layer.has_room(number) for layer in self.layers)

    def _advance(self, cursor: Cursor) -> list[Context]:
        """Move a cursor beyond its shard; the contexts of that, none where the corpus ended."""
        wanted = self._size(cursor.index)
        contexts = self.stream.take(as_position(cursor.start), wanted)
        if len(contexts) < wanted:
            cursor.skipped = dict(self.stream.corpus.skipped)
        if contexts:
            numbers = SubsetNumbers(cursor.subsets)
            for context in contexts:
                for document in sorted(context.subsets):
                    numbers[context.subsets[document]]  # a new one gets the next
            cursor.begun[str(cursor.index)] = cursor.start
            cursor.index, cursor.subsets = cursor.index + 1, list(numbers)
            cursor.start = list(contexts[-1].next_position)
        return contexts

    def _size(self, index: int) -> int:
        return min(self.per_shard, self.n_contexts - index * self.per_shard)

    def _is_at_end(self, cursor: Cursor) -> bool:
        return cursor.skipped is not None or self._size(cursor.index) <= 0

    def _is_made_elsewhere(self) -> bool:
        """Whether there are shards that are not recorded, but for those that this process makes."""
        cursor, mine = self._read(), set(self._locks)
        place = as_position(cursor.start).place
        self.has_ended = cursor.skipped is not None
        self.skipped = cursor.skipped if self.has_ended else place and place.skipped
        begun = {self._number(int(index)) for index in cursor.begun}
        return not self._is_at_end(cursor) or not begun <= mine | self._recorded().keys()

    # ---- the cursor

    def _begin(self) -> None:
        """Set the cursor behind what is recorded, unless it is right already.

        It is wrong in folders of earlier versions, which had none, or where a manifest was deleted.
        """
        with FileLock(self._turn, poll_interval=TURN):
            recorded = self._recorded()
            n = next(i for i in itertools.count() if self._number(i) not in recorded)
            if self.path.exists():
                cursor = self._read()
                known = {*recorded, *(self._number(int(index)) for index in cursor.begun)}
                if all(self._number(index) in known for index in range(cursor.index)):
                    return
            # At the last of them, not after it: its end is not recorded by whoever made it.
            last = recorded[self._number(n - 1)] if n else None
            names = max((layer.subsets() for layer in self.layers), key=len)
            if last and last.start:
                self._write(Cursor(n - 1, last.start, names))
            else:
                self._write(Cursor(0, list(BEGINNING), names))

    def forget(self) -> None:
        """Delete the cursor, when all shards are recorded; also of runs of fewer layers.

        And the locks that processes left which were killed while they recorded a shard.
        """
        for layer in self.layers:
            for path in (layer.folder / self.path.name, *layer.folder.glob(f"{SHARD_LOCK}*")):
                path.unlink(missing_ok=True)

    def _read(self) -> Cursor:
        try:
            return Cursor(**json.loads(self.path.read_text("utf-8")))
        except FileNotFoundError:  # another process deleted it
            raise _AllDone from None

    def _write(self, cursor: Cursor) -> None:
        with replacing(self.path, is_whole=False) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(cursor)), "utf-8")


def as_position(recorded: list[Json]) -> Position:
    """A position that was read from JSON."""
    document, token, place = (*recorded, None)[:3]
    return Position(document, token, Place(*place) if place else None)
