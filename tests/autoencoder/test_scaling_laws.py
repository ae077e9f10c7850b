"""Scaling laws: known answers, copies of a trunk, a sweep that was killed, bad input."""

import dataclasses
import itertools
import json
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, command, environment, write_activations
from hand_set import ACTIVATIONS, array, hand_set
from pictures import drawn, share_of

import train_autoencoder
from utils.activations.store import ActivationStore
from utils.autoencoder import scaling_laws as scaling
from utils.autoencoder import sweep, training
from utils.autoencoder.sweep import Run, Sweep
from utils.plots import ORANGE
from utils.settings import read_settings

D_MODEL, CONTEXT, BATCH = 16, 32, 64
RATE = 2e-3


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """Sums of a few of 48 directions; 1,500 of 2,000 tokens are for training."""
    draw = np.random.default_rng(0)
    shape = (64, CONTEXT)
    amounts = draw.exponential(size=(*shape, 48)) * (draw.random((*shape, 48)) < 0.08)
    zeros = {name: np.zeros(shape, np.int16) for name in ("tokens", "documents", "subsets")}
    kept = np.ones(shape, bool)
    kept[:, 0] = False
    activations = (amounts @ draw.normal(size=(48, D_MODEL))).astype(np.float16)
    folder = tmp_path_factory.mktemp("activations")
    write_activations(folder, {"activations": activations, "kept": kept, **zeros}, per_shard=32)
    return ActivationStore(folder)


def settings_of(store, **changes):
    """The script's settings for this store."""
    made = read_settings(train_autoencoder, ["--activations-dir", str(store.folder)])
    small = {
        "k": 4, "batch_size": BATCH, "held_out": 0.25, "learning_rate": RATE, "dead_after": 1_000,
        "pool_gib": 0.5, "sweep_latents": (16, 32, 64), "sweep_steps": (5, 10, 20),
    }  # fmt: skip
    return dataclasses.replace(made, **{**small, **changes})


def made_up_grid(alpha: float, beta: float) -> pd.DataFrame:
    """Losses n^-α + steps^-β, whose optima are known."""
    sizes = itertools.product(2 ** np.arange(4, 16), 2 ** np.arange(2, 14))
    grid = pd.DataFrame(sizes, columns=["n_latents", "steps"])
    loss = grid.n_latents ** -float(alpha) + grid.steps ** -float(beta)
    compute = grid.n_latents * grid.steps
    return grid.assign(learning_rate=RATE, compute=compute, flops=12.0 * compute, loss=loss)


# ---------------------------------------------------------------------------------- known answers


def test_a_power_law_is_recovered():
    x = pd.Series(np.geomspace(1e12, 1e18, 7))
    fit = scaling.fit_power_law(x, 3.5 * x**-0.08)
    assert fit["exponent"] == pytest.approx(-0.08) and fit["coefficient"] == pytest.approx(3.5)
    assert fit["standard_error"] == pytest.approx(0, abs=1e-9) and fit["n_points"] == 7
    assert fit["r_squared"] == pytest.approx(1)


def test_the_standard_error_is_how_far_noisy_exponents_scatter():
    x = pd.Series(np.geomspace(1e12, 1e18, 9))
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=(300, 9)))
    fits = pd.DataFrame([scaling.fit_power_law(x, 2 * x**0.5 * row) for row in noise])
    assert fits.exponent.mean() == pytest.approx(0.5, abs=0.003)
    rms = np.sqrt(np.square(fits.standard_error).mean())
    assert rms == pytest.approx(fits.exponent.std(), rel=0.1)


def test_two_points_are_too_few():
    x = pd.Series([1.0, 2.0])
    assert scaling.fit_power_law(x, x) == {"n_points": 2}


def test_the_lowest_point_of_a_parabola():
    x = pd.Series([1.0, 2.0, 4.0, 8.0, 16.0])
    place, at_edge = scaling.lowest(x, 7 + 2 * (np.log(x) - np.log(5)) ** 2)
    assert place == pytest.approx(5) and not at_edge
    assert scaling.lowest(x, x) == (1.0, True)
    assert scaling.lowest(x, -x) == (16.0, True)


