"""A finished autoencoder to the hub and back, over a server with its interface."""

import json
import shutil
import zipfile
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hand_set import array
from hub_server import Hub, Repository, reach, serving

from utils.activations.store import ActivationStore
from utils.artifacts import write_json
from utils.autoencoder.formats import own
from utils.autoencoder.formats.source import Source
from utils.autoencoder.formats.sparsify import WEIGHTS as SPARSIFY_WEIGHTS
from utils.autoencoder.kinds import KINDS
from utils.autoencoder.saved import load_autoencoder, save_autoencoder

TOKEN = "hf_NeverShownAnywhere0123456789"
NAME = "me/topk-of-tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_run) -> SimpleNamespace:
    """A copy of a finished training, a TopK, with its flags, and the activations' folder."""
    folder = tmp_path_factory.mktemp("hub") / "autoencoder"
    shutil.copytree(tiny_run.folder / "autoencoder", folder)
    flags = [*tiny_run.flags.train_autoencoder, "--autoencoder-dir", folder]
    return SimpleNamespace(folder=folder, flags=flags, activations=tiny_run.folder / "activations")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(Hub(TOKEN)) as hub:
        reach(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def push(trained, run_here) -> Callable[..., SimpleNamespace]:
    def push(*flags: object, name: str = NAME, check: bool = True):
        asked = ("--push-to-hub", name, *flags)
        return run_here("train_autoencoder", *trained.flags, *asked, check=check)

    return push


@pytest.fixture
def take(trained, run_here, tmp_path) -> Callable[..., SimpleNamespace]:
    """Import a repository into a new folder of ``tmp_path``."""

    def take(folder: str, name: str = NAME, check: bool = True):
        return run_here(
            "train_autoencoder", "--import-from", name, "--activations-dir",
            trained.activations, "--autoencoder-dir", tmp_path / folder,
            "--backend", "torch", check=check,
        )  # fmt: skip

    return take


def test_a_dry_run_lists_what_there_is_to_upload(trained, push, hub):
    printed = push().stdout
    assert hub.requests == []
    assert f"For {NAME} on the hub (private), " in printed
    files = {line.split()[0] for line in printed.splitlines() if line.startswith("  ")}
    own = {"autoencoder.keras", "settings.json", "metrics.json", "training_curves.png", "README.md"}
    saelens = {"saelens/cfg.json", "saelens/sae_weights.safetensors"}
    sparsify = {"layers.1/cfg.json", f"layers.1/{SPARSIFY_WEIGHTS}"}
    assert own | saelens | sparsify <= files
    assert "same command with --no-dry-run" in printed
    card = (trained.folder / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: saelens\n") and "license" not in card
    assert "| kind | topk, k = 4 |" in card and "| size | 128 latents, d_model 32 |" in card
    assert f'SAE.from_pretrained("{NAME}", "saelens")' in card
    assert f'SparseCoder.load_from_hub("{NAME}", "layers.1")' in card
    assert f"python train_autoencoder.py --import-from {NAME}" in card
    assert str(trained.folder.parent) not in card  # nor any path of this machine
    assert (
        str(trained.folder.parent)
        not in (trained.folder / "hub" / "saelens" / "cfg.json").read_text()
    )


def test_there_and_back_it_is_the_same_function(trained, push, take, hub, tmp_path):
    printed = push("--no-dry-run").stdout
    assert f"Uploaded to {hub.url}/{NAME}." in printed
    repository = hub.repositories[NAME]
    assert repository.private
    folder = trained.folder
    assert repository.files["autoencoder.keras"] == (folder / "autoencoder.keras").read_bytes()

    n_stored = hub.count("PUT /stored/")
    push("--no-dry-run")  # goes on where one before stopped: here, at the end
    assert hub.count("PUT /stored/") == n_stored > 0

    printed += take("there").stdout
    rows = ActivationStore(trained.activations).kept_rows(range(20)).astype(np.float32)
    made, back = (
        load_autoencoder(one / "autoencoder.keras") for one in (folder, tmp_path / "there")
    )
    np.testing.assert_array_equal(array(made.encode(rows)), array(back.encode(rows)))
    np.testing.assert_array_equal(array(made(rows)), array(back(rows)))
    assert "(its source states " in printed

    fetched = f"GET /{NAME}/resolve/"
    n_fetched = hub.count(fetched)
    take("again")
    assert hub.count(fetched) == n_fetched > 0  # from the cache

    files = [path for root in (trained.folder, tmp_path) for path in root.rglob("*")]
    assert [path for path in files if path.is_file()]
    assert TOKEN not in printed
    assert not [path for path in files if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_no_path_of_this_machine_is_uploaded(
    trained, push, hub, tmp_path, tmp_path_factory, run_here
):
    push("--no-dry-run")
    (tmp_path / "held").mkdir()
    for file, content in hub.repositories[NAME].files.items():
        if "/" not in file:
            (tmp_path / "held" / file).write_bytes(content)
    run_here(
        "train_autoencoder", "--import-from", tmp_path / "held", "--activations-dir",
        trained.activations, "--autoencoder-dir", tmp_path / "imported", "--backend", "torch",
        "--push-to-hub", "me/imported", "--no-dry-run",
    )  # fmt: skip
    here = str(tmp_path_factory.getbasetemp()).encode()
    for repository in hub.repositories.values():
        assert not [file for file, content in repository.files.items() if here in content]
    said = json.loads(hub.repositories["me/imported"].files["metrics.json"])
    assert (said["model_name"], said["imported"]["source"]) == ("tiny", "held")


def test_a_token_that_may_only_read(push, hub):
    hub.is_read_only = True
    ended = push("--no-dry-run", check=False)
    assert "This token may only read The token may not write there" in ended.message


def test_standardised_tokens_come_back(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    made = KINDS["topk"](d_model=12, n_latents=24, k=3, standardize_tokens=True)
    made.initialize(0.8, np.ones(12), np.zeros(12), 0.5, seed=0)
    save_autoencoder(made, tmp_path / "autoencoder.keras")
    facts = {"model_name": "m", "layer": 1, "l0": 3.0, "fvu": 0.1}
    write_json(tmp_path / "metrics.json", facts)
    back = own.read(Source(str(tmp_path)), own.HOOKPOINT).build()
    np.testing.assert_array_equal(array(made(rows)), array(back(rows)))


def test_what_broke_off_goes_on(push, hub):
    hub.is_broken = True
    ended = push("--no-dry-run", check=False)
    assert ended.message.startswith(f"\ntrain_autoencoder.py: Cannot upload to {NAME}: ")
    assert TOKEN not in ended.message + ended.stdout
    hub.is_broken = False
    push("--no-dry-run")
    assert "autoencoder.keras" in hub.repositories[NAME].files


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("topk", [], "must be the name of a repository, owner/name"),
        ("a/b/c", [], "must be the name of a repository, owner/name"),
        ("you/topk", ["--no-dry-run"], "one of its organisations, me, lab; the owner of you/topk"),
        ("lab/open", ["--no-dry-run"], "The repository lab/open is public already."),
    ],
)
def test_a_repository_that_cannot_be_written(push, hub, name, flags, says):
    hub.repositories["lab/open"] = Repository(private=False)
    ended = push(*flags, name=name, check=False)
    assert says in ended.message
    assert not hub.repositories["lab/open"].files and len(hub.repositories) == 1


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "PUSH_TO_HUB needs a token that may write"), ("hf_Other0", "does not know the token")],
)
def test_a_token_that_is_missing_or_wrong(push, hub, monkeypatch, token, says):
    monkeypatch.setenv("HF_TOKEN", token)
    ended = push("--no-dry-run", check=False)
    assert says in ended.message and "hf_Other0" not in ended.message + ended.stdout


