"""Save the residual stream of a language model over a corpus of text.

Reads a dataset from the Hugging Face Hub or from local files, and a model. Writes
data/activations: .npy shards of activations, tokens and their sources, a manifest, settings.json;
of several layers, a folder for each below it. An interrupted run continues when it is started
again; a finished one checks every shard and writes damaged ones again.

    python save_activations.py --model-name embedded --dataset embedded --n-tokens 600_000
"""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from utils.activations.chats import Chats
from utils.activations.checks import FolderChecks
from utils.activations.corpus import Corpus
from utils.activations.extraction import Extraction, Ranks
from utils.activations.hub import retries_in_words
from utils.activations.manifest import Manifest, begun_revision
from utils.activations.rolling import Rolling
from utils.activations.shards import OUTPUTS, bytes_per_token
from utils.activations.store import ActivationStore
from utils.artifacts import SETTINGS_FILE, RunRecord, open_stage, read_json, require_disk_space
from utils.backend import use_backend
from utils.language_model import beginning_in_words, load_language_model, longest_text, read_config
from utils.settings import (
    InputError,
    Settings,
    as_recorded,
    read_settings,
    require,
    require_positive,
    run,
)
from utils.terminal import in_bytes, significant

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# --- model
MODEL_NAME = "meta-llama/Llama-3.2-3B"  # Hugging Face name, local model folder, or "embedded"
LAYER: int | tuple[int, ...] = 15  # block whose output is saved, from 0; several: a folder each
DTYPE: Dtype = "auto"  # of the model; auto: bfloat16 if the device computes in it
FOR_AUTOENCODER: str | None = None  # folder or hub name: model, layer, context length as it says
HOOKPOINT: str | None = None  # which of its autoencoders, as layers.15; None: its only one

# --- text
DATASET = "monology/pile-uncopyrighted"  # Hugging Face name, text file or folder, or "embedded"
CONFIG: str | None = None  # configuration of the dataset; None: its default or only one
SPLIT = "train"  # split of the dataset
TEXT_COLUMN = "text"  # field of the dataset's records that holds the text
SUBSETS: tuple[str, ...] = ()  # of meta.pile_set_name, as ArXiv or Github=0.5 (half); (): all
SEPARATOR: str | None = None  # text between documents of a .txt, as <|endoftext|>; None: it is one
N_TOKENS = 100_000_000  # tokens to save, by all processes together
CONTEXT_LENGTH = 1_024  # tokens in a context, including its first, BOS
OUTLIER_FACTOR = 3.0  # exclude positions whose norm is more than this many times the median

# --- writing
ACTIVATIONS_DIR = "data/activations"  # output folder
STORAGE_DTYPE: Literal["float16", "float32", "int8"] = (
    "float16"  # on disk; float32 if float16 overflows; int8 for half the disk
)
TOKENS_PER_SHARD = 65_536  # tokens in a file of activations, 400 MB at d_model 3,072
CONTEXTS_PER_BATCH: int | None = None  # contexts in a forward pass; None: by the device's memory
MAX_DISK_GB: float | None = None  # bound of ACTIVATIONS_DIR, for train_autoencoder.py --follow
KEEP_GB = 20.0  # of these, shards that are never freed, to hold out and to analyse
MAX_HOURS: float | None = None  # stop in time, with status 75; the same command goes on
OVERWRITE = False  # delete an earlier run with other settings in ACTIVATIONS_DIR

# --- instead of saving: check the finished folder, or folders, of ACTIVATIONS_DIR
CHECK = False  # files, counts, norms, tokens; a sample against the text, and computed again

# --- not settings
NOT_RECORDED = (
    "activations_dir", "contexts_per_batch", "max_hours", "overwrite", "check", "for_autoencoder",
    "hookpoint",
)  # fmt: skip


def main() -> None:
    settings = read_settings(sys.modules[__name__])
    ranks = Ranks.from_environment()

    if settings.check:
        check_folders(settings)
        return

    # 1. Check the settings, the model's configuration and the first document.
    settings = matching_autoencoder(settings)
    check(settings, ranks)
    folders = layer_folders(settings)
    ranks = ranks.going_on_with(next(iter(folders.values())))
    configs = [read_config(settings.model_name, layer) for layer in folders]
    check_context(settings, longest_text(configs[0]))
    d_model = configs[0].get_text_config().hidden_size
    corpus = read_corpus(settings, folders)
    if ranks.rank == 0:
        print(corpus.describe())

    # 2. Claim the folder of each layer; a finished run has its shards checked.
    with claimed(folders, settings, ranks):
        extraction = Extraction(folders, settings, ranks)
        if extraction.is_finished():
            print("Nothing to do: every shard is whole.")
        else:
            # 3. Print the plan, and check the disk space.
            print(plan(settings, folders, d_model, extraction.plan_windows(d_model)))
            needed = extraction.bytes_to_write(d_model) * ranks.n_streams
            require_disk_space(Path(settings.activations_dir), needed)

            # 4. Run the model over the contexts, stopped at the deepest layer, into shards.
            deepest = max(folders)
            language_model = load_language_model(settings.model_name, deepest, settings.dtype)
            print(beginning_in_words(language_model.tokenizer))
            extraction.begin(language_model, corpus)
            extraction.run()

    # 5. Print the number of tokens kept and excluded.
    for folder in folders.values():
        print(describe(folder, ranks))
    print(retries_in_words(), end="")


