"""Subsets of the corpus that are chosen, each whole or a share of its documents."""

import difflib
import zlib
from collections.abc import Collection

from utils.settings import InputError, require

N_LOOKED = 10_000  # first documents, among which chosen subsets are looked for


class Subsets:
    """Which documents of a corpus are read.

    Attributes:
        shares: By the name of a subset, the share of its documents; empty if all are read.

    Args:
        chosen: ``"NAME"`` or ``"NAME=SHARE"`` each.

    Raises:
        InputError: A share is not above 0 and at most 1.
    """

    def __init__(self, chosen: tuple[str, ...] = ()):
        self.shares = dict(map(_name_and_share, chosen))

    def has(self, document: int, subset: str) -> bool:
        """Whether a document is read, by its number, which decides where it is a share."""
        if not self.shares:
            return True
        draw = zlib.crc32(document.to_bytes(8, "little")) / 2**32
        return draw < self.shares.get(subset, 0.0)

    def notes(self, seen: Collection[str], are_all: bool) -> list[str]:
        """A sentence on chosen names that are not among those seen, which are all there are or not.

        Raises:
            InputError: A name is like one that was seen, or all were seen.
        """
        missing = [name for name in self.shares if name not in seen]
        listed = ", ".join(sorted(seen))
        for name in missing:
            nearest = difflib.get_close_matches(name, seen, 1)
            meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
            if nearest or are_all:
                raise InputError(
                    f"SUBSETS must be names of subsets; {name!r} is not among those of "
                    f"{'all' if are_all else f'the first {N_LOOKED:,}'} documents: {listed}.{meant}"
                )
        return missing and [
            f"The first {N_LOOKED:,} documents are of {listed}. Whether there are any of "
            f"{', '.join(missing)} is not known."
        ]


def _name_and_share(chosen: str) -> tuple[str, float]:
    name, _, share = chosen.rpartition("=")
    try:
        value = float(share)
    except ValueError:  # no share, or a name with "=" in it
        return chosen, 1.0
    if not name:
        return chosen, 1.0
    require(
        0 < value <= 1,
        f"SUBSETS must give shares above 0 and at most 1, as in 'Github=0.5'; {chosen!r} does not.",
    )
    return name, value