def test_optimal_sizes_of_known_losses():
    # With n^-α + steps^-β and n · steps = C, the best n is in proportion to C^(β / (α + β)).
    alpha, beta = 0.4, 0.6
    optima = scaling.optimal_sizes(made_up_grid(alpha, beta))
    assert len(optima) == 21  # of 23 diagonals, the two of one run are no budgets
    fits = scaling.fit_laws(optima.assign(optimal_rate=np.nan, rate_at_edge=None))
    assert fits["n_latents"]["exponent"] == pytest.approx(beta / (alpha + beta), abs=0.01)
    assert fits["steps"]["exponent"] == pytest.approx(alpha / (alpha + beta), abs=0.01)
    assert fits["loss"]["exponent"] == pytest.approx(-alpha * beta / (alpha + beta), abs=0.005)
    inside = optima[~optima.at_edge]
    np.testing.assert_allclose(inside.optimal_latents * inside.optimal_steps, inside.compute)
    assert fits["learning_rate"] == {"n_points": 0}


def test_optima_at_the_edge_of_the_grid_are_marked_and_left_out():
    grid = made_up_grid(0.4, 0.6).query("n_latents <= 1024")  # the larger budgets want more
    optima = scaling.optimal_sizes(grid)
    assert optima.at_edge.iloc[-1] and (optima.n_latents[optima.at_edge].isin([16, 1024])).all()
    fits = scaling.fit_laws(optima.assign(optimal_rate=np.nan, rate_at_edge=None))
    assert fits["n_latents"]["n_points"] == (~optima.at_edge).sum() < len(optima)
    assert fits["n_latents"]["exponent"] == pytest.approx(0.6, abs=0.02)


def test_learning_rates_at_the_edge_are_marked_and_diverged_runs_are_no_runs():
    runs = pd.DataFrame(
        [
            *((8, 5, rate, (np.log(rate) - np.log(3e-3)) ** 2) for rate in (4e-3, 1e-3, 2e-3)),
            *((16, 5, rate, rate) for rate in (1e-3, 2e-3)),
            (8, 5, 8e-3, np.nan),
            (32, 5, 1e-3, 1.0),
        ],
        columns=["n_latents", "steps", "learning_rate", "loss"],
    )
    found = scaling.optimal_rates(runs)
    assert list(found.index) == [(8, 5), (16, 5)]
    assert found.loc[(8, 5), "optimal_rate"] == pytest.approx(4e-3)


# -------------------------------------------------------------------------------------- the sweep

KINDS = {
    "topk": {},
    "batch_topk": {},
    "l1": {"learning_rate_warmup": 0.5, "learning_rate_shape": "cosine"},
    "jumprelu": {"learning_rate_decay": 0.33},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_trunk_is_the_run_trained_by_itself(store, tmp_path, kind):
    settings = settings_of(store, kind=kind, **KINDS[kind])
    runs = [Run(32, steps, RATE) for steps in settings.sweep_steps]
    together = Sweep(settings, store, tmp_path)
    together.train(runs, "together")
    for number, run in enumerate(runs):
        (tmp_path / f"{number}").mkdir()
        alone = Sweep(settings, store, tmp_path / f"{number}")
        alone.train([run], "alone")
        assert without_time(alone.finished[run]) == pytest.approx(
            without_time(together.finished[run]), rel=1e-6
        )
    assert together.table().loss.is_monotonic_decreasing


def test_a_run_of_the_sweep_is_an_ordinary_training(store, tmp_path):
    settings = settings_of(store, n_latents=64, selection_dtype="float32")
    work = Sweep(settings, store, tmp_path)
    work.train([Run(64, steps, RATE) for steps in (10, 20)], "sweep")
    plain = training.build(settings, store, 10)
    for batch in itertools.islice(work.batches.from_step(0), 10):
        plain.fit(batch, batch_size=BATCH, shuffle=False, verbose=0)
    measured = sweep.measure_fidelity(plain, work.held_out)
    row = work.finished[Run(64, 10, RATE)]
    assert (row["fvu"], row["l0"]) == pytest.approx((measured.fvu, measured.l0), rel=1e-6)
    assert row["loss"] == pytest.approx(sweep.held_out_loss(plain, work.held_out), rel=1e-6)
    # The loss of topk is the squared error that FVU is a share of, in normalised units.
    rows = np.concatenate(work.held_out)
    variance = np.square(rows - rows.mean(axis=0)).sum(axis=1).mean() * float(plain.scale) ** 2
    assert row["loss"] == pytest.approx(row["fvu"] * variance / D_MODEL, rel=1e-5)
    assert row["compute"] == 64 * 10 * BATCH and row["flops"] == 12 * D_MODEL * row["compute"]


def test_the_held_out_loss_is_without_what_is_there_to_train():
    made = hand_set("topk", k=1, dead_after=3, auxk_coefficient=1.0)
    made.idle_tokens.assign([3, 0])
    x = made.normalise(ACTIVATIONS)
    losses = made.loss_terms(x, made.forward_pass(x))
    assert array(losses["auxiliary"]) > 0.1
    held_out = sweep.held_out_loss(made, [ACTIVATIONS])
    assert held_out == pytest.approx(array(losses["reconstruction"]) / 2)
    # The gates' own reconstruction is part of the objective.
    made = hand_set("gated", sparsity_coefficient=5.0)
    x = made.normalise(ACTIVATIONS)
    whole = sum(made.loss_terms(x, made.forward_pass(x)).values())
    assert sweep.held_out_loss(made, [ACTIVATIONS]) == pytest.approx(array(whole) / 2)


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "seconds"}