def layer_folders(settings: Settings) -> dict[int, Path]:
    """The folder of each layer: ACTIVATIONS_DIR, or one below it for each of several."""
    folder = Path(settings.activations_dir)
    if isinstance(settings.layer, int):
        return {settings.layer: folder}
    return {layer: folder / f"layer-{layer}" for layer in settings.layer}


@contextlib.contextmanager
def claimed(folders: dict[int, Path], settings: Settings, ranks: Ranks) -> Iterator[None]:
    """While open, each layer's folder belongs to this process's run of that layer."""
    for folder in folders.values():  # all at once, for a training that follows them
        with contextlib.suppress(OSError):  # told below
            folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stages:
        for layer, folder in folders.items():
            alone = dataclasses.replace(settings, layer=layer)
            record = RunRecord.of(alone, NOT_RECORDED, world_size=ranks.n_streams)
            stages.enter_context(
                open_stage(folder, record, OUTPUTS, settings.overwrite, ranks.lock_name)
            )
        yield


def read_corpus(settings: Settings, folders: dict[int, Path]) -> Corpus:
    """The text, checked before long work; a hub dataset's as a run in the folders began with it."""
    corpus = Corpus(
        settings.dataset, settings.config, settings.split, settings.text_column, settings.separator,
        settings.subsets,
    )  # fmt: skip
    corpus.chats = Chats(settings.model_name)
    for note in corpus.check(begun_revision(folders.values(), settings.dataset)):
        print(note)
    return corpus


def matching_autoencoder(settings: Settings) -> Settings:
    """The settings, with what the autoencoder says that the activations are for, if there is one.

    Raises:
        InputError: It cannot be read, or a setting was given that contradicts it.
    """
    if settings.for_autoencoder is None:
        require(
            settings.hookpoint is None,
            f"HOOKPOINT is for FOR_AUTOENCODER, which is not given; it is {settings.hookpoint}.",
        )
        return settings
    use_backend("torch")
    from utils.autoencoder.formats.matching import for_autoencoder

    return for_autoencoder(settings)


def check_folders(settings: Settings) -> None:
    """Check what ACTIVATIONS_DIR holds, by the settings recorded there, and print it."""
    folder = Path(settings.activations_dir)
    layers = sorted(path.parent for path in folder.glob(f"layer-*/{SETTINGS_FILE}"))
    for each in [folder] if (folder / SETTINGS_FILE).exists() or not layers else layers:
        ActivationStore(each)  # says what is missing before anything is read
        recorded = as_recorded(settings, read_json(each / SETTINGS_FILE))
        corpus = None
        try:
            corpus = read_corpus(recorded, {recorded.layer: each})
        except InputError as error:
            print(f"The text is not there: {error}")
        for words in FolderChecks(each, corpus).run():
            print(words)


def check(settings: Settings, ranks: Ranks) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    layers = settings.layer
    require(
        isinstance(layers, int) or 0 < len(layers) == len(set(layers)),
        f"LAYER must be one block or several different ones; it is {layers}.",
    )
    require_positive(
        settings, "n_tokens", "tokens_per_shard", "contexts_per_batch", "max_disk_gb", "keep_gb",
        "max_hours",
    )  # fmt: skip
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


def plan(
    settings: Settings, folders: dict[int, Path], d_model: int, rolling: Rolling | None
) -> str:
    """What the run will save, in words."""
    size = settings.n_tokens * bytes_per_token(d_model, settings.storage_dtype) * len(folders)
    free = shutil.disk_usage(settings.activations_dir).free
    bound = ""
    if rolling:
        bound = (
            f"\nNever more than {settings.max_disk_gb:g} GB of them at once: {rolling.n_windows:,} "
            f"windows, which train_autoencoder.py --follow frees; {rolling.n_kept:,} of "
            f"{rolling.n_shards:,} shards stay."
        )
    blocks = f"block{'s' if len(folders) > 1 else ''} {', '.join(map(str, folders))}"
    return (
        f"Saving {settings.n_tokens:,} tokens of {settings.dataset} after {blocks} of "
        f"{settings.model_name} (d_model {d_model:,}): {in_bytes(size)} of {in_bytes(free)} free."
        f"{bound}"
    )


def describe(folder: Path, ranks: Ranks) -> str:
    """The content of the folder, in words."""
    manifests = [Manifest.read(path) for path in folder.glob("manifest*.json")]
    finished = sum(manifest.finished for manifest in manifests)
    if finished < ranks.n_streams:
        return f"Process {ranks.rank} is done; {finished} of {ranks.n_streams} are."
    if rolling := manifests[0].rolling:
        n_shards, (*_, n_kept) = sum(len(manifest.shards) for manifest in manifests), rolling
        return (
            f"{folder}: all {n_shards:,} shards were written; {n_kept:,} stay, and "
            "train_autoencoder.py --follow frees the others."
        )
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
