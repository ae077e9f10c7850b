"""What the tests share: a tiny LLaMA, a tiny corpus, the four scripts run on them."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)  # where a user runs the scripts
sys.path.insert(0, str(ROOT))
# Sums in one order, here and in the processes started; tests side by side on few cores.
os.environ["OMP_NUM_THREADS"] = "1"
if "TESTED_ON_CARD" not in os.environ:  # see test_card.py
    os.environ.setdefault("CARDS_OF_USER", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from utils.backend import use_backend  # noqa: E402

use_backend("torch")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny_llama import save_tiny_llama  # noqa: E402

from utils import embedded  # noqa: E402
from utils.activations.capture import sums_of  # noqa: E402
from utils.activations.manifest import Manifest  # noqa: E402
from utils.activations.shards import ARRAYS, EARLIER_ARRAYS, ShardWriter  # noqa: E402
from utils.settings import Settings, read_settings  # noqa: E402

SUBSETS = {
    "Garden": "rose tulip spade rain seed bloom soil leaf".split(),
    "Harbour": "ship anchor rope tide crane dock sail wind".split(),
}
SCRIPTS = ("save_activations", "train_autoencoder", "analyze_features", "influence_llm")
LAYER = 1
BOS = 300  # of made-up tokens


def pytest_configure(config):
    for warning in ("Sparse CSR tensor support is in beta", "__array__ implementation doesn't"):
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    return embedded.model_folder()


@pytest.fixture(scope="session")
def embedded_pile() -> Path:
    return embedded.pile_folder()


# ------------------------------------------------------------------------------ model and corpus


def make_texts(n_documents: int = 800) -> list[tuple[str, str]]:
    """(text, subset) of documents of 5 to 120 words, of words that only their subset has."""
    draw = random.Random(0)
    documents = []
    for _ in range(n_documents):
        subset = draw.choice(list(SUBSETS))
        words = draw.choices(SUBSETS[subset], k=draw.randint(5, 120))
        documents.append((" ".join(words), subset))
    return documents


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A .jsonl of some hundred short documents in the Pile's shape."""
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    records = ({"text": text, "meta": {"pile_set_name": name}} for text, name in make_texts())
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random LLaMA of four blocks with a real tokenizer, in the hub's layout."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def save_tiny_model(folder: Path, seed: int = 0, d_model: int = 32) -> Path:
    return save_tiny_llama(folder, (text for text, _ in make_texts()), seed, d_model)


