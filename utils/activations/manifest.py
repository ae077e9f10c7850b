"""The manifest of a folder of activations: their model and corpus, and the finished shards.

Each of several processes writes a manifest, ``manifest-RANK.json``.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from utils.artifacts import read_json, write_json
from utils.settings import InputError

LATER = ("files", "position", "start")  # not written if None, as early versions did not have them


@dataclasses.dataclass
class ShardEntry:
    """A finished shard.

    Attributes:
        shard: Its number.
        contexts, kept: The number of contexts and of kept positions in it.
        crc32: The checksum of each array's file.
        start: The `corpus.Position` at which it begins.
    """

    shard: int
    contexts: int
    kept: int
    crc32: dict[str, int]
    start: list[int] | None = None


@dataclasses.dataclass
class Manifest:
    """The source of one process's activations, and the shards it has finished.

    Attributes:
        files: Bytes of each local file of the corpus, by its path in the corpus' folder.
        skipped: Number of records of the corpus that could not be used, by reason.
        outlier_norm: Positions of a larger raw norm are not kept.
        excluded: Number of positions that are not kept, by reason.
        sum, sum_squared_norm: Over kept positions, of raw activations (d_model,) and of ‖x‖².
        subsets: Names of the subsets; the shards hold indices into them.
        position: The `corpus.Position` after the last shard.
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
    outlier_norm: float | None = None
    excluded: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"bos": 0, "outlier_norm": 0}
    )
    sum: list[float] | float = 0.0
    sum_squared_norm: float = 0.0
    subsets: list[str] = dataclasses.field(default_factory=list)
    shards: list[ShardEntry] = dataclasses.field(default_factory=list)
    position: list[int] | None = None

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

    def add(
        self, entry: ShardEntry, total: np.ndarray, squares: float, excluded: Mapping[str, int]
    ) -> None:
        """Add a finished shard, with its sums over kept positions."""
        self.shards.append(entry)
        self.sum = (np.asarray(self.sum) + total).tolist()
        self.sum_squared_norm += squares
        for reason, count in excluded.items():
            self.excluded[reason] += count
