"""The shards of one layer that one process writes: a folder, and a manifest of what is in it."""

import contextlib
import dataclasses
import functools
import os
from pathlib import Path

from tqdm import tqdm

from utils.activations.manifest import Manifest, ShardEntry
from utils.activations.rolling import Rolling
from utils.activations.shards import ARRAYS, EARLIER_ARRAYS, Shard, ShardWriter
from utils.artifacts import SETTINGS_FILE, read_json
from utils.settings import InputError, Json, require

OF_TEXT = ("tokens", "documents", "subsets")  # arrays that are the same at every layer


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of processes that share the run.

    Attributes:
        shares_documents: As in earlier versions, each rank has its share of the documents, of which
            it makes shards of its own; else any process makes any shard.
    """

    rank: int = 0
    world_size: int = 1
    shares_documents: bool = False

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As set by torchrun or accelerate launch; a single process otherwise.

        Raises:
            InputError: The environment's values are invalid.
        """
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        require(
            rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size),
            f"RANK in the environment must be from 0 to WORLD_SIZE - 1; it is {rank!r}, and "
            f"WORLD_SIZE {world_size!r}. Unset both for one process.",
        )
        return cls(int(rank), int(world_size))

    def going_on_with(self, folder: Path) -> "Ranks":
        """The same, sharing the documents out if that is how a folder was begun."""
        recorded = folder / SETTINGS_FILE
        earlier = read_json(recorded).get("world_size", 1) if recorded.exists() else 1
        return dataclasses.replace(self, shares_documents=1 < earlier == self.world_size)

    @property
    def n_streams(self) -> int:
        """The number of streams of contexts, of which each is cut into shards."""
        return self.world_size if self.shares_documents else 1

    @property
    def stream(self) -> int:
        """The one that this process makes shards of."""
        return self.rank if self.shares_documents else 0

    @property
    def manifest_name(self) -> str:
        is_first = self.rank == 0 and not self.shares_documents
        return "manifest.json" if is_first else f"manifest-{self.rank:05d}.json"

    @property
    def lock_name(self) -> str:
        """Processes share a folder, so each holds another lock."""
        return f".lock-{self.rank}"


class LayerFolder:
    """One layer's folder: the manifest that this process writes, after each shard, and others'.

    Attributes:
        manifest: This process's; None before `adopt` if it wrote nothing yet.
        damaged: Entries of the shards that are to be made anew, after `is_finished`.
    """

    def __init__(self, folder: Path, layer: int, ranks: Ranks):
        self.folder, self.layer, self.path = folder, layer, folder / ranks.manifest_name
        self._ranks = ranks
        self.manifest = Manifest.read(self.path) if self.path.exists() else None
        self.damaged: list[ShardEntry] = []

    def manifests(self) -> list[Manifest]:
        """Of all processes that share this one's stream of contexts, this process's first."""
        manifests = [self.manifest] if self.manifest else []
        if not self._ranks.shares_documents:
            others = {*self.folder.glob("manifest*.json")} - {self.path}
            manifests += map(_read_newest, sorted(others))
        return manifests

    def recorded(self) -> dict[int, ShardEntry]:
        """The entry of each finished shard, by its number."""
        return {entry.shard: entry for one in self.manifests() for entry in tuple(one.shards)}

    def subsets(self) -> list[str]:
        """The names of subsets so far. All processes give them the same numbers."""
        return max((manifest.subsets for manifest in self.manifests()), key=len, default=[])

    @property
    def n_contexts(self) -> int:
        """Contexts in finished shards."""
        return sum(entry.contexts for entry in self.recorded().values())

    @property
    def n_damaged(self) -> int:
        """Contexts in damaged shards."""
        return sum(entry.contexts for entry in self.damaged)

    def is_finished(self) -> bool:
        """Whether all shards are there, and those that this process checks whole."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        entries = [e for e in self.recorded().values() if e.shard % world_size == rank]
        entries = tqdm(entries, "checking shards", unit="shard", leave=False)
        self.damaged = [entry for entry in entries if not self._is_whole_or_freed(entry)]
        for entry in self.damaged:
            print(f"Shard {entry.shard} is damaged or missing in {self.folder}: making it anew.")
        return self.is_complete() and not self.damaged

    def is_complete(self) -> bool:
        """Whether every shard was recorded when a process ended."""
        return any(manifest.finished for manifest in self.manifests())

    def _is_whole_or_freed(self, entry: ShardEntry) -> bool:
        try:
            Shard(self.folder, entry).verify()
        except InputError:
            return self.rolling is not None and entry.shard in self.rolling.freed(self.folder)
        return True

    @property
    def rolling(self) -> Rolling | None:
        """How the folder is cut into windows, where it is of bounded size."""
        recorded = self.manifests()[0].rolling
        return Rolling(*recorded) if recorded else None

    def has_room(self, shard: int) -> bool:
        """Whether a shard may be begun."""
        return self.rolling is None or self.rolling.has_room(self.folder, shard)

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays that are there."""
        total = 0
        for path in self.folder.glob("*.npy"):
            with contextlib.suppress(FileNotFoundError):  # freed meanwhile
                total += path.stat().st_size
        return total

    def adopt(self, facts: dict[str, Json], **rule: Json) -> None:
        """Go on with an earlier run's manifest, or make one.

        Args:
            facts: Fields of the manifest that must be as they were.
            rule: Further ones of a new manifest.

        Raises:
            InputError: A fact differs.
        """
        facts = {**facts, "layer": self.layer}
        if self.manifest is None:
            others = self.manifests()
            self.manifest = others[0].without_shards() if others else Manifest(**facts, **rule)
        for name, value in facts.items():
            earlier = getattr(self.manifest, name)
            # Early versions recorded neither.
            is_unknown = name in ("files", "dataset_revision") and earlier is None
            require(
                is_unknown or earlier == value,
                f"The activations in {self.folder} were begun with {name} {earlier!r}, which "
                f"is {value!r} now. Delete it to start anew.",
            )
        self.manifest.dataset_revision = facts["dataset_revision"]

    def new_writer(self, shard: int, n_contexts: int, storage_dtype: str) -> ShardWriter:
        """A writer of a shard of ``n_contexts`` or fewer."""
        shape = (n_contexts, self.manifest.context_length, self.manifest.d_model)
        names = ARRAYS if self.manifest.outlier_norm is None else EARLIER_ARRAYS
        return ShardWriter(self.folder, shard, shape, storage_dtype, names)

    def add(
        self, writer: ShardWriter, entry: ShardEntry, made: dict[str, Json], **reached: Json
    ) -> None:
        """Record a finished shard: how it was ``made``, and what was ``reached`` with it."""
        entry = dataclasses.replace(entry, **made)
        # Other threads see it when it is on the disk, not before.
        content = {"shards": [*self.manifest.shards], "excluded": {**self.manifest.excluded}}
        manifest = dataclasses.replace(self.manifest, **content, **reached)
        manifest.add(entry, writer.sum, writer.sum_squared_norm, writer.excluded)
        manifest.write(self.path)
        self.manifest = manifest

    def finish(self, **reached: Json) -> None:
        """Record that all shards are there, unless a process did: manifests change no more."""
        if self.is_complete():
            return
        self.manifest = dataclasses.replace(self.manifest, finished=True, **reached)
        self.manifest.write(self.path)


def _read_newest(path: Path) -> Manifest:
    with path.open("rb") as file:  # on a network's disk, what is open is up to date
        return _read_manifest(path, os.fstat(file.fileno()).st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read_manifest(path: Path, _modified_ns: int) -> Manifest:
    return Manifest.read(path)
