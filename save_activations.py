"""Save the residual stream of a language model over a corpus of text.

Reads a dataset from the Hugging Face Hub or from local files, and a model. Writes
data/activations: .npy shards of activations, tokens and their sources, a manifest, settings.json.
An interrupted run continues when it is started again; a finished one checks every shard and writes
damaged ones again.

    python save_activations.py --model-name embedded --dataset embedded --n-tokens 600_000
"""

import shutil
import sys
from pathlib import Path
from typing import Literal

from utils.activations.corpus import Corpus
from utils.activations.extraction import Extraction, Ranks
from utils.activations.manifest import Manifest
from utils.activations.shards import OUTPUTS, bytes_per_token
from utils.activations.store import ActivationStore
from utils.artifacts import RunRecord, open_stage, require_disk_space
from utils.language_model import beginning_in_words, load_language_model, longest_text, read_config
from utils.settings import InputError, Settings, read_settings, require, require_positive, run
from utils.terminal import in_bytes, significant

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# --- model
MODEL_NAME = "meta-llama/Llama-3.2-3B"  # Hugging Face name, local model folder, or "embedded"
LAYER = 15  # decoder block whose output is saved, counted from 0; the middle is a good start
DTYPE: Dtype = "auto"  # of the model; auto: bfloat16 if the device computes in it

# --- text
DATASET = "monology/pile-uncopyrighted"  # Hugging Face name, text file or folder, or "embedded"
CONFIG: str | None = None  # configuration of the dataset; None: its default or only one
SPLIT = "train"  # split of the dataset
TEXT_COLUMN = "text"  # field of the dataset's records that holds the text
SEPARATOR: str | None = None  # text between documents of a .txt, as <|endoftext|>; None: it is one
N_TOKENS = 100_000_000  # tokens to save, by all processes together
CONTEXT_LENGTH = 1_024  # tokens in a context, including its first, BOS
OUTLIER_FACTOR = 3.0  # exclude positions whose norm is more than this many times the median

# --- writing
ACTIVATIONS_DIR = "data/activations"  # output folder
STORAGE_DTYPE: Literal["float16", "float32"] = "float16"  # on disk; float32 if float16 overflows
TOKENS_PER_SHARD = 65_536  # tokens in a file of activations, 400 MB at d_model 3,072
CONTEXTS_PER_BATCH: int | None = None  # contexts in a forward pass; None: by the device's memory
OVERWRITE = False  # delete an earlier run with other settings in ACTIVATIONS_DIR

# --- not settings
NOT_RECORDED = ("activations_dir", "contexts_per_batch", "overwrite")


def main() -> None:
    settings = read_settings(sys.modules[__name__])
    ranks = Ranks.from_environment()

    # 1. Check the settings, the model's configuration and the first document.
    check(settings, ranks)
    config = read_config(settings.model_name, settings.layer)
    check_context(settings, longest_text(config))
    d_model = config.get_text_config().hidden_size
    corpus = Corpus(
        settings.dataset, settings.config, settings.split, settings.text_column, settings.separator
    )
    if corpus.files and ranks.rank == 0:
        print(corpus.describe())
    for note in corpus.check():
        print(note)

    # 2. Claim the folder; a finished run has its shards checked.
    record = RunRecord.of(settings, NOT_RECORDED, world_size=ranks.world_size)
    with open_stage(
        settings.activations_dir, record, OUTPUTS, settings.overwrite, ranks.lock_name
    ) as folder:
        extraction = Extraction(folder, settings, ranks)
        if extraction.is_finished():
            print(f"Nothing to do: every shard is whole.\n{describe(folder, ranks)}")
            return

        # 3. Print the plan, and check the disk space.
        print(plan(settings, folder, d_model))
        require_disk_space(folder, extraction.bytes_to_write(d_model) * ranks.world_size)

        # 4. Run the model over the contexts, stopped at the layer, into shards.
        language_model = load_language_model(settings.model_name, settings.layer, settings.dtype)
        print(beginning_in_words(language_model.tokenizer))
        extraction.begin(language_model, corpus)
        extraction.run()

    # 5. Print the number of tokens kept and excluded.
    print(describe(folder, ranks))


def check(settings: Settings, ranks: Ranks) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    require_positive(settings, "n_tokens", "tokens_per_shard", "contexts_per_batch")
    require(
        settings.outlier_factor > 1,
        f"OUTLIER_FACTOR must be greater than 1; it is {settings.outlier_factor}.",
    )
    require(
        settings.context_length >= 2,
        f"CONTEXT_LENGTH must be at least 2, for BOS and a token; it is {settings.context_length}.",
    )
    require(
        not settings.overwrite or ranks.world_size == 1,
        "OVERWRITE must be off with several processes, which would delete each other's shards. "
        f"Delete {settings.activations_dir} yourself.",
    )


def check_context(settings: Settings, longest: int | None) -> None:
    """Refuse contexts longer than the model's, if its configuration gives a limit."""
    require(
        longest is None or settings.context_length <= longest,
        f"CONTEXT_LENGTH must be at most {longest} for {settings.model_name}; it is "
        f"{settings.context_length}.",
    )


def plan(settings: Settings, folder: Path, d_model: int) -> str:
    """What the run will save, in words."""
    size = settings.n_tokens * bytes_per_token(d_model, settings.storage_dtype)
    free = shutil.disk_usage(folder).free
    return (
        f"Saving {settings.n_tokens:,} tokens of {settings.dataset} after block {settings.layer} "
        f"of {settings.model_name} (d_model {d_model:,}): {in_bytes(size)} of "
        f"{in_bytes(free)} free."
    )


def describe(folder: Path, ranks: Ranks) -> str:
    """The content of the folder, in words."""
    finished = sum(Manifest.read(path).finished for path in folder.glob("manifest*.json"))
    if finished < ranks.world_size:
        return f"Process {ranks.rank} is done; {finished} of {ranks.world_size} are."
    try:
        store = ActivationStore(folder)
    except InputError as error:
        if ranks.world_size == 1:
            raise
        return f"Process {ranks.rank} is done; another has a shard to make anew ({error})"
    total = store.n_contexts * store.context_length
    norm = significant(store.outlier_norm, 4)
    reasons = {"bos": "at BOS", "outlier_norm": f"outliers (norm above {norm})"}
    excluded = ", ".join(f"{count:,} {reasons[why]}" for why, count in store.excluded.items())
    skipped = "".join(f" Skipped {n:,} records {why}." for why, n in store.skipped.items())
    return (
        f"{folder} holds {total:,} tokens in {len(store.shards)} shards; kept {store.n_tokens:,}, "
        f"left out {excluded}.{skipped}"
    )


if __name__ == "__main__":
    run(main)
