"""How much of the bare truncated forward pass extraction reaches, measured in one run.

Both run the embedded model, stopped at the layer, on the same contexts in the same batches and
dtype; extraction also reads text, tokenises, finds outliers, and writes shards. The two take turns,
so that the machine's own drift falls on both.

    python -m tests.benchmarks.extraction
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from utils.activations.contexts import pack_contexts
from utils.activations.corpus import Corpus
from utils.activations.extraction import Extraction, Ranks
from utils.language_model import LanguageModel, load_language_model, residual_at


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=49_152, help="tokens a round")
    options = arguments.parse_args()
    settings = SimpleNamespace(
        model_name="embedded",
        dataset="embedded",
        layer=15,
        n_tokens=options.tokens,
        context_length=128,
        contexts_per_batch=16,
        tokens_per_shard=65_536,
        storage_dtype="float16",
        outlier_factor=3.0,
    )
    language_model = load_language_model("embedded", settings.layer)
    corpus = Corpus("embedded")
    batches = token_batches(language_model, corpus, settings)
    bare_seconds, extraction_seconds = [], []
    for turn in range(options.rounds + 1):
        bare = seconds_of(lambda: run_bare(language_model, batches, settings.layer))
        whole = extraction_seconds_of(language_model, corpus, settings)
        if turn:  # the first turn warms up
            bare_seconds.append(bare)
            extraction_seconds.append(whole)
            print(f"round {turn}: {bare / whole:.3f} of the bare forward pass")
    ratios = [a / b for a, b in zip(bare_seconds, extraction_seconds, strict=True)]
    print(
        f"\nbare forward pass {options.tokens / statistics.median(bare_seconds):,.0f} tokens/s, "
        f"extraction {options.tokens / statistics.median(extraction_seconds):,.0f} tokens/s "
        f"({str(language_model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads): "
        f"{statistics.median(ratios):.3f} (median of {len(ratios)} rounds)"
    )


def token_batches(
    language_model: LanguageModel, corpus: Corpus, settings: SimpleNamespace
) -> list[torch.Tensor]:
    """The contexts that extraction will run, in its batches, shape (batch, context)."""
    contexts = pack_contexts(corpus.documents(), language_model.tokenizer, settings.context_length)
    wanted = itertools.islice(contexts, settings.n_tokens // settings.context_length)
    tokens = torch.from_numpy(np.stack([context.tokens for context in wanted]))
    return list(tokens.split(settings.contexts_per_batch))


def run_bare(language_model: LanguageModel, batches: list[torch.Tensor], layer: int) -> None:
    for tokens in batches:
        residual_at(language_model, tokens, layer).cpu()


def extraction_seconds_of(
    language_model: LanguageModel, corpus: Corpus, settings: SimpleNamespace
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        extraction = Extraction(Path(folder), settings, Ranks())
        extraction.begin(language_model, corpus)  # two batches, once in a whole run
        return seconds_of(extraction.run)


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
