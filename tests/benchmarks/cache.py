"""save_activations.py beside SAELens' CacheActivationsRunner: same model, layer, text, one run.

    make .venv-peers/installed
    python -m tests.benchmarks.cache --folder /tmp/cache

The embedded model is saved as a folder, and text of the embedded Pile as a .jsonl. Both read the
two, run the same number of tokens in contexts and batches of one size, the model in one dtype, and
store the output of block 15 (ours as float16; theirs as float32, for it has no bfloat16). They take
turns, each with a short and a three times longer run: the rate is that of the difference, without
the seconds of starting.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYER, CONTEXT, BATCH = 15, 128, 16
N_DOCUMENTS = 4_000
A_BUFFER = 16_384  # tokens; those of a run should be a multiple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="to write to; 2 GB")
    parser.add_argument("--tokens", type=int, default=A_BUFFER, help="of the shorter of two runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--dtype", help="of the model; only where SAELens is run")
    parser.add_argument("--saelens", action="store_true", help="run SAELens, in its environment")
    options = parser.parse_args()
    if options.saelens:
        run_saelens(options)
        return
    dtype = prepare(options.folder)
    seconds = {"ours": [], "saelens": []}
    for turn in range(options.rounds):
        for name, command_for in (("ours", ours), ("saelens", theirs)):
            one, three = (
                timed(command_for(options, dtype, factor * options.tokens), options.folder / name)
                for factor in (1, 3)
            )
            seconds[name].append(three - one)
            rate = 2 * options.tokens / (three - one)
            print(f"round {turn + 1}: {name} {one:.1f} s, {three:.1f} s; {rate:,.0f} tokens/s")
    ratios = [a / b for a, b in zip(seconds["saelens"], seconds["ours"], strict=True)]
    rates = {
        name: round(2 * options.tokens / statistics.median(values))
        for name, values in seconds.items()
    }
    result = {"dtype": dtype, "tokens_per_second": rates}
    print(json.dumps(result | {"ours_over_saelens": round(statistics.median(ratios), 3)}))


def timed(command: list[str], written: Path) -> float:
    """Seconds of a command that writes into an empty folder."""
    shutil.rmtree(written, ignore_errors=True)
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begun


def prepare(folder: Path) -> str:
    """Save model and text, if they are not there; returns the model's dtype."""
    from utils.activations.corpus import Corpus
    from utils.language_model import load_language_model

    language_model = load_language_model("embedded", LAYER)
    text = folder / "text" / "train.jsonl"
    if not text.exists():
        text.parent.mkdir(parents=True, exist_ok=True)
        language_model.model.save_pretrained(folder / "model")
        language_model.tokenizer.save_pretrained(folder / "model")
        documents = Corpus("embedded").documents()
        records = (json.dumps({"text": next(documents).text}) for _ in range(N_DOCUMENTS))
        text.write_text("\n".join(records) + "\n")
    return str(language_model.dtype).removeprefix("torch.")


def theirs(options: argparse.Namespace, dtype: str, n_tokens: int) -> list[str]:
    return [
        str(options.peers), "-m", "tests.benchmarks.cache", "--saelens", "--dtype", dtype,
        "--folder", str(options.folder), "--tokens", str(n_tokens),
    ]  # fmt: skip


def ours(options: argparse.Namespace, dtype: str, n_tokens: int) -> list[str]:
    return [
        sys.executable, "save_activations.py", "--model-name", str(options.folder / "model"),
        "--dataset", str(options.folder / "text"), "--layer", str(LAYER), "--dtype", dtype,
        "--n-tokens", str(n_tokens), "--context-length", str(CONTEXT),
        "--contexts-per-batch", str(BATCH), "--activations-dir", str(options.folder / "ours"),
    ]  # fmt: skip


def run_saelens(options: argparse.Namespace) -> None:
    """SAELens' own command, with the output of the block by its module's name."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from transformers import AutoConfig

    model = str(options.folder / "model")
    d_model = AutoConfig.from_pretrained(model).hidden_size
    CacheActivationsRunner(
        CacheActivationsRunnerConfig(
            dataset_path=str(options.folder / "text"),
            model_name=model,
            model_class_name="AutoModelForCausalLM",
            hook_name=f"model.layers.{LAYER}",
            d_in=d_model,
            buffer_size_gb=(4 * d_model * A_BUFFER + 1) / 1e9,  # 2 GB by default
            model_batch_size=BATCH,
            context_size=CONTEXT,
            training_tokens=options.tokens,
            new_cached_activations_path=str(options.folder / "saelens"),
            shuffle=False,
            device="cpu",
            dtype="float32",  # datasets has no bfloat16
            model_from_pretrained_kwargs={"dtype": options.dtype},
        )
    ).run()


if __name__ == "__main__":
    main()