def test_a_repository_that_cannot_be_read(push, take, hub, monkeypatch):
    push("--no-dry-run")
    assert "Cannot load me/none: " in take("none", "me/none", check=False).message
    hub.repositories[NAME].gated = True
    gated = take("gated", check=False).message
    assert "If it is gated, accept its licence" in gated
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody's
    offline = take("offline", check=False).message
    assert "http://127.0.0.1:9, cannot be reached" in offline
    assert "cannot be reached" in push("--no-dry-run", check=False).message
    assert TOKEN not in gated + offline


def test_a_repository_of_ours_is_read_without_running_what_it_names(push, take, hub, tmp_path):
    """Its configuration may name any class of Keras; only a kind's options are taken from it."""

    push("--no-dry-run")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in ("metrics.json", "autoencoder.keras"):
        (wrong / file).write_bytes(hub.repositories[NAME].files[file])
    with zipfile.ZipFile(wrong / "autoencoder.keras") as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(held["config.json"])
    config["registered_name"] = "Functional"
    with zipfile.ZipFile(wrong / "autoencoder.keras", "w") as archive:
        for name, content in (held | {"config.json": json.dumps(config).encode()}).items():
            archive.writestr(name, content)
    assert "it holds a Functional" in take("taken", wrong, check=False).message
    shutil.rmtree(wrong)
