"""Sources on the hub: a local server with its interface, gated and missing ones, no network."""

from collections.abc import Iterator

import huggingface_hub
import numpy as np
import pytest
from full_disk import small_disk
from hand_set import array
from hub_server import Hub, Repository, reach, serving
from test_layouts import dl_batch_topk, rows_of

from utils.autoencoder.formats.importing import find
from utils.autoencoder.formats.source import Source
from utils.settings import FULL, InputError, disk_error

NAME = "owner/saes"
TOKEN = "hf_not-to-be-shown"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with `NAME`, private, of two autoencoders, and with a gated repository."""
    folder, draw = tmp_path / "repository", np.random.default_rng(0)
    rows = rows_of(draw)
    for layer in (3, 7):
        expected = dl_batch_topk(folder / f"layer_{layer}", draw, rows)
    with serving(Hub(TOKEN)) as hub:
        hub.repositories = {name: Repository(private=True) for name in (NAME, "owner/gated")}
        hub.repositories["owner/gated"].gated = True
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        for repository in hub.repositories.values():
            repository.files = {"README.md": b"# Two", **files}
        reach(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        hub.rows, hub.expected = rows, expected
        yield hub


def test_of_a_repository_only_what_is_read_is_fetched(hub):
    source = Source(NAME)
    assert source.revision == hub.repositories[NAME].commit and "README.md" in source.files
    with pytest.raises(InputError, match="one of the 2 that owner/saes holds: layer_3, layer_7"):
        find(source, None)
    assert not hub.fetched()
    made = find(source, "layer_7").build()
    np.testing.assert_allclose(array(made.encode(hub.rows)), hub.expected[0], rtol=1e-5, atol=1e-5)
    assert hub.fetched() == {"layer_7/ae.pt", "layer_7/config.json"}


def test_without_a_network_what_was_fetched_is_read(hub, monkeypatch):
    find(Source(NAME), "layer_7")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    source = Source(NAME)
    assert (
        source.files == ["layer_7/ae.pt", "layer_7/config.json"]
        and source.revision == hub.repositories[NAME].commit
    )
    assert find(source, None).kind == "batch_topk"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"owner/other is no folder here, .* cannot be reached"):
        Source("owner/other")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/nothing", "Cannot load owner/nothing: 404"),
        ("owner/gated", r"If it is gated, accept its licence at .*owner/gated.* is set now"),
    ],
)
def test_what_cannot_be_read_is_said_without_the_token(hub, name, says):
    with pytest.raises(InputError, match=rf"(?s){says}") as raised:
        find(Source(name), "layer_7")
    assert TOKEN not in str(raised.value) and raised.value.__suppress_context__


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_goes_up_as_it_is(hub, tmp_path):
    source = Source(NAME)
    with small_disk(tmp_path / "cache", 8_192, 4_096), pytest.raises(OSError) as raised:
        find(source, "layer_7")
    assert disk_error(raised.value).errno in FULL
