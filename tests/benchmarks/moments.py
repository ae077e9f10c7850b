"""Moments in bfloat16 beside float32: FVU after 2,000 steps on planted rows, by seed; 10 minutes.

python -m tests.benchmarks.moments
"""

import argparse
import statistics

import numpy as np

import train_autoencoder
from tests.on_backend import stand_in_for_store
from tests.planted import make_planted
from utils.backend import use_backend
from utils.settings import read_settings

D_MODEL, BATCH, N_STEPS, N_MEASURED = 64, 256, 2_000, 8_192
FLAGS = "--kind topk --n-latents 512 --k 7 --selection-dtype float32 --dead-after 20_000".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    use_backend("torch")
    rows = make_planted(BATCH * N_STEPS + N_MEASURED, D_MODEL).rows
    found = {}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = [fvu_after_training(rows, dtype, seed) for seed in seeds]
        print(f"{dtype}: FVU {', '.join(f'{fvu:.4f}' for fvu in found[dtype])}", flush=True)
    means = {dtype: statistics.mean(values) for dtype, values in found.items()}
    print(f"bfloat16 / float32: {means['bfloat16'] / means['float32']:.4f}")


def fvu_after_training(rows: np.ndarray, moments_dtype: str, seed: int) -> float:
    """FVU on rows that were not trained on."""
    import keras

    from utils.autoencoder import training

    words = [*FLAGS, "--moments-dtype", moments_dtype, "--seed", str(seed)]
    settings = read_settings(train_autoencoder, words)
    trained_on, measured_on = rows[:-N_MEASURED], rows[-N_MEASURED:]
    store = stand_in_for_store(trained_on[: 64 * BATCH])
    autoencoder = training.build(settings, store, N_STEPS)
    for batch in np.split(trained_on, N_STEPS):
        autoencoder.look_for_dead()
        autoencoder.train_on_batch(batch)
    autoencoder.compile(optimizer=keras.optimizers.SGD(0.0))
    return autoencoder.test_on_batch(measured_on, return_dict=True)["fvu"]


if __name__ == "__main__":
    main()
