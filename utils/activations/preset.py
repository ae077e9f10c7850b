"""Which preset of ``make demo`` suits this machine: the full one, unless its model is slow here.

Nine tenths of a slow machine's demo are the language model's, so its rate decides: on two cores
without bfloat16 the full preset takes an hour, the small one a quarter of it.

    python -m utils.activations.preset
"""

import sys
import time

import numpy as np

from utils.activations.capture import Capture, arrays_of
from utils.language_model import LanguageModel, load_language_model

LAYER = 15  # as in the demo
CONTEXTS, CONTEXT_LENGTH = 16, 128  # a batch of the demo
LEAST_RATE = 1_500  # tokens/s with which the full preset takes a quarter of an hour


def main() -> None:
    rate = tokens_per_second(load_language_model("embedded", LAYER))
    preset, other = ("full", "small") if rate >= LEAST_RATE else ("small", "full")
    print(
        f"The model runs {rate:,.0f} tokens/s here; from {LEAST_RATE:,} on the full demo takes at "
        f"most a quarter of an hour, so this is the {preset} one. The other: make demo-{other}",
        file=sys.stderr,
    )
    print(preset)


def tokens_per_second(language_model: LanguageModel, n_batches: int = 4) -> float:
    """The rate of saving up to the demo's layer, by its fastest batch.

    The fastest, for whatever else runs for a moment only makes a batch slower.
    """
    capture = Capture(language_model, "float16")
    tokens = np.full((CONTEXTS, CONTEXT_LENGTH), language_model.bos)
    seconds = []
    for _ in range(1 + n_batches):  # the first is slower: memory is taken, code loaded
        start = time.perf_counter()
        arrays_of(capture.run(tokens, {LAYER: None}))
        seconds.append(time.perf_counter() - start)
    return tokens.size / min(seconds)


if __name__ == "__main__":
    main()
