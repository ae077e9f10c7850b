import numpy as np
import pandas as pd
from pictures import drawn, share_of

from utils import plots


def training_log(n=40):
    progress = np.linspace(0.01, 1, n)
    return pd.DataFrame(
        {
            "step": np.arange(n) * 100,
            "tokens": np.arange(n) * 204_800,
            "loss": 200 / progress,
            "fvu": 0.2 / progress**0.5,
            "l0": np.full(n, 32.0),
            "dead_fraction": 0.1 * progress,
            "learning_rate": 3e-4 * (1 - progress),
        }
    )


def test_training_curves_show_held_out_variance(tmp_path):
    path = tmp_path / "training.png"
    log = training_log()
    held_out = log.fvu.where(log.index % 10 == 9)
    plots.plot_training_curves(log.assign(val_fvu=held_out), path)
    assert share_of(drawn(path), plots.ORANGE) > 0


def test_training_curves_of_one_step_that_diverged_without_validation(tmp_path):
    log = training_log().tail(1).assign(fvu=np.nan)
    plots.plot_training_curves(log, tmp_path / "training.png")
    picture = drawn(tmp_path / "training.png")
    assert share_of(picture, plots.BLUE) > 0
    assert share_of(picture, plots.ORANGE) == 0
