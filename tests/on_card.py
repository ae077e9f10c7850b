"""On a graphics card: what the CPU gives, and no wait within a round; run by test_card.py."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCRIPTS, Flags
from on_backend import stand_in_for_store

import train_autoencoder
from utils.activations.batches import ShuffledBatches
from utils.activations.store import ActivationStore
from utils.activations.torch_pools import AHEAD, DevicePool
from utils.artifacts import read_json
from utils.autoencoder import recorded, training
from utils.autoencoder.callbacks import Rounds
from utils.autoencoder.kernels import AdamStep, Trained, plain_step
from utils.autoencoder.kinds import KINDS
from utils.settings import read_settings

if not torch.cuda.is_available():
    pytest.skip("needs a graphics card", allow_module_level=True)

BATCH, D_MODEL, STEPS = 64, 32, 12
HAVE_AUXK = {"topk", "batch_topk", "matryoshka"}
WARM = 4  # steps of a round, at its start, in which libraries may set themselves up


@pytest.fixture
def no_waits():
    """What makes any wait for the card an error while a round's batches are taken."""

    def watched(rows: torch.Tensor):
        for step in itertools.count():
            is_within = WARM <= step % STEPS < STEPS - 1
            torch.cuda.set_sync_debug_mode("error" if is_within else "default")
            yield rows

    yield watched
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_a_round_waits_for_the_card(tmp_path, no_waits, kind, moments):
    rows = torch.randn(BATCH, D_MODEL, generator=torch.Generator().manual_seed(0))
    words = f"--kind {kind} --n-latents 256 --k 2 --moments-dtype {moments}"
    words += f" --dead-after {STEPS * BATCH}"  # so that AuxK is at work in the second round
    settings = read_settings(train_autoencoder, words.split())
    rounds = Rounds(2, STEPS)
    autoencoder = training.build(settings, stand_in_for_store(rows.numpy()), rounds.total_steps)
    data = training.TrainingData(lambda step: no_waits(rows.cuda()), rows[:8].numpy(), BATCH)
    training.train(autoencoder, data, rounds, tmp_path, 5)
    assert int(autoencoder.step) == rounds.total_steps


