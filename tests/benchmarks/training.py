"""Training against three other libraries: how fast, and how well, on the same batches.

    python -m tests.benchmarks.training speed
    python -m tests.benchmarks.training quality

Ours is what a user runs, ``train_autoencoder.py`` in a process of its own, at its defaults. Theirs
is `tests.benchmarks.peers`, in an environment of their own (peers-requirements.txt). Both compute
on the CPU. A finished run is kept in data/benchmarks/ as JSON and not made again, so that a
benchmark that was killed goes on, and its table is of all runs that are there.

speed: TopK, tokens/s of the training steps, in rounds in which each takes its turn, peers in
float32 and under bfloat16 autocast. Theirs leaves the first steps and the reading of data out; ours
leaves the first line of its log out, and has the reading of data and the validation in it.

quality: one pass over the data, peers at three learning rates, a factor of 3 apart, high ones since
so short a run turned out to want them. A penalty's coefficient is searched at the middle rate until
L0 is within 10% of k.
"""

import argparse
import functools
import itertools
import math
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable

import torch

from tests.benchmarks.runs import PEERS, Benchmark, K

# --- speed: by number of latents, steps of a peer that are not timed and timed; ours, each round
SPEED_STEPS = {4_608: (3, 9, 25), 18_432: (2, 4, 10), 73_728: (1, 2, 5)}
SPEED_BATCH_SIZES = (2_048, 4_096)
SPEED_PEERS = ("sparsify", "dictionary_learning", "saelens")

# --- quality: the peers that have a kind, and what flags ours gets beside its defaults
QUALITY_LATENTS, QUALITY_BATCH_SIZE, QUALITY_LOG_EVERY = 1_152, 2_048, 25
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
QUALITY_PEERS = {
    "topk": ("sparsify", "dictionary_learning", "saelens"),
    "batch_topk": ("dictionary_learning", "saelens"),
    "jumprelu": ("saelens",),
    "l1": ("saelens",),
    "matryoshka": ("dictionary_learning", "saelens"),
    "gated": ("saelens",),
}
QUALITY_OURS = {
    "topk": (),
    "batch_topk": (),
    "jumprelu": (),
    "l1": (),
    "matryoshka": (),
    "gated": (),
}
WITH_PENALTY = ("jumprelu", "l1", "gated")
CURVE_FACTORS = (0.5, 2)  # l1: coefficients beside that of an L0 near k
MAX_COEFFICIENTS = 4


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    benchmark = Benchmark(options)
    if options.what == "speed":
        run_speed(benchmark)
        print(speed_table(benchmark.results("speed")))
    else:
        run_quality(benchmark)
        print(quality_table(benchmark.results("quality")))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "quality"))
    who = ("ours", *PEERS)
    parser.add_argument("--who", nargs="*", choices=who, default=who, help="runs to make")
    parser.add_argument("--kinds", nargs="*", choices=QUALITY_PEERS, default=list(QUALITY_PEERS))
    parser.add_argument("--n-latents", nargs="*", type=int, default=list(SPEED_STEPS), help="speed")
    parser.add_argument("--rounds", type=int, default=2, help="speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--activations", default="data/demo/activations")
    parser.add_argument("--folder", default="data/benchmarks", help="where results are kept")
    parser.add_argument("--peers-python", default=".venv-peers/bin/python")
    parser.add_argument("--overwrite", action="store_true", help="make finished runs again")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------ speed


def run_speed(benchmark: Benchmark) -> None:
    sizes = itertools.product(benchmark.options.n_latents, SPEED_BATCH_SIZES)
    for turn, (n_latents, batch_size) in itertools.product(range(benchmark.options.rounds), sizes):
        size = {"n_latents": n_latents, "batch_size": batch_size}
        for who in ("ours", *SPEED_PEERS):
            if who not in benchmark.options.who:
                continue
            for precision in ("",) if who == "ours" else ("float32", "bfloat16"):
                name = f"speed-{n_latents}-{batch_size}-{who}{precision and '-' + precision}-{turn}"
                make = functools.partial(speed_run, benchmark, name, who, precision, size)
                benchmark.kept(name, make, who=f"{who} {precision}".strip(), turn=turn, **size)


def speed_run(benchmark: Benchmark, name: str, who: str, precision: str, size: dict) -> dict:
    untimed, timed, steps = SPEED_STEPS[size["n_latents"]]
    if who != "ours":
        flags = {**size, "kind": "topk", "learning_rate": 1e-4, "steps": untimed + timed}
        switches = ("--speed-only", *(["--autocast"] if precision == "bfloat16" else []))
        return benchmark.peer(who, flags | {"untimed": untimed}, switches)
    tokens = 2 * steps * size["batch_size"]
    passes = (tokens + 0.5) / benchmark.batches(size["batch_size"]).n_rows
    flags = {**size, "kind": "topk", "n_passes": passes, "log_every": steps}
    result = benchmark.ours(name, flags)
    shutil.rmtree(benchmark.folder / name)
    first, last = result["log"][0], result["log"][-1]
    seconds = float(last["seconds"]) - float(first["seconds"])
    return result | {"tokens_per_second": (int(last["tokens"]) - int(first["tokens"])) / seconds}


