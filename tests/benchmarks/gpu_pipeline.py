"""The scripts on one accelerator, one after another: the cases of `tests.benchmarks.gpu` that need
a model and what the earlier ones wrote. All are in one folder.

The model has the shape of LLaMA 3.2-3B but for blocks after the layer, and random weights; what is
timed does not depend on their values. The text is the project's own, again and again.
"""

import contextlib
import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils.artifacts import read_json

ROOT = Path(__file__).parents[2]
SHAPE = {
    "vocab_size": 128_256, "intermediate_size": 8_192, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SMALL_SHAPE = {
    "vocab_size": 512, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LAYER = {True: 1, False: 15}  # small or not
CONTEXTS_A_BATCH = 16
N_GENERATED, N_PAIRS = 64, 5  # tokens of a text; texts, untouched and steered


def extraction(options) -> dict:
    """Tokens/s of save_activations.py, from the first shard to the last, beside the bare pass."""
    folder, sizes = Path(options.work), options.sizes
    context, layer = sizes["context_length"], LAYER[options.small]
    bare = make_model(folder / "model", sizes, options.small, layer)
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("utils/**/*.py")))
    length = 8 * sizes["tokens"]  # characters: more than are needed
    (folder / "text.txt").write_text((text * (1 + length // len(text)))[:length])
    run_script(
        "save_activations.py", "--model-name", folder / "model", "--dataset", folder / "text.txt",
        "--layer", layer, "--n-tokens", sizes["tokens"], "--context-length", context,
        "--tokens-per-shard", sizes["tokens"] // 8, "--outlier-factor", 1_000,
        "--activations-dir", folder / "activations",
    )  # fmt: skip
    manifest = read_json(folder / "activations" / "manifest.json")
    written = sorted(
        path.stat().st_mtime for path in (folder / "activations").glob("*activations*")
    )
    written = written or sorted(path.stat().st_mtime for path in (folder / "activations").iterdir())
    shards = len(manifest["shards"])
    seconds = written[-1] - written[0]
    rate = sizes["tokens"] * (shards - 1) / shards / max(seconds, 1e-9)
    return {"tokens_per_second": rate, "bare_tokens_per_second": bare, "share_of_bare": rate / bare}


def make_model(folder: Path, sizes: dict, small: bool, layer: int) -> float:
    """Save the model with a byte-pair tokenizer; tokens/s of a bare pass of it to the layer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")
    config = LlamaConfig(
        hidden_size=sizes["d_model"], num_hidden_layers=layer + 1, tie_word_embeddings=True,
        max_position_embeddings=max(2_048, sizes["context_length"]), dtype="bfloat16",
        bos_token_id=0, eos_token_id=1, **(SMALL_SHAPE if small else SHAPE),
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shape = (CONTEXTS_A_BATCH, sizes["context_length"])
    tokens = torch.randint(512, shape, device=device)
    with torch.inference_mode():
        for n_passes in (2, 5):  # the first are not timed
            begun = time.perf_counter()
            for _ in range(n_passes):
                last = model.model(tokens).last_hidden_state
            last.float().sum().item()
    return 5 * tokens.numel() / (time.perf_counter() - begun)


def folder(options) -> dict:
    """Tokens/s of train_autoencoder.py from the activations, by its log without the first line.

    Its pool is a sixth of the activations: as large as by default, it would hold most of them.
    """
    work, sizes = Path(options.work), options.sizes
    flags = ["--activations-dir", work / "activations", "--autoencoder-dir", work / "autoencoder"]
    printed = run_script(
        "train_autoencoder.py", *flags, "--kind", "topk", "--n-latents", sizes["n_latents"],
        "--k", sizes["k"], "--batch-size", sizes["folder_batch"], "--n-passes", sizes["passes"],
        "--log-every", sizes["log_every"], "--backend", "torch", "--backup-every", 1_000,
        "--pool-gib", 1.0,
    )  # fmt: skip
    with open(work / "autoencoder" / "training_log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    seconds = float(log[-1]["seconds"]) - float(log[0]["seconds"])
    metrics = read_json(work / "autoencoder" / "metrics.json")
    plan = [line for line in printed.splitlines() if line.startswith("Memory: ")]
    return {
        "tokens_per_second": (int(log[-1]["tokens"]) - int(log[0]["tokens"])) / seconds,
        "plan": plan[0],
        "peak_accelerator_memory_gb": metrics["peak_accelerator_memory_gb"],
    }


def measuring(options) -> dict:
    """Tokens/s of measuring on held-out tokens; here on some that are not."""
    from utils.autoencoder.training import measure

    autoencoder, store = opened(options)
    size = options.sizes["folder_batch"]
    measure(autoencoder, store, range(store.n_contexts // 16), size)  # warms up
    begun = time.perf_counter()
    fidelity = measure(autoencoder, store, range(store.n_contexts), size)
    fvu = fidelity.fvu  # asked for within the time
    return {"tokens_per_second": fidelity.n_rows / (time.perf_counter() - begun), "fvu": fvu}


def feature_pass(options) -> dict:
    """Tokens/s of the analysis' pass over the last quarter; until then examples fill up."""
    from utils.features.feature_pass import FeaturePass
    from utils.steering.feature_model import FeatureEncoder

    autoencoder, store = opened(options)
    found = FeaturePass(FeatureEncoder(autoencoder), store, seed=0)
    start = store.n_contexts * 3 // 4
    found.run(range(start), options.sizes["folder_batch"])
    begun = time.perf_counter()
    found.run(range(start, store.n_contexts), options.sizes["folder_batch"])
    seconds = time.perf_counter() - begun
    return {"tokens_per_second": (store.n_contexts - start) * store.context_length / seconds}


def steering(options) -> dict:
    """Tokens/s of steered generation, and milliseconds a token, untouched and steered; medians."""
    from utils.language_model import load_language_model
    from utils.steering.clamps import Clamp, steered
    from utils.steering.feature_model import FeatureModel
    from utils.steering.generation import generate_tokens, prompt_tokens

    autoencoder, store = opened(options)
    language_model = load_language_model(str(Path(options.work) / "model"), store.layer)
    language_model.model.generation_config.eos_token_id = None
    model = FeatureModel(language_model, store.layer, autoencoder, float("inf"))
    prompt = prompt_tokens(language_model, "def main(options):")

    def seconds(changing: contextlib.AbstractContextManager) -> float:
        begun = time.perf_counter()
        with changing:
            generate_tokens(language_model, [prompt], N_GENERATED)
        return time.perf_counter() - begun

    pairs = [
        (seconds(contextlib.nullcontext()), seconds(steered(model, [Clamp(0, 1.0, 10.0)])))
        for _ in range(1 + N_PAIRS)
    ]
    untouched, changed = np.median(pairs[1:], axis=0) / N_GENERATED  # the first warms up
    return {
        "tokens_per_second": 1 / changed,
        "untouched_ms": 1e3 * untouched,
        "steered_ms": 1e3 * changed,
    }


def opened(options) -> tuple:
    from utils.activations.store import ActivationStore
    from utils.autoencoder.saved import open_autoencoder

    store = ActivationStore(Path(options.work) / "activations")
    return open_autoencoder(Path(options.work) / "autoencoder", store)[0], store


def run_script(name: str, *words: object) -> str:
    """What a script printed; its last line is the error if it fails."""
    command = [sys.executable, name, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")
    return done.stdout


CASES = {
    "extraction": extraction, "folder": folder, "measuring": measuring, "pass": feature_pass,
    "steering": steering,
}  # fmt: skip
