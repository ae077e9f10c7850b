"""The best entries of each group, kept while streaming; for the examples of every feature."""

import numpy as np
import torch

from utils.features.pass_backup import inside, of_part


def indices_where(mask: torch.Tensor) -> torch.Tensor:
    """The indices at which a mask of one dimension is true; on a CPU NumPy finds them sooner."""
    if mask.device.type != "cpu":
        return torch.nonzero(mask)[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


class BestPerGroup:
    """Of a stream of entries, the ``size`` of highest priority in each group.

    Entries are dictionaries of arrays of equal length, among them ``group``, from 0 to 2^32 − 1,
    and ``priority``, float32 and not negative. If they have a ``text``, only the best of a group's
    entries with the same one is kept.

    Attributes:
        threshold: What an entry's priority must be above, by group, on ``device``.
    """

    def __init__(self, n_groups: int, size: int, device: torch.device | str = "cpu"):
        self.size = size
        self.threshold = torch.full((n_groups,), -torch.inf, device=device)
        self._columns: dict[str, np.ndarray] = {}
        self._free = np.zeros(0, np.int64)  # rows of the columns that hold no entry
        self._keys = np.zeros(0, np.uint64)  # of the best entries, rising
        self._rows = np.zeros(0, np.int64)  # where these are
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []  # keys and rows not yet compared

    def wants(self, group: torch.Tensor, priority: torch.Tensor) -> torch.Tensor:
        """Indices of the entries that could still be among the best."""
        return indices_where(priority > self.threshold.index_select(0, group))

    def add(self, entries: dict[str, np.ndarray]) -> None:
        # One number that is smaller the better: bits of floats not negative are in their order.
        bits = entries["priority"].astype(np.float32).view(np.uint32)
        key = entries["group"].astype(np.uint64) << np.uint64(32) | ~bits
        if len(self._free) < len(key) or not self._columns:
            self._grow(len(key), entries)
        rows, self._free = np.split(self._free, [len(key)])
        for name, column in self._columns.items():
            column[rows] = entries[name]
        self._pending.append((key, rows))
        if sum(len(key) for key, _ in self._pending) > max(100_000, len(self._keys) // 3):
            self._compare()

    def _grow(self, n: int, like: dict[str, np.ndarray]) -> None:
        """Add at least ``n`` free rows to the columns."""
        size = len(next(iter(self._columns.values()), ()))
        n = max(n, size // 2)
        for name in like.keys() - {"priority"}:
            longer = np.empty((size + n, *like[name].shape[1:]), like[name].dtype)
            longer[:size] = self._columns.get(name, longer[:size])
            self._columns[name] = longer
        self._free = np.concatenate([self._free, np.arange(size, size + n)])

    def _compare(self) -> None:
        """Compare the pending entries with the best so far, and free the rows of the others."""
        keys, rows = map(np.concatenate, zip((self._keys, self._rows), *self._pending, strict=True))
        self._pending = []
        order = np.argsort(keys, kind="stable")  # quick, for most are in order
        keys, rows = keys[order], rows[order]
        group, chosen = keys >> np.uint64(32), np.arange(len(keys))
        if "text" in self._columns:
            chosen = _first_of_each(group, self._columns["text"][rows])
            group = group[chosen]
        beaten = np.flatnonzero(group[self.size :] == group[: -self.size]) + self.size
        chosen = np.delete(chosen, beaten)
        self._free = np.concatenate([self._free, np.delete(rows, chosen)])
        self._keys, self._rows = keys[chosen], rows[chosen]
        self._raise_thresholds()

    def _raise_thresholds(self) -> None:
        """To the last entry of each group that is full."""
        group = (self._keys >> np.uint64(32)).astype(np.int64)
        before = self.size - 1
        last = np.flatnonzero(group[before:] == group[: max(0, len(group) - before)]) + before
        bits = ~self._keys[last].astype(np.uint32)
        device = self.threshold.device
        priority = torch.from_numpy(bits.view(np.float32)).to(device)
        self.threshold[torch.from_numpy(group[last]).to(device)] = priority

    def _settle(self) -> None:
        """Leave nothing in the columns but the best entries, in their order."""
        self._compare()
        for name in self._columns:  # one at a time, for the largest are most of the memory
            self._columns[name] = self._columns[name][self._rows]
        self._rows, self._free = np.arange(len(self._keys)), np.zeros(0, np.int64)

    def state(self) -> dict[str, np.ndarray]:
        """All that it holds, see `utils.features.pass_backup`."""
        self._settle()
        return {"keys": self._keys, **inside("column", self._columns)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self._keys, self._columns = state["keys"], of_part("column", state)
        self._rows = np.arange(len(self._keys))
        self._raise_thresholds()

    def best(self) -> dict[str, np.ndarray]:
        """The best entries so far, by group and falling priority, with their ``rank``."""
        self._settle()
        group = self._keys >> np.uint64(32)
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        bits = ~self._keys.astype(np.uint32)
        return {**self._columns, "priority": bits.view(np.float32), "rank": rank}


def _first_of_each(group: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The indices, rising, at which pairs of a group and a hash occur for the first time."""
    pair = text ^ (group + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    ordered = np.sort(pair)
    again = ordered[1:][ordered[1:] == ordered[:-1]]  # few are
    twice = np.flatnonzero(np.isin(pair, again)) if len(again) else np.zeros(0, int)
    later = np.delete(twice, np.unique(pair[twice], return_index=True)[1])
    return np.delete(np.arange(len(pair)), later)
