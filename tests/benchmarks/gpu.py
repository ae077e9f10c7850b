"""The whole pipeline on one accelerator, and training steps beside two other libraries', in 8 min.

    python -m tests.benchmarks.gpu [--peers-python PYTHON] [--jax-python PYTHON]
    python -m tests.benchmarks.gpu --cases torch sparsify --d-model 768 --n-latents 24576 --k 32

Each case has a process and a time limit of its own; one that fails is not tried at larger batches.
data/benchmarks/gpu.json is written after every case. ``--small``: on a CPU, to see that it works.

- Steps on made-up float16 activations are timed with batches on the device, and with batches in the
  host's memory, as they come from a disk: in groups, the device waited for after each; medians.
- Ours is an autoencoder and a `fit` with a callback as train_autoencoder.py has them; theirs are
  the classes of `tests.benchmarks.peers`, with Adam. No latent is dead for anyone yet, but in a
  third measurement of ours, "reviving". ``million`` is ours with 1,048,576 latents, moments in
  bfloat16.
- ``extraction``, ``folder``, ``measuring``, ``pass`` and ``steering`` are those of
  `tests.benchmarks.gpu_pipeline`.
- Share of the card's dense bfloat16 peak: of what the method needs, 2·d·n + 8·k·d FLOPs a token
  (the product that encodes; decoding, and the gradients of values, encoder, decoder, by k latents).
- Memory is the accelerator's, allocated at most, beside what `utils.autoencoder.memory` plans. The
  loader is timed alone, from the page cache.
"""

import argparse
import functools
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from utils.activations.batches import ShuffledBatches
from utils.activations.capture import sums_of
from utils.activations.manifest import Manifest
from utils.activations.shards import ShardWriter
from utils.activations.store import ActivationStore
from utils.artifacts import read_json, write_json
from utils.backend import peak_memory, use_backend

SIZES = {  # seconds: of all groups, about; contexts: of the loader's store
    "d_model": 3_072, "n_latents": 65_536, "k": 64, "batch_sizes": [4_096, 8_192, 16_384],
    "group": 5, "seconds": 4.0, "contexts": 256, "context_length": 1_024,
    "million": 2**20, "million_batch": 8_192,
    "tokens": 2**20, "folder_batch": 8_192, "passes": 3.0, "log_every": 50,
}  # fmt: skip
SMALL = {
    "d_model": 64, "n_latents": 512, "k": 8, "batch_sizes": [256],
    "group": 2, "seconds": 0.0, "contexts": 64, "context_length": 64,
    "million": 4_096, "million_batch": 64,
    "tokens": 2**13, "folder_batch": 256, "passes": 1.0, "log_every": 10,
}  # fmt: skip
GIVEN = ("d_model", "n_latents", "k")  # sizes that may be asked for
SAELENS = {"sae_lens": "TopKTrainingSAEConfig", "sae_lens.config": "SAETrainerConfig"}
PIPELINE = (
    "extraction",
    "folder",
    "measuring",
    "pass",
    "steering",
)  # in this order: each needs the earlier
CASES = {  # a peer's name, whether it gets autocast, and what in it is to be told the device
    "torch": None,
    "million": None,
    **dict.fromkeys(PIPELINE),
    "jax": None,
    "sparsify": ("sparsify", False, {"sparsify": "SparseCoder"}),  # bfloat16 on CUDA by itself
    "saelens": ("saelens", False, SAELENS),
    "saelens-bfloat16": ("saelens", True, SAELENS),
}
PEAKS = {  # dense bfloat16, FLOP/s; the first name that is part of the card's
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2_250e12,
    "A100": 312e12, "L40S": 362e12,
}  # fmt: skip
LIMITS = {"million": 130.0, "extraction": 120.0}  # seconds: weights and a model are made first
LEAST, MOST = 3, 20  # timed groups
N_BATCHES, N_DIRECTIONS, ACTIVE = 4, 1_024, 16  # of the data; directions in a row, on average
STEPS, DEAD_AFTER = 10_000, 10_000_000  # of a schedule; tokens
SHARE_DEAD = 0.1  # of the latents, while it is timed how long AuxK takes


