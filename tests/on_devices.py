"""Trains autoencoders on as many virtual devices as XLA_FLAGS says, for test_distribution.py.

    python -m tests.on_devices model FOLDER

FOLDER holds batches.npy (steps, batch, d_model); what is computed goes to FOLDER/model.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from utils.backend import use_backend

SPARSE = ["--k", "4", "--dead-after", "64"]
DENSE = ["--sparsity-coefficient", "0.3"]
KINDS = dict.fromkeys(("topk", "batch_topk", "matryoshka"), SPARSE)
KINDS |= dict.fromkeys(("l1", "gated", "jumprelu"), DENSE)
NEW_KIND = "scaled"  # one that no module of utils/ knows
N_LATENTS, BACKUP_AT = 64, 13


def main(name: str, folder: Path) -> None:
    """``name`` is "single", "data" or "model"."""
    use_backend("jax")
    from utils.autoencoder.devices import use_devices
    from utils.autoencoder.saved import save_autoencoder

    batches = np.load(folder / "batches.npy")
    use_devices(None if name == "single" else name, batches.shape[1], (N_LATENTS,))
    register_new_kind()
    layouts = {}
    for kind in (*KINDS, NEW_KIND):
        output = folder / name / kind
        output.mkdir(parents=True)
        autoencoder = train(kind, batches, output)
        for weight in [*autoencoder.variables, *autoencoder.optimizer.variables]:
            layouts[weight.path] = str(getattr(weight.value.sharding, "spec", None))
        save_autoencoder(autoencoder, output / "autoencoder.keras")
        np.save(output / "latents.npy", autoencoder.encode(batches[0][:-1]))
    (folder / name / "layouts.json").write_text(json.dumps(layouts))
    (folder / name / "refusals.json").write_text(json.dumps(refusals()))
    go_on("topk", folder / name, batches)
    if name == "single":  # what was begun on several devices
        go_on("topk", folder / "model", batches, "-by-one")


def register_new_kind() -> None:
    """A kind with a weight of its own for each latent, made as anyone would add one."""
    from keras import ops

    from utils.autoencoder.autoencoder import of_some
    from utils.autoencoder.kinds import L1Autoencoder, kind

    @kind(NEW_KIND)
    class ScaledAutoencoder(L1Autoencoder):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.gain = self.add_weight((self.n_latents,), "ones", name="gain")

        def latents(self, pre_activations, features=None):
            return ops.relu(pre_activations) * of_some(self.gain, features)


def train(kind: str, batches: np.ndarray, output: Path):
    """Train as train_autoencoder.py does, from the folder's backup if there is one."""
    import train_autoencoder
    from utils.autoencoder import training
    from utils.autoencoder.callbacks import Rounds
    from utils.settings import read_settings

    flags = ["--n-latents", N_LATENTS, "--batch-size", batches.shape[1], "--learning-rate", 0.002]
    words = ["--kind", kind, *map(str, flags), *KINDS.get(kind, DENSE)]
    settings = read_settings(train_autoencoder, words)
    rows = batches.reshape(-1, batches.shape[-1])
    scale = float(np.sqrt(rows.shape[1] / np.square(rows).sum(axis=1).mean()))
    store = SimpleNamespace(d_model=rows.shape[1], scale=scale, mean=rows.mean(axis=0))
    held_out = rows[:50]  # two batches of 25, which four devices cannot share
    return training.train(
        training.begin(settings, store, len(batches), output),
        training.TrainingData(
            lambda step: (batch for batch in batches[step:]), held_out, batches.shape[1]
        ),
        Rounds(len(batches), 1),
        output,
        BACKUP_AT,  # and not again: it is more than half of the steps
    )


def go_on(kind: str, folder: Path, batches: np.ndarray, suffix: str = "") -> None:
    """Train from the backup, as after a kill, in FOLDER/KIND-resumed."""
    resumed = folder / f"{kind}-resumed{suffix}"
    shutil.copytree(folder / kind, resumed)
    train(kind, batches, resumed)


def refusals() -> list[str]:
    """What is said of settings that these devices cannot have."""
    from utils.autoencoder.devices import use_devices
    from utils.settings import InputError

    said = []
    for settings in (("data", 30, (64,)), ("model", 32, (64, 66))):
        try:
            use_devices(*settings)
        except InputError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
