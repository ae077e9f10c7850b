"""How much of the bare truncated forward pass extraction reaches, measured in one run.

Both run the embedded model, stopped at the layer, on the same contexts in the same batches and
dtype; extraction also reads text, tokenises, finds outliers, and writes shards. The two take turns,
so that the machine's own drift falls on both. With several layers, a pass that saves all of them is
compared with one that saves the deepest alone.

    python -m tests.benchmarks.extraction
    python -m tests.benchmarks.extraction --layers 8 15 22
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import save_activations
from utils.activations.contexts import pack_contexts
from utils.activations.corpus import Corpus
from utils.activations.extraction import Extraction, Ranks
from utils.language_model import LanguageModel, load_language_model, residual_at
from utils.settings import Settings, read_settings


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=49_152, help="tokens a round")
    arguments.add_argument("--layers", type=int, nargs="+", default=[15])
    options = arguments.parse_args()
    settings = dataclasses.replace(
        read_settings(save_activations, []),
        model_name="embedded",
        dataset="embedded",
        n_tokens=options.tokens,
        context_length=128,
        contexts_per_batch=16,
    )
    deepest = max(options.layers)
    language_model, corpus = load_language_model("embedded", deepest), Corpus("embedded")
    batches = token_batches(language_model, corpus, settings)
    name, other_seconds, seconds = "the bare forward pass", [], []
    if len(options.layers) > 1:
        name = f"layer {deepest} alone"
    for turn in range(options.rounds + 1):
        if len(options.layers) > 1:
            other = extraction_seconds(language_model, corpus, settings, [deepest])
        else:
            other = seconds_of(lambda: run_bare(language_model, batches, deepest))
        whole = extraction_seconds(language_model, corpus, settings, options.layers)
        if turn:  # the first turn warms up
            other_seconds.append(other)
            seconds.append(whole)
            print(f"round {turn}: {other / whole:.3f} of {name}")
    ratios = [a / b for a, b in zip(other_seconds, seconds, strict=True)]
    print(
        f"\n{name} {options.tokens / statistics.median(other_seconds):,.0f} tokens/s, saving "
        f"{options.tokens / statistics.median(seconds):,.0f} tokens/s "
        f"({str(language_model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads): "
        f"{statistics.median(ratios):.3f} (median of {len(ratios)} rounds)"
    )


def token_batches(
    language_model: LanguageModel, corpus: Corpus, settings: Settings
) -> list[torch.Tensor]:
    """The contexts that extraction will run, in its batches, shape (batch, context)."""
    contexts = pack_contexts(corpus.documents(), language_model.tokenizer, settings.context_length)
    wanted = itertools.islice(contexts, settings.n_tokens // settings.context_length)
    tokens = torch.from_numpy(np.stack([context.tokens for context in wanted]))
    return list(tokens.split(settings.contexts_per_batch))


def run_bare(language_model: LanguageModel, batches: list[torch.Tensor], layer: int) -> None:
    for tokens in batches:
        residual_at(language_model, tokens, layer).cpu()


def extraction_seconds(
    language_model: LanguageModel, corpus: Corpus, settings: Settings, layers: list[int]
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        folders = {layer: Path(folder) / str(layer) for layer in layers}
        for each in folders.values():
            each.mkdir()
        extraction = Extraction(folders, settings, Ranks())
        extraction.begin(language_model, corpus)  # two batches, once in a whole run
        return seconds_of(extraction.run)


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