def main() -> None:
    options = parse()
    options.given = {name: getattr(options, name) for name in GIVEN if getattr(options, name)}
    sizes = options.sizes = (SMALL if options.small else SIZES) | options.given
    options.flops = sizes["d_model"] * (2 * sizes["n_latents"] + 8 * sizes["k"])  # needed, a token
    if options.worker:
        measure = {"loader": loader, **dict.fromkeys(PIPELINE, pipeline)}.get(options.worker, work)
        return write_json(Path(options.output), measure(options))
    path = Path(options.folder) / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    results, failed = {"sizes": sizes, "flops_per_token": options.flops, "cases": []}, {}
    with tempfile.TemporaryDirectory(dir=options.folder) as options.work:
        for who, batch_size in ordered(options.cases, sizes):
            result = failed.get(who) or run_case(options, who, batch_size, deadline)
            if "failed" in result:
                failed[who] = result
            results["cases"].append({"who": who, "batch_size": batch_size, **result})
            write_json(path, results)
            print(f"{who}, batch {batch_size:,}: {result.get('failed', 'done')}", flush=True)
            print(f"\n{table(results['cases'])}\n", flush=True)


def ordered(cases: list[str], sizes: dict) -> Iterator[tuple[str, int]]:
    """Cases and batch sizes, the most informative first; those of steps at each size."""
    of_one_size = {"million": sizes["million_batch"]}
    of_one_size |= dict.fromkeys(PIPELINE, sizes["folder_batch"])
    ours, others = (
        sizes["batch_sizes"],
        [who for who in cases if who not in ("torch", *of_one_size)],
    )
    yield from (("torch", batch_size) for batch_size in ours if "torch" in cases)
    yield from ((who, size) for who, size in of_one_size.items() if who in cases)
    yield "loader", ours[0]
    yield from ((who, batch_size) for batch_size in ours for who in others)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--peers-python", default=".venv-peers/bin/python")
    parser.add_argument("--jax-python", default=sys.executable, help="one whose JAX sees the GPU")
    parser.add_argument("--folder", default="data/benchmarks", help="where gpu.json is written")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all cases together")
    parser.add_argument("--case-seconds", type=float, default=75.0, help="for one case")
    for name in ("--worker", "--output", "--work"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    for name in GIVEN:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help="of all cases but the model's"
        )
    return parser.parse_args()