def speed_table(results: list[dict]) -> str:
    """Medians over the rounds, and the median of ours / theirs within a round."""
    lines = ["| latents | batch | who | tokens/s | ours / theirs | peak memory |", "|" + "---|" * 6]
    ours = {
        (run["n_latents"], run["batch_size"], run["turn"]): run
        for run in results
        if run["who"] == "ours"
    }
    cases = sorted({(run["n_latents"], run["batch_size"], run["who"]) for run in results})
    for n_latents, batch_size, who in cases:
        runs = [
            run
            for run in results
            if (run["n_latents"], run["batch_size"], run["who"]) == (n_latents, batch_size, who)
        ]
        speed = statistics.median(run["tokens_per_second"] for run in runs)
        ratios = [
            ours[at]["tokens_per_second"] / run["tokens_per_second"]
            for run in runs
            if (at := (n_latents, batch_size, run["turn"])) in ours
        ]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        memory = statistics.median(run["peak_rss_bytes"] for run in runs) / 1e9
        lines.append(
            f"| {n_latents:,} | {batch_size:,} | {who} | {speed:,.0f} | {ratio} | {memory:.1f} GB |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- quality


def run_quality(benchmark: Benchmark) -> None:
    for kind in benchmark.options.kinds:
        for who in (*QUALITY_PEERS[kind], "ours"):
            if who not in benchmark.options.who:
                continue
            try:
                explore(benchmark, kind, who)
            except subprocess.CalledProcessError as error:
                print(f"{kind}, {who}: ended with status {error.returncode}", flush=True)


def explore(benchmark: Benchmark, kind: str, who: str) -> None:
    """All runs of a kind: a peer's at three learning rates, ours at its own."""
    run = functools.partial(quality_run, benchmark, kind, who)
    rates = [{}] if who == "ours" else [{"learning_rate": rate} for rate in LEARNING_RATES]
    if kind not in WITH_PENALTY:
        for rate in rates:
            run(**rate)
        return
    middle = rates[len(rates) // 2]
    found = search_coefficient(lambda value: run(**middle, sparsity_coefficient=value), 5.0)
    coefficient = found["sparsity_coefficient"]
    results = [run(**rate, sparsity_coefficient=coefficient) for rate in rates]
    if kind == "l1":  # the curve of FVU over L0, at the best of the rates
        best = min(range(len(rates)), key=lambda i: distance(results[i]))
        for factor in CURVE_FACTORS:
            run(**rates[best], sparsity_coefficient=coefficient * factor)


def distance(result: dict) -> float:
    """How bad a run is whose L0 is not quite k: FVU falls about as L0 to the power −0.4."""
    return result["fvu"] * (result["l0"] / K) ** 0.4


def quality_run(benchmark: Benchmark, kind: str, who: str, **chosen: float) -> dict:
    """One run, ours or a peer's, at a learning rate and a coefficient where they are chosen."""
    name = "-".join(["quality", kind, who, *(f"{value:.3g}" for value in chosen.values())])
    flags = {"kind": kind, "n_latents": QUALITY_LATENTS, "batch_size": QUALITY_BATCH_SIZE} | chosen
    if who == "ours":
        make = functools.partial(our_run, benchmark, name, flags)
    else:
        flags["steps"] = benchmark.batches(QUALITY_BATCH_SIZE).n_steps(1.0)
        make = functools.partial(benchmark.peer, who, flags)
    return benchmark.kept(name, make, who=who, kind=kind, **chosen)


def our_run(benchmark: Benchmark, name: str, flags: dict[str, object]) -> dict:
    flags = flags | {"n_passes": 1.0, "log_every": QUALITY_LOG_EVERY}
    result = benchmark.ours(name, flags, QUALITY_OURS[flags["kind"]])
    path = benchmark.folder / name / "autoencoder.keras"
    loss_recovered = benchmark.loss_recovered(benchmark.our_reconstruction(path))
    peak = max(float(line["learning_rate"]) for line in result["log"])
    return result | {"loss_recovered": loss_recovered, "learning_rate": peak}


def search_coefficient(run: Callable[[float], dict], start: float) -> dict:
    """The run whose L0 is nearest to k, by the secant method on logarithms."""
    results, coefficient = [], start
    for _ in range(MAX_COEFFICIENTS):
        results.append(run(coefficient))
        off = [math.log(max(result["l0"], 0.1) / K) for result in results]
        if abs(off[-1]) < math.log(1.1):
            break
        places = [math.log(result["sparsity_coefficient"]) for result in results]
        slope = -1.0
        if len(results) > 1 and places[-1] != places[-2]:
            slope = min(-0.2, (off[-1] - off[-2]) / (places[-1] - places[-2]))
        coefficient *= math.exp(min(1.5, max(-1.5, -off[-1] / slope)))
    return min(results, key=lambda result: abs(math.log(max(result["l0"], 0.1) / K)))


def quality_table(results: list[dict]) -> str:
    """One line a run."""
    lines = [
        "| kind | who | learning rate | λ | FVU | L0 | dead | loss recovered |",
        "|" + "---|" * 8,
    ]
    kinds = list(QUALITY_PEERS)
    results.sort(key=lambda r: (kinds.index(r["kind"]), r["who"], r["learning_rate"], r["l0"]))
    for result in results:
        with_penalty = result["kind"] in WITH_PENALTY
        penalty = f"{result['sparsity_coefficient']:.3g}" if with_penalty else ""
        lines.append(
            f"| {result['kind']} | {result['who']} | {result['learning_rate']:.1e} | {penalty} | "
            f"{result['fvu']:.4f} | {result['l0']:.1f} | {result['dead_fraction']:.2%} | "
            f"{result['loss_recovered']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