class Killed(Exception):
    pass


def kill_at(monkeypatch, work: Sweep, step: int, saves: int) -> None:
    """Make a sweep, which backs up at every step, die in a backup of a step after some files."""
    back_up, replacing = work._back_up, sweep.replacing
    counted = itertools.count()

    def dying(trunks):
        if min(live.step for live in work.live.values()) >= step:
            monkeypatch.setattr(sweep, "replacing", lambda path: die_after(path))
        back_up(trunks)

    def die_after(path):
        if next(counted) == saves:
            raise Killed
        return replacing(path)

    monkeypatch.setattr(work, "_back_up", dying)


@pytest.mark.parametrize("saves", [1, 4])
def test_a_sweep_killed_again_and_again_ends_the_same(store, tmp_path, monkeypatch, saves):
    settings = settings_of(store, kind="topk")
    sizes = itertools.product(settings.sweep_latents, settings.sweep_steps)
    runs = [Run(*size, RATE) for size in sizes]
    (tmp_path / "whole").mkdir()
    whole = Sweep(settings, store, tmp_path / "whole")
    whole.train(runs, "whole")
    made = []
    for step in (0, 4, 9, 18):  # copies begin at 4, 8; runs end at 5, 10, 20
        work = Sweep(settings, store, tmp_path, backup_seconds=-1)
        kill_at(monkeypatch, work, step, saves)
        with pytest.raises(Killed):
            work.train(runs, "killed")
        monkeypatch.undo()
        made.append(len(work.finished))
        assert not list(tmp_path.glob(".partial-*"))
    assert made[0] == 0 and made[-1] == 6
    work = Sweep(settings, store, tmp_path)
    work.train(runs, "going on")
    tables = [pd.read_csv(f / "scaling_laws.csv") for f in (tmp_path, tmp_path / "whole")]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables), rtol=1e-6)
    assert not list(tmp_path.glob("*.keras"))


def test_every_batch_is_read_once_for_all_runs(store, tmp_path, monkeypatch):
    settings = settings_of(store)
    work = Sweep(settings, store, tmp_path)
    drawn, from_step = [], work.batches.from_step

    def counting(step):
        for batch in from_step(step):
            drawn.append(len(batch))
            yield batch

    monkeypatch.setattr(work.batches, "from_step", counting)
    runs = [Run(*size, RATE) for size in itertools.product((16, 32), settings.sweep_steps)]
    work.train(runs, "sweep")
    assert drawn == [BATCH] * 20
    work.train(runs, "again")
    assert len(drawn) == 20


def test_a_run_that_diverges_is_recorded_without_a_loss(store, tmp_path):
    settings = settings_of(store, gradient_clip_norm=None)
    work = Sweep(settings, store, tmp_path)
    runs = [Run(16, 20, 1e30), Run(16, 20, RATE)]
    work.train(runs, "sweep")
    assert list(work.table().sort_values("learning_rate").loss.isna()) == [False, True]
    assert list(scaling.optimal_rates(work.table()).index) == []
    assert set(Sweep(settings, store, tmp_path).finished) == set(runs)


# ------------------------------------------------------------------------------------ the command