def excluded_of(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Counts of positions left out: every context's first is BOS, the others outliers."""
    n_contexts = len(arrays["kept"])
    return {"bos": n_contexts, "outlier_norm": int((~arrays["kept"]).sum()) - n_contexts}


def write_activations(
    folder: Path, arrays: dict[str, np.ndarray], per_shard: int = 3, storage_dtype: str = "float16"
) -> None:
    """Write a finished folder of activations, a shard at a time, a context at a time.

    ``arrays`` has an array for each of `shards.ARRAYS`, or of `shards.EARLIER_ARRAYS`, as earlier
    versions wrote. With norms, positions above 50 medians are outliers, and BOS is token `BOS`. The
    subsets are "a" and "b".
    """
    has_norms = "norms" in arrays
    rule = {"bos": BOS, "outlier_factor": 50.0} if has_norms else {"outlier_norm": 50.0}
    names = ARRAYS if has_norms else EARLIER_ARRAYS
    n_contexts, context_length, d_model = arrays["activations"].shape
    manifest = Manifest(
        model_name="m", revision=None, layer=1, dtype="float32", d_model=d_model,
        context_length=context_length, dataset="d", subsets=["a", "b"], finished=True, **rule,
    )  # fmt: skip
    for shard, first in enumerate(range(0, n_contexts, per_shard)):
        shape = (per_shard, context_length, d_model)
        writer = ShardWriter(folder, shard, shape, storage_dtype, names)
        for context in range(first, min(first + per_shard, n_contexts)):
            one = {name: arrays[name][context : context + 1] for name in names}
            is_bos = one["tokens"] == BOS
            counted = ~is_bos if has_norms else one["kept"]
            stored = one["activations"].astype(storage_dtype)
            sums = sums_of(*map(torch.from_numpy, (stored, is_bos, counted)))
            writer.append(sums.numpy(), **one)
        entry = writer.finish()
        manifest.add(entry, writer.sum, writer.sum_squared_norm, writer.excluded)
    manifest.write(folder / "manifest.json")


def settings_of(script: str, **values: object) -> Settings:
    """A script's settings as they are by default, but for some."""
    return dataclasses.replace(read_settings(importlib.import_module(script), []), **values)


# ------------------------------------------------------------------------------ running scripts


def command(name: str, *flags: object) -> list[str]:
    return [sys.executable, f"{name}.py", *map(str, flags)]


def environment(**changes: str) -> dict[str, str]:
    """A user's: this process's, without PYTHONPATH and the backend that these tests set."""
    hidden = ("PYTHONPATH", "KERAS_BACKEND")
    own = {name: value for name, value in os.environ.items() if name not in hidden}
    return own | changes


def start(
    name: str, *flags: object, kill_after: float | None = None, kill_at: Path | None = None
) -> tuple[float | None, str]:
    """Run a user's command; it may be killed.

    Args:
        kill_after: Kill it so many seconds after it first prints something.
        kill_at: Kill it as soon as this file is there and it has printed something.

    Returns:
        Seconds from there to its end, None if it was killed before; and all that it printed.
    """
    process = subprocess.Popen(
        command(name, *flags), cwd=ROOT, env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process:
        printed = process.stdout.read(1)
        begun = time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
        while kill_at is not None and not kill_at.exists() and process.poll() is None:
            time.sleep(0.01)
        if (kill_after, kill_at) != (None, None):
            process.kill()
        printed += process.stdout.read()
    seconds = time.perf_counter() - begun
    was_killed = (kill_after, kill_at) != (None, None) and process.returncode == -signal.SIGKILL
    assert was_killed or process.returncode == 0, printed.decode()
    return None if was_killed else seconds, printed.decode()


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """Run a user's command: ``run_script("save_activations", "--layer", 1)``."""

    def run(name: str, *flags: object, check: bool = True, **changes: str):
        done = subprocess.run(
            command(name, *flags), cwd=ROOT, env=environment(**changes), capture_output=True,
            text=True,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def run_here() -> Callable[..., SimpleNamespace]:
    """The same within this process, which spares the seconds of importing torch.

    Whatever is not the clean end that a script promises goes up as the exception it is.
    """

    def run(name: str, *flags: object, check: bool = True):
        printed, words = io.StringIO(), sys.argv
        sys.argv = [f"{name}.py", *map(str, flags)]
        code = 0
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = words
        message = code if isinstance(code, str) else ""
        status = 1 if message else code or 0
        assert not check or status == 0, message or printed.getvalue()
        return SimpleNamespace(returncode=status, message=message, stdout=printed.getvalue())

    return run


QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Flags:
    """The flags of the four scripts for one tiny run, writing below ``folder``."""

    def __init__(self, folder: Path, model: Path, text: Path):
        activations, autoencoder = folder / "activations", folder / "autoencoder"
        self.save_activations = [
            "--model-name", model, "--layer", LAYER, "--dtype", "float32", "--dataset", text,
            "--n-tokens", 49_152, "--context-length", 32, "--contexts-per-batch", 4,
            "--tokens-per-shard", 1_024, "--activations-dir", activations,
        ]  # fmt: skip
        self.train_autoencoder = [
            "--n-latents", 128, "--k", 4, "--batch-size", 64, "--n-passes", 0.6, "--log-every", 20,
            "--backup-every", 2, "--dead-after", 2_000, "--learning-rate", 1e-3,
            "--backend", "torch", "--activations-dir", activations,
            "--autoencoder-dir", autoencoder,
        ]  # fmt: skip
        self.analyze_features = [
            "--n-loss-tokens", 512, "--n-reported", 5, "--batch-size", 1_024,
            "--n-neuron-tokens", 8_192, "--no-map-features",
            "--activations-dir", activations, "--autoencoder-dir", autoencoder,
            "--analysis-dir", folder / "analysis",
        ]  # fmt: skip
        self.influence_folders = [
            "--autoencoder-dir", autoencoder, "--analysis-dir", folder / "analysis",
            "--influence-dir", folder / "influence",
        ]  # fmt: skip
        self.influence_llm = [
            "--prompt", "rose tulip ship", "--max-new-tokens", 100,
            "--strength", 0, 2, 4, 6, 8, 10, *self.influence_folders,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_model, tiny_text) -> SimpleNamespace:
    """The whole pipeline, run once by the user's commands. To be read, not written to.

    ``folder`` holds the scripts' folders and ``flags`` what they were run with; by script,
    ``printed`` is what it printed and ``seconds`` how long it ran from its first output on.
    """
    folder = tmp_path_factory.mktemp("run")
    run = SimpleNamespace(folder=folder, flags=Flags(folder, tiny_model, tiny_text))
    ended = {name: start(name, *getattr(run.flags, name)) for name in SCRIPTS}
    run.seconds = {name: seconds for name, (seconds, _) in ended.items()}
    run.printed = {name: printed for name, (_, printed) in ended.items()}
    return run
