"""The host's part of the data path alone: no model, no GPU, any machine.

Everything lies on a memory file system and has the width of LLaMA 3.2-3B's residual stream. Each
part takes turns with one thread that does the least that could be done, so that the machine's own
drift falls on both; the medians are printed as one JSON object.

    writer_share            the shard writer, fed with ready arrays (statistics apart), as a share
                            of one thread that writes the same bytes and computes their checksum
    loader_share            the loader, as a share of one thread that reads the bytes by `readinto`
    analysis_us_per_token   the analysis' pass without encoding: 65,536 latents, 64 of them active
                            on a token, after the first 262,144 tokens

    python -m tests.benchmarks.data_path
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.analysis import bookkeeping

D_MODEL = 3072


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a memory disk")
    options = arguments.parse_args()
    rounds = {"writer_share": [], "loader_share": [], "analysis_us_per_token": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.memory) as folder:
            rounds["writer_share"].append(writer_share(Path(folder)))
        with tempfile.TemporaryDirectory(dir=options.memory) as folder:
            rounds["loader_share"].append(loader_share(Path(folder)))
        rounds["analysis_us_per_token"].append(analysis_us_per_token())
    print(json.dumps({name: statistics.median(values) for name, values in rounds.items()}))


def writer_share(folder: Path) -> float:
    """Seconds of the plain thread over seconds of the shard writer, for the same bytes."""
    raise NotImplementedError


def loader_share(folder: Path) -> float:
    """Seconds of the plain thread over seconds of the loader, for the same bytes."""
    raise NotImplementedError


def analysis_us_per_token() -> float:
    """Microseconds a token of the analysis' pass, without encoding."""
    return bookkeeping().us_per_token()


if __name__ == "__main__":
    main()