def flags(store, folder) -> list:
    return [
        "--activations-dir", store.folder, "--autoencoder-dir", folder, "--backend", "torch",
        "--k", 4, "--batch-size", BATCH, "--held-out", 0.25, "--learning-rate", RATE,
        "--dead-after", 1_000,
        "--sweep-latents", 16, 32, 64, "--sweep-steps", 5, 10, 20,
        "--sweep-learning-rates", 0.5, 1, 2,
    ]  # fmt: skip


def test_the_command_killed_and_given_again(store, tmp_path, run_here):
    words = flags(store, tmp_path / "killed")
    process = subprocess.Popen(
        command("train_autoencoder", *words), cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    table = tmp_path / "killed" / "scaling_laws.csv"
    while not table.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run_here("train_autoencoder", *words)
    whole = scaling.measure_laws(
        settings_of(store, sweep_learning_rates=(0.5, 1, 2)), store, tmp_path
    )
    tables = [pd.read_csv(folder / "scaling_laws.csv") for folder in (table.parent, tmp_path)]
    assert len(tables[0]) == 9 + 2 * (~whole.optima.at_edge).sum()
    pd.testing.assert_frame_equal(*(found.drop(columns="seconds") for found in tables), rtol=1e-6)
    laws = json.loads((table.parent / "scaling_laws.json").read_text())
    losses = [budget["loss"] for budget in laws["budgets"]]
    assert losses == pytest.approx(list(whole.optima.loss)) and set(laws["fits"]) == set(
        scaling.NAMES
    )
    names = {path.name for path in table.parent.iterdir() if not path.name.startswith(".")}
    ours = (f"scaling_laws.{end}" for end in ("csv", "json", "png"))
    assert names == {"settings.json", "chosen.json", *ours}


def test_a_sweep_that_is_widened_keeps_its_rate(store, tmp_path):
    options = {"learning_rate": None, "sweep_learning_rates": ()}
    scaling.measure_laws(settings_of(store, **options), store, tmp_path)
    first = pd.read_csv(tmp_path / "scaling_laws.csv")
    wide = settings_of(store, **options, sweep_latents=(8, 16, 32, 64, 128, 256))
    scaling.measure_laws(wide, store, tmp_path)
    both = pd.read_csv(tmp_path / "scaling_laws.csv")
    assert both["learning_rate"].nunique() == 1 and len(both) == 2 * len(first) == 18
    again = both.merge(first, on=["n_latents", "steps"], suffixes=("", "_first"))
    assert (again["loss"] == again["loss_first"]).all()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sweep-latents", 16], "SWEEP_LATENTS and SWEEP_STEPS must be given together"),
        (["--sweep-steps", 16], "SWEEP_LATENTS and SWEEP_STEPS must be given together"),
        (
            ["--sweep-latents", 32, 16, "--sweep-steps", 2],
            "SWEEP_LATENTS must be positive and rise",
        ),
        (["--sweep-latents", 16, "--sweep-steps", 0, 2], "SWEEP_STEPS must be positive and rise"),
        (["--sweep-latents", 16, "--sweep-steps", 2, 2], "SWEEP_STEPS must be positive and rise"),
        (["--sweep-learning-rates", -1, 1], "SWEEP_LEARNING_RATES must be positive and rise"),
        (
            ["--sweep-latents", 8, "--sweep-steps", 2, "--k", 9],
            "SWEEP_LATENTS must be at least K, 9",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(tmp_path, run_here, words, message):
    nowhere = ["--activations-dir", tmp_path / "none", "--autoencoder-dir", tmp_path / "made"]
    refused = run_here("train_autoencoder", *nowhere, "--backend", "torch", *words, check=False)
    assert message in refused.message and not (tmp_path / "made").exists()


@pytest.mark.parametrize("n_sizes", [1, 12])
def test_the_picture_shows_losses_and_what_was_fitted(tmp_path, n_sizes):
    grid = made_up_grid(0.4, 0.6).query("n_latents < 2 ** (4 + @n_sizes)")
    optima = scaling.optimal_sizes(grid).assign(optimal_rate=np.nan, rate_at_edge=None)
    laws = scaling.Laws(grid, optima, scaling.fit_laws(optima))
    scaling.plot_scaling_laws(laws, tmp_path / "laws.png")
    assert share_of(drawn(tmp_path / "laws.png"), ORANGE) > 0.0005