def run_case(options: argparse.Namespace, who: str, batch_size: int, deadline: float) -> dict:
    """What a case measured in a process of its own, or why it ``failed``."""
    left = min(LIMITS.get(who, options.case_seconds), deadline - time.monotonic())
    if left < 10:
        return {"failed": "no time left"}
    python = dict.fromkeys(("torch", "million", "loader", *PIPELINE), sys.executable)
    python["jax"] = options.jax_python
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        output = Path(folder) / "result.json"
        command = [python.get(who, options.peers_python), "-m", "tests.benchmarks.gpu"]
        command += ["--worker", who, "--batch-size", str(batch_size), "--output", str(output)]
        command += ["--folder", folder, "--work", options.work]
        command += ["--small"] if options.small else []
        for name, size in options.given.items():
            command += [f"--{name.replace('_', '-')}", str(size)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {left:.0f} s"}
        except OSError:
            return {"failed": "not installed", "error": f"no {command[0]}"}
        if done.returncode == 0:
            return read_json(output)
    line = (done.stderr.strip() or f"ended with status {done.returncode}").splitlines()[-1]
    missing = "No module named" in line or "is not installed" in line
    line = f"not installed ({line})" if missing else line
    return {"failed": line[:200].replace("|", "/"), "error": done.stderr[-4_000:]}


def work(options: argparse.Namespace) -> dict:
    """Measure one case."""
    ours = CASES[options.worker] is None
    backend = use_backend("jax" if options.worker == "jax" else "torch") if ours else "torch"
    os.environ["KERAS_BACKEND"] = backend  # `peak_memory` asks for it
    device = Device(backend)
    if not (options.small or device.name):
        raise SystemExit(f"{backend} sees no GPU")
    batches = list(itertools.islice(made_up(options.sizes, options.batch_size), N_BATCHES))
    first = batches[0].astype(np.float32)  # what a store says of its activations, here of these
    scale, mean = float(np.square(first).mean()) ** -0.5, first.mean(axis=0)
    store = SimpleNamespace(d_model=options.sizes["d_model"], mean=mean, scale=scale)
    run = (our_steps if ours else peer_steps)(options, store, device)
    seconds, on_device = {}, [device.put(batch) for batch in batches]
    cases = {"from_device": (on_device,), "from_host": (batches,)}
    if options.worker == "torch":
        cases["reviving"] = on_device, SHARE_DEAD
    for name, given in cases.items():
        clock = Clock(options.sizes, device)
        run(clock, *given)
        seconds[f"step_seconds_{name}"] = clock.step_seconds()
    rate = options.batch_size / seconds["step_seconds_from_device"]
    peaks = [peak for name, peak in PEAKS.items() if name in device.name]
    flops = options.flops
    if options.worker == "million":
        flops += (
            2 * options.sizes["d_model"] * (options.sizes["million"] - options.sizes["n_latents"])
        )
    share = flops * rate / peaks[0] if peaks else None
    facts = {"device": device.name or "CPU", "version": device.version, **peak_memory()}
    facts |= {"plan": options.plan} if ours else {}
    return {**seconds, "tokens_per_second": rate, "share_of_peak": share, **facts}


class Device:
    """The accelerator, or the CPU, as a framework sees it; ``name`` is empty for a CPU."""

    def __init__(self, backend: str):
        framework = __import__(backend)
        self.version = f"{backend} {framework.__version__}"
        if backend == "jax":
            device = framework.devices()[0]
            self.name = "" if device.platform == "cpu" else device.device_kind
            self.put = framework.device_put
            self.wait = lambda: framework.block_until_ready(framework.live_arrays())
        else:
            gpu = framework.cuda.is_available()
            self.name = framework.cuda.get_device_name() if gpu else ""
            self.place = "cuda" if gpu else "cpu"
            self.put = lambda batch: framework.as_tensor(batch).to(self.place)
            self.wait = framework.cuda.synchronize if gpu else lambda: None


class Clock:
    """Times groups of steps, after a group that is not timed."""

    def __init__(self, sizes: dict, device: Device):
        self.sizes, self.wait, self.marks = sizes, device.wait, []

    def is_over(self, step: int) -> bool:
        """To be called after each step, counted from 0: whether enough were timed."""
        if (step + 1) % self.sizes["group"] == 0:
            self.wait()
            self.marks.append(time.perf_counter())
        timed = np.diff(self.marks)
        return len(timed) == MOST or (len(timed) >= LEAST and timed.sum() > self.sizes["seconds"])

    def step_seconds(self) -> float:
        return float(np.median(np.diff(self.marks))) / self.sizes["group"]


def made_up(sizes: dict, n_rows: int) -> Iterator[np.ndarray]:
    """Arrays (n_rows, d_model) float16 without end, whose rows are sums of a few directions."""
    draw = np.random.default_rng(0)
    directions = draw.standard_normal((N_DIRECTIONS, sizes["d_model"]), dtype=np.float32)
    while True:
        amounts = draw.standard_exponential((n_rows, N_DIRECTIONS), dtype=np.float32)
        amounts *= draw.random(amounts.shape, dtype=np.float32) < ACTIVE / N_DIRECTIONS
        yield (amounts @ directions).astype(np.float16)


def our_steps(options: argparse.Namespace, store: SimpleNamespace, device: Device) -> Callable:
    """What fits an autoencoder, built as train_autoencoder.py does, until a clock is over."""
    import keras

    import train_autoencoder
    from utils.autoencoder import training
    from utils.autoencoder.autoencoder import SparseAutoencoder
    from utils.autoencoder.callbacks import RoundCallbacks
    from utils.autoencoder.memory import require_memory
    from utils.settings import read_settings

    is_million = options.worker == "million"
    n_latents = options.sizes["million" if is_million else "n_latents"]
    flags = f"--kind topk --n-latents {n_latents} --k {options.sizes['k']}"
    flags += f" --batch-size {options.batch_size}"
    flags += " --moments-dtype bfloat16" if is_million else ""
    settings = read_settings(train_autoencoder, flags.split())
    options.plan = require_memory(settings, store.d_model).strip()
    if is_million:  # by NumPy it would take a minute
        SparseAutoencoder.initialize = draw_on_device
    autoencoder = training.build(settings, store, STEPS)

    def run(clock, batches, share_dead=0.0):
        is_dead = np.arange(n_latents) < share_dead * n_latents
        autoencoder.idle_tokens.assign(np.where(is_dead, autoencoder.dead_after, 0))

        class Stop(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                self.model.stop_training = clock.is_over(batch)

        endless = ((batch,) for batch in itertools.cycle(batches))
        callbacks = RoundCallbacks([Stop()], add_history=True, model=autoencoder)
        autoencoder.fit(endless, steps_per_epoch=STEPS, verbose=0, callbacks=callbacks)

    return run


def draw_on_device(autoencoder, *_) -> None:
    """In place of `SparseAutoencoder.initialize`."""
    rows = torch.randn(tuple(autoencoder.W_enc.shape), device=autoencoder.W_enc.value.device)
    rows /= rows.norm(dim=1, keepdim=True)
    autoencoder.W_enc.assign(rows)
    autoencoder.W_dec.assign(rows)
    del rows
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peer_steps(options: argparse.Namespace, store: SimpleNamespace, device: Device) -> Callable:
    """What makes a peer's training steps until a clock is over."""
    import torch

    from tests.benchmarks import peers

    name, autocast, on_device = CASES[options.worker]
    asked = SimpleNamespace(
        **options.sizes, batch_size=options.batch_size, kind="topk", steps=STEPS, optimizer="adam",
        learning_rate=1e-4, autocast=autocast, dead_after=DEAD_AFTER, sparsity_coefficient=None,
        tanh_scale=None,
    )  # fmt: skip
    for path, maker in on_device.items():
        module = importlib.import_module(path)
        setattr(module, maker, functools.partial(getattr(module, maker), device=device.place))
    with torch.device(device.place):
        peer = peers.PEERS[name](asked, store.d_model)
    steps = itertools.count()  # of all runs

    def run(clock, batches):
        for step, batch in enumerate(itertools.cycle(batches)):
            peer.update(next(steps), device.put(batch).float() * store.scale)
            if clock.is_over(step):
                return

    return run


def pipeline(options: argparse.Namespace) -> dict:
    """Measure one script, or a part of it."""
    use_backend("torch")
    from tests.benchmarks import gpu_pipeline

    return gpu_pipeline.CASES[options.worker](options)


def loader(options: argparse.Namespace) -> dict:
    """Tokens/s of two passes of the loader over a store, after one that is not timed."""
    folder, sizes = Path(options.folder), options.sizes
    shape = (sizes["contexts"], sizes["context_length"], sizes["d_model"])
    if shutil.disk_usage(folder).free < 6 * np.prod(shape):
        raise SystemExit(f"too little room in {folder}")
    store = write_store(folder, np.resize(next(made_up(sizes, options.batch_size)), shape))
    batches = ShuffledBatches(store, range(store.n_contexts), options.batch_size, seed=0)
    n_steps, source = batches.n_steps(1.0), batches.from_step(0)
    marks = [time.perf_counter() for _ in itertools.islice(source, 3 * n_steps)]
    source.close()
    rate = 2 * n_steps * options.batch_size / (marks[-1] - marks[n_steps - 1])
    return {"tokens_per_second": rate, "cores": os.cpu_count()}


def write_store(folder: Path, activations: np.ndarray) -> ActivationStore:
    """A finished store of one shard; activations are (contexts, context_length, d_model)."""
    shape = activations.shape
    arrays = {name: np.zeros(shape[:2], np.int16) for name in ("documents", "subsets")}
    arrays["tokens"] = np.random.default_rng(0).integers(0, 2**15, shape[:2])
    writer = ShardWriter(folder, 0, shape, "float16")
    arrays["norms"] = np.ones(shape[:2])
    counted = torch.ones(shape[:2], dtype=torch.bool)
    sums = sums_of(torch.from_numpy(activations), ~counted, counted).numpy()
    writer.append(sums, activations=activations, **arrays)
    entry = writer.finish()
    names = dict.fromkeys(("model_name", "dtype", "dataset"), "made up")
    manifest = Manifest(
        **names, revision=None, layer=0, d_model=shape[2], context_length=shape[1],
        bos=-1, outlier_factor=2.0, subsets=["made up"], finished=True,
    )  # fmt: skip
    manifest.add(entry, writer.sum, writer.sum_squared_norm, {})
    manifest.write(folder / "manifest.json")
    return ActivationStore(folder)


def table(cases: list[dict]) -> str:
    """A line a case; speeds beside those of ours on PyTorch, at the same batch size."""
    devices = {case["device"]: None for case in cases if "device" in case}
    lines = [f"Device: {', '.join(devices) or 'none'}, {os.cpu_count()} cores.\n"]
    head = (
        "| batch | who | step | from host | reviving | tokens/s | of peak | torch / this | memory |"
    )
    lines += [head, "|" + "---|" * 9]
    ours = {case["batch_size"]: case for case in cases if case["who"] == "torch"}
    for case in cases:
        cells = [case.get("failed", ""), *[""] * 6]
        if "failed" not in case:
            rate, memory = case["tokens_per_second"], case.get("peak_accelerator_memory_gb")
            compared = ours.get(case["batch_size"], {}).get("tokens_per_second", 0)
            ratio = compared / rate if "step_seconds_from_host" in case else 0
            names = ("from_device", "from_host", "reviving")
            steps = [case.get(f"step_seconds_{name}") for name in names]
            cells = [f"{1e3 * step:.2f} ms" if step else "" for step in steps] + [f"{rate:,.0f}"]
            share = case.get("share_of_peak")
            cells += [f"{share:.1%}" if share else "", f"{ratio:.2f}" if ratio else ""]
            cells += [f"{memory:.1f} GB" if memory else ""]
        lines.append(f"| {case['batch_size']:,} | {case['who']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