@pytest.mark.parametrize("are_dead", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_replayed_is_the_step(kind, are_dead):
    rows = torch.randn(BATCH, D_MODEL, generator=torch.Generator().manual_seed(0)).cuda()
    settings = read_settings(train_autoencoder, f"--kind {kind} --n-latents 256 --k 2".split())
    autoencoder = training.build(settings, stand_in_for_store(rows.cpu().numpy()), 100)
    autoencoder.idle_tokens.assign(np.arange(256) % 2 * are_dead * autoencoder.dead_after)
    autoencoder.look_for_dead()
    assert autoencoder.may_revive == (are_dead and kind in HAVE_AUXK)
    recorder, made = recorded.Recorder(), []

    def replayed(batch):
        return recorder.run(autoencoder._gradients, batch, autoencoder.may_revive)

    state = [*autoencoder.weights, *autoencoder.metrics_variables]
    weights = [variable.value for variable in state]
    begun = [weight.detach().clone() for weight in weights]
    for step in range(recorded.WARM_UP + 3):
        for run in (autoencoder._gradients, replayed):
            with torch.no_grad():
                for weight, value in zip(weights, begun, strict=True):
                    weight.copy_(value + step * 1e-3 if value.is_floating_point() else value)
            gradients, metrics = run(rows.roll(step, 1) * (1 + step))
            made.append([*gradients, *metrics.values(), *weights])
            made[-1] = [one.detach().clone().to_dense() for one in made[-1] if one is not None]
        for one, other in zip(*made[-2:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    (recording,) = recorder._recordings.values()
    assert isinstance(recording, recorded.Recording)
    assert not torch.equal(made[-1][0], made[-3][0])


def test_a_step_takes_arrays_of_the_host():
    rows = np.random.default_rng(0).normal(size=(BATCH, D_MODEL)).astype(np.float32)
    settings = read_settings(train_autoencoder, "--k 2 --n-latents 256".split())
    autoencoder = training.build(settings, stand_in_for_store(rows), 100)
    losses = []
    for _ in range(2 * recorded.WARM_UP):
        losses.append(float(autoencoder.train_on_batch(rows, return_dict=True)["loss"]))
    assert losses[-1] < losses[0]
    assert isinstance(*autoencoder.recorder._recordings.values(), recorded.Recording)


def test_a_training_replays_its_steps(tmp_path, monkeypatch):
    rows = torch.randn(BATCH, D_MODEL, generator=torch.Generator().manual_seed(0))
    settings = read_settings(train_autoencoder, f"--k 2 --dead-after {STEPS * BATCH}".split())
    replay, replayed = recorded.Recording.replay, []

    def counted(recording, batch):
        replayed.append(id(recording))
        return replay(recording, batch)

    monkeypatch.setattr(recorded.Recording, "replay", counted)
    rounds = Rounds(3, STEPS)
    autoencoder = training.build(settings, stand_in_for_store(rows.numpy()), rounds.total_steps)
    batches = (rows.cuda() for _ in itertools.count())
    data = training.TrainingData(lambda step: batches, rows.numpy(), BATCH)
    training.train(autoencoder, data, rounds, tmp_path, 5)
    assert len(replayed) == rounds.total_steps - 2 * recorded.WARM_UP
    assert len(set(replayed)) == 2  # without AuxK, and with it
    assert not autoencoder.recorder._recordings


@pytest.mark.parametrize("is_unit", [True, False])
@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("shape", [(4_096, 3_072), (512, 576), (33, 20)])
def test_tritons_kernels_are_the_plain_form(is_unit, is_sparse, shape):
    pytest.importorskip("triton")
    from utils.autoencoder.triton_kernels import adam_step

    draw = torch.Generator("cuda").manual_seed(0)
    weight, gradient, momentum = torch.randn(3, *shape, generator=draw, device="cuda")
    weight = torch.nn.functional.normalize(weight)
    velocity = torch.rand(shape, generator=draw, device="cuda") / 100
    if is_sparse:
        numbers = torch.randint(len(weight), (1, len(weight) // 2), generator=draw, device="cuda")
        gradient = torch.sparse_coo_tensor(numbers, gradient[: numbers.shape[1]], shape)
    ends = []
    for make_step in (plain_step, adam_step):
        one = Trained(weight.clone(), gradient.clone(), momentum.clone(), velocity.clone(), is_unit)
        make_step([one], AdamStep(3, 0.01, 0.9, 0.999, 1e-7, 1.0))
        ends.append((one.weight, one.momentum, one.velocity))
    for plain, fused in zip(*ends, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_script, tiny_model, tiny_text):
    """The folders of the four scripts run on the card, and on the CPU."""
    folders = {}
    for name, visible in (("card", None), ("cpu", "")):
        folder = tmp_path_factory.mktemp(name)
        flags, changes = Flags(folder, tiny_model, tiny_text), {}
        if visible is not None:
            changes["CUDA_VISIBLE_DEVICES"] = visible
        flags.train_autoencoder += ["--selection-dtype", "float32", "--pool-gib", 0.5]
        for script in SCRIPTS:
            run_script(script, *getattr(flags, script), **changes)
        folders[name] = folder
    return folders


def test_the_scripts_give_what_they_give_on_a_cpu(runs):
    card, cpu = (ActivationStore(runs[name] / "activations") for name in ("card", "cpu"))
    assert card.n_tokens == cpu.n_tokens
    rows = [store.kept_rows(range(64)).astype(np.float32) for store in (card, cpu)]
    np.testing.assert_allclose(*rows, rtol=0, atol=1e-2 * np.abs(rows[1]).max())
    trained = [read_json(runs[name] / "autoencoder" / "metrics.json") for name in runs]
    fvu = [metrics["fvu"] for metrics in trained]
    assert fvu[0] == pytest.approx(fvu[1], rel=0.05)
    tables = [pd.read_parquet(runs[name] / "analysis" / "features.parquet") for name in runs]
    assert np.corrcoef(*(table["frequency"] for table in tables))[0, 1] > 0.95


def test_the_pass_counts_what_it_counts_on_a_cpu(runs, monkeypatch):
    from utils.autoencoder.saved import open_autoencoder
    from utils.features import feature_pass
    from utils.steering.feature_model import ActiveFeatures, FeatureEncoder

    store = ActivationStore(runs["card"] / "activations")
    autoencoder, _ = open_autoencoder(runs["card"] / "autoencoder", store)
    encoder, found = FeatureEncoder(autoencoder), []

    class OnCpu:
        """Encodes on the card, and leaves counting to the CPU."""

        n_latents = encoder.n_latents

        def active_tensors(self, rows):
            return ActiveFeatures(*(values.cpu() for values in encoder.active_tensors(rows)))

    for counting in (encoder, OnCpu()):
        if counting is not encoder:
            monkeypatch.setattr(feature_pass, "pick_device", lambda: torch.device("cpu"))
        one = feature_pass.FeaturePass(counting, store, seed=0)
        one.run(range(200), 512)
        found.append((one.statistics(), one.examples()))
    for counted, expected in zip(*found, strict=True):
        for name, values in expected.items():
            if np.asarray(values).dtype.kind in "iufb":
                np.testing.assert_allclose(counted[name], values, rtol=1e-5, err_msg=name)


def test_a_pool_on_the_card_gives_the_batches_of_one_on_the_host(runs):
    store = ActivationStore(runs["card"] / "activations")
    on_host, on_card = (
        ShuffledBatches(store, range(store.n_contexts), 64, 0, 0.0002, device).from_step(3)
        for device in (None, "cuda")
    )
    for expected, batch in itertools.islice(zip(on_host, on_card, strict=True), 300):
        assert batch.is_cuda
        assert np.array_equal(batch.cpu().numpy(), expected)


def test_the_host_is_not_far_ahead_of_the_card():
    pool = DevicePool((64, 8), np.dtype(np.float16), "cuda")
    events = []
    for _ in range(6):
        pool.new_batch(8)
        torch.cuda._sleep(10**8)  # cycles: about a twentieth of a second
        events.append(torch.cuda.Event())
        events[-1].record()
        assert sum(not event.query() for event in events) <= AHEAD + 1
    assert not events[-1].query()  # the card was behind all the time


def test_extraction_copies_beside_the_model(tmp_path):
    from utils.activations.capture import HostCopies

    copies = HostCopies(torch.device("cuda"))
    tensors = {str(n): torch.randn(1_000, 1_000, device="cuda") for n in range(20)}
    captured = [copies.download({name: tensor}) for name, tensor in tensors.items()]
    for one, tensor in zip(captured, tensors.values(), strict=True):
        (array,) = one.arrays().values()
        assert np.array_equal(array, tensor.cpu().numpy())
        assert next(iter(one.tensors.values())).is_pinned()
    tokens = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(copies.upload(tokens).cpu().numpy(), tokens)


def test_candidates_of_bfloat16_hold_the_largest():
    from utils.autoencoder.sparse import exact_top_latents, fastest_dtype, top_latents

    assert fastest_dtype() == "bfloat16"
    draw = torch.Generator("cuda").manual_seed(0)
    x, rows = (torch.randn(n, 768, generator=draw, device="cuda") for n in (512, 16_384))
    biases = 0.1 * torch.randn(16_384, generator=draw, device="cuda")
    x += 5 * torch.randn(768, generator=draw, device="cuda")  # a mean that all rows share
    rows = torch.nn.functional.normalize(rows)
    values, indices = exact_top_latents(x, rows, biases, 64)
    expected, whose = top_latents(x, rows, biases, 64)
    torch.testing.assert_close(values.sort(1).values, expected.sort(1).values, rtol=0, atol=1e-3)
    same = (indices.sort(1).values == whose.sort(1).values).all(1)
    assert same.float().mean() > 0.99  # the others are ties within rounding


def test_what_cannot_be_recorded_is_run_as_it_is(capsys, monkeypatch):
    """The last here, for PyTorch is not as it was afterwards."""
    monkeypatch.setattr(recorded.Recorder, "can_record", True)
    recorder, stream = recorded.Recorder(), torch.cuda.current_stream()
    ones = torch.ones(3, device="cuda")

    def double(batch):
        return 2 * batch

    for step in range(2 * recorded.WARM_UP):
        assert recorder.run(double, step * ones, "doubled").tolist() == 3 * [2 * step]
    assert isinstance(*recorder._recordings.values(), recorded.Recording)
    for _ in range(2 * recorded.WARM_UP):
        assert recorder.run(lambda batch: float(batch.sum()), ones, "read") == 3
    assert recorder.run(double, ones, "doubled").tolist() == [2, 2, 2]
    assert list(recorder._recordings.values()) == [None, None]
    assert torch.cuda.current_stream() == stream
    assert "Steps cannot be recorded here" in capsys.readouterr().out
