"""The manifest of a folder of activations: their model and corpus, and the finished shards.

Each of several processes writes a manifest, ``manifest-RANK.json``.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
from tqdm import tqdm

from utils.artifacts import read_json, write_json
from utils.settings import InputError

# Not written if None, as folders of some versions do not have them.
LATER = (
    "files", "position", "start", "contexts_per_batch", "bos", "outlier_factor", "outlier_norm",
    "subset_a_folder", "dataset_revision", "rolling", "block",
)  # fmt: skip
MOST_SUBSETS = 1_000
FURTHER = "further subsets"


@dataclasses.dataclass
class ShardEntry:
    """A finished shard.

    Attributes:
        shard: Its number.
        contexts: The number of contexts in it.
        kept: The number of positions that the manifest's sums are over.
        crc32: The checksum of each array's file.
        start: The `corpus.Position` at which it begins.
        contexts_per_batch: Contexts that were in a forward pass, which decides the last bits.
    """

    shard: int
    contexts: int
    kept: int
    crc32: dict[str, int]
    start: list[int] | None = None
    contexts_per_batch: int | None = None


@dataclasses.dataclass
class Manifest:
    """The source of one process's activations, and the shards it has finished.

    Attributes:
        files: Bytes of each local file of the corpus, by its path in the corpus' folder.
        skipped: Number of records of the corpus that could not be used, by reason.
        bos: The token that begins contexts and documents.
        outlier_factor: Positions of a raw norm above so many medians are not kept.
        outlier_norm: That norm, where an earlier version set it while writing; else the store does.
        excluded: Number of positions that are not summed, by reason: BOS; at a set norm, outliers.
        sum, sum_squared_norm: Over all others, of raw activations (d_model,) and of ‖x‖².
        subsets: Names of the subsets; the shards hold indices into them.
        subset_a_folder: Whether a folder's files share a subset, where records name none; in
            earlier versions each file was one.
        dataset_revision: The commit of a hub dataset; earlier versions recorded none.
        position: The `corpus.Position` after the last shard.
        rolling: The `rolling.Rolling` of a folder of bounded size.
        block: What transformers calls the block, if that has a name; see `LanguageModel`.
    """

    model_name: str
    revision: str | None
    layer: int
    dtype: str
    d_model: int
    context_length: int
    dataset: str
    files: dict[str, int] | None = None
    world_size: int = 1
    finished: bool = False
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    bos: int | None = None
    outlier_factor: float | None = None
    outlier_norm: float | None = None
    excluded: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"bos": 0, "outlier_norm": 0}
    )
    sum: list[float] | float = 0.0
    sum_squared_norm: float = 0.0
    subsets: list[str] = dataclasses.field(default_factory=list)
    shards: list[ShardEntry] = dataclasses.field(default_factory=list)
    position: list[int] | None = None
    subset_a_folder: bool | None = None
    dataset_revision: str | None = None
    rolling: list[int] | None = None
    block: str | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest file; raises `InputError` if it is damaged."""
        content = read_json(path)
        try:
            entries = [ShardEntry(**entry) for entry in content["shards"]]
            return cls(**{**content, "shards": entries})
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{path} is damaged ({error}). Delete {path.parent} and make it anew."
            ) from error

    def write(self, path: Path) -> None:
        """Write the manifest, atomically."""

        def drop_none(pairs):
            return {name: v for name, v in pairs if v is not None or name not in LATER}

        write_json(path, dataclasses.asdict(self, dict_factory=drop_none))

    def without_shards(self) -> Self:
        """A manifest of the same source, of another process that has finished none."""
        fresh = {field.name: field for field in dataclasses.fields(self)}
        names = ("finished", "excluded", "sum", "sum_squared_norm", "shards", "position")
        empty = type(self)(**{name: getattr(self, name) for name in fresh if name not in names})
        return dataclasses.replace(empty, subsets=list(self.subsets))

    def add(
        self, entry: ShardEntry, total: np.ndarray, squares: float, excluded: Mapping[str, int]
    ) -> None:
        """Add a finished shard, with its sums."""
        self.shards.append(entry)
        self.sum = (np.asarray(self.sum) + total).tolist()
        self.sum_squared_norm += squares
        for reason, count in excluded.items():
            self.excluded[reason] += count


def begun_revision(folders: Iterable[Path], dataset: str) -> str | None:
    """The revision of a hub dataset that one of some folders was begun with, if any was."""
    for path in itertools.chain(*(sorted(folder.glob("manifest*.json")) for folder in folders)):
        with contextlib.suppress(InputError):  # damaged: told when the folder is opened
            manifest = Manifest.read(path)
            if manifest.dataset == dataset:
                return manifest.dataset_revision
    return None


class SubsetNumbers(dict[str, int]):
    """The index of each subset of a manifest; a new one is added when it is asked for.

    Beyond `MOST_SUBSETS` all others are one: statistics of every feature are kept for each.
    """

    def __init__(self, subsets: list[str]):
        super().__init__(zip(subsets, range(len(subsets)), strict=True))

    def __missing__(self, name: str) -> int:
        if name != FURTHER and len(self) >= MOST_SUBSETS:
            if FURTHER not in self:
                tqdm.write(
                    f"The corpus has more than {MOST_SUBSETS:,} subsets; all others are one, "
                    f"“{FURTHER}”."
                )
            return self[FURTHER]
        return self.setdefault(name, len(self))
