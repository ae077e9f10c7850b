"""save_activations.py beside SAELens' CacheActivationsRunner: same model, layer, text, one run.

    make .venv-peers/installed
    python -m tests.benchmarks.cache --folder /tmp/cache

The embedded model is saved as a folder, and text of the embedded Pile as a .jsonl. Both read the
two, run the same number of tokens in contexts and batches of one size, the model in one dtype, and
store the output of block 15 (ours as float16; theirs as float32, for it has no bfloat16). They take
turns; whole commands are timed.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="to write to; 2 GB")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--dtype", help="of the model; only where SAELens is run")
    parser.add_argument("--saelens", action="store_true", help="run SAELens, in its environment")
    options = parser.parse_args()
    if options.saelens:
        run_saelens(options)
        return
    dtype = prepare(options.folder)
    commands = {
        "ours": ours(options, dtype),
        "saelens": [
            str(options.peers), "-m", "tests.benchmarks.cache", "--saelens", "--dtype", dtype,
            "--folder", str(options.folder), "--tokens", str(options.tokens),
        ],
    }  # fmt: skip
    seconds = {name: [] for name in commands}
    for turn in range(options.rounds):
        for name, command in commands.items():
            shutil.rmtree(options.folder / name, ignore_errors=True)
            begun = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begun)
            print(f"round {turn + 1}: {name} {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: round(statistics.median(values), 1) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["saelens"], seconds["ours"], strict=True)]
    result = {"tokens": options.tokens, "dtype": dtype, "seconds": medians}
    print(json.dumps(result | {"saelens_over_ours": round(statistics.median(ratios), 2)}))


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


def ours(options: argparse.Namespace, dtype: str) -> list[str]:
    return [
        sys.executable, "save_activations.py", "--model-name", str(options.folder / "model"),
        "--dataset", str(options.folder / "text"), "--layer", str(LAYER), "--dtype", dtype,
        "--n-tokens", str(options.tokens), "--context-length", str(CONTEXT),
        "--contexts-per-batch", str(BATCH), "--activations-dir", str(options.folder / "ours"),
    ]  # fmt: skip


def run_saelens(options: argparse.Namespace) -> None:
    """SAELens' own command, with the output of the block by its module's name."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from transformers import AutoConfig

    model = str(options.folder / "model")
    CacheActivationsRunner(
        CacheActivationsRunnerConfig(
            dataset_path=str(options.folder / "text"),
            model_name=model,
            model_class_name="AutoModelForCausalLM",
            hook_name=f"model.layers.{LAYER}",
            d_in=AutoConfig.from_pretrained(model).hidden_size,
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
