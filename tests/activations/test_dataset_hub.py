"""Datasets of the hub, from a local server: read as a folder is, pinned, gone on with, retried."""

import gzip
import json
from collections.abc import Iterator

import pytest
import zstandard
from conftest import Flags, make_texts

from tests.dataset_hub import Hub, serving
from tests.tables import write_table
from utils.activations import hub as hub_client
from utils.activations.corpus import BEGINNING, Corpus, Position
from utils.settings import InputError

NAME = "someone/pile"
CARD = "---\nconfigs: [{config_name: en, data_files: [{split: train, path: 'data/*'}]}]\n---\n"


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """The hub that this process asks, with one dataset; failed requests are repeated at once."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_client, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(hub_client, "_retries", hub_client.Counter())
    with serving(NAME) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def compress(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def checked(dataset: object = NAME, begun: str | None = None) -> Corpus:
    corpus = Corpus(str(dataset))
    corpus.check(begun)
    return corpus


def texts_of(corpus: Corpus, start: Position = BEGINNING) -> list[str]:
    return [document.text for document in corpus.documents(start)]


def test_a_dataset_is_read_as_a_folder_of_its_files_is(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_client, "BLOCK", 1_000)
    texts = [f"{text} é" for text, _ in make_texts(40)]
    (tmp_path / "data").mkdir()
    for name, content in {
        "README.md": CARD.encode(),
        "other.jsonl": lines_of(["of no split"]),
        "data/a.jsonl": lines_of(texts),
        "data/b.jsonl.zst": compress(lines_of(texts)),
        "data/c d.json.gz": gzip.compress(json.dumps([{"text": text} for text in texts]).encode()),
        "data/e.txt": "\n".join(texts).encode(),
        "data/empty.jsonl": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    write_table(tmp_path / "data" / "f.parquet", texts, n=list(range(40)))
    hub.commits["abc"] = tmp_path
    corpus, folder = checked(), checked(tmp_path)
    assert corpus.describe().startswith(f"{NAME} is read at revision abc.\nReading 2 .jsonl: data/")
    assert "no split in the card's configuration: other.jsonl" in corpus.describe()
    documents = list(corpus.documents())
    assert [document.text for document in documents] == texts_of(folder)
    assert len(documents) == 4 * 40 + 1 and {one.subset for one in documents} == {NAME}
    for number in (0, 39, 40, 77, 80, 100, 120, 121, 140, 160):
        rest = texts_of(corpus, Position(number, 1, documents[number].place))
        assert rest == [document.text for document in documents[number:]]
    by_rank = [list(corpus.documents(rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(by_rank[0] + by_rank[1], key=lambda one: one.index) == documents
    (tmp_path / "README.md").write_text(CARD.replace("config_name: en", "config_name: de"))
    with pytest.raises(InputError, match="CONFIG of someone/pile@abc must be one of de"):
        Corpus(NAME, "en").check()
    with pytest.raises(InputError, match="An earlier version began to share someone/pile among 2"):
        next(corpus.documents(Position(3, 5), world_size=2))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet", "arrow", "csv"])
def test_no_finished_file_is_fetched_again(hub, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(hub_client, "BLOCK", 2**14)
    texts = [f"text {n * 2654435761 % 2**32}" for n in range(125_000)]
    for number in range(3):
        path, part = tmp_path / f"{number}.{kind}", texts[number * 60_000 :][:60_000]
        if kind in ("parquet", "arrow", "csv"):
            write_table(path, part, rows_a_piece=6_000)
        else:
            path.write_bytes(compress(lines_of(part)) if kind == "jsonl.zst" else lines_of(part))
    hub.commits["abc"] = tmp_path
    documents = checked().documents()
    at = next(document.place for document in documents if document.index == 100_000)
    documents.close()
    hub.sent.clear()
    rest = checked(begun="abc").documents(Position(100_000, 1, at))
    assert [document.text for document in rest] == texts[100_000:]
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    asked = {name: hub.bytes_of(name) for name in sizes}
    assert asked[f"0.{kind}"] == 0
    assert (
        0 < asked[f"1.{kind}"] <= sizes[f"1.{kind}"] * (0.5 if kind in ("jsonl", "parquet") else 1)
    )
    end = 2**16 if kind == "parquet" else 0  # where a table's contents are listed
    assert sizes[f"2.{kind}"] <= asked[f"2.{kind}"] <= sizes[f"2.{kind}"] + end + 2**14


def test_what_fails_for_a_while_is_asked_again(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub_client, "BLOCK", 5_000)
    monkeypatch.setattr("utils.activations.files.CHUNK", 5_000)
    texts = [text for text, _ in make_texts(200)]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    hub.commits["abc"] = tmp_path
    corpus = checked()
    hub.sent.clear()
    hub.faults = [503, "cut", 429]
    assert texts_of(corpus) == texts and not hub.faults
    n_bytes = hub.bytes_of("a.jsonl") - 5_000  # of the one that was cut
    assert n_bytes == (tmp_path / "a.jsonl").stat().st_size
    printed = capsys.readouterr().out
    assert printed.count("Trying again in") == 3
    assert "The hub: HTTP 503. Trying again in 0.001 s (1 of 8)." in printed
    assert hub_client.retries_in_words().startswith("Asked the hub again 3 times: HTTP 503 (1), ")
    hub.faults = [500] * hub_client.N_TRIES
    with pytest.raises(InputError, match=r"someone/pile .* could not be read .*HTTP 500") as error:
        texts_of(corpus)
    hub.faults = [403]
    with pytest.raises(InputError, match=r"(?s)403.*licence.*HF_TOKEN") as error:
        texts_of(corpus)
    assert "hf_secret" not in str(error.value) and error.value.__suppress_context__


def test_a_run_goes_on_with_the_revision_it_began_with(hub, tiny_model, tmp_path, run_here):
    old, new = tmp_path / "old", tmp_path / "new"
    texts = [text for text, _ in make_texts(300)]
    for folder in (old, new):
        folder.mkdir()
        for number in range(3):
            part = lines_of(texts[number * 100 :][:100])
            (folder / f"{number}.jsonl").write_bytes(compress(part) if folder == old else b"new")
            (folder / f"{number}.jsonl").rename(folder / f"{number}.jsonl.zst")
    hub.commits["abc"] = old
    (old / "2.jsonl.zst").rename(tmp_path / "away")
    (old / "2.jsonl.zst").write_bytes((tmp_path / "away").read_bytes()[:-100])
    flags = [*Flags(tmp_path, tiny_model, old).save_activations, "--n-tokens", 10**6]
    hub_flags = [*flags, "--dataset", NAME, "--activations-dir", tmp_path / "hub"]
    ended = run_here("save_activations", *hub_flags, check=False)
    assert "2.jsonl.zst ends in the middle" in ended.message
    begun = json.loads((tmp_path / "hub" / "manifest.json").read_text())
    assert begun["dataset_revision"] == "abc" and begun["position"][2][0] > 0

    (tmp_path / "away").rename(old / "2.jsonl.zst")
    hub.commits["def"] = new
    hub.sent.clear()
    printed = run_here("save_activations", *hub_flags).stdout
    assert "is read at revision abc" in printed and "holds" in printed
    assert {sent.commit for sent in hub.sent} == {"abc"} and hub.bytes_of("0.jsonl.zst") == 0
    for path in old.iterdir():
        assert hub.bytes_of(path.name) <= path.stat().st_size
    run_here("save_activations", *flags, "--dataset", old, "--activations-dir", tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "hub" / path.name).read_bytes(), path.name

    del hub.commits["abc"]
    message = run_here("save_activations", *hub_flags, check=False).message
    assert "revision abc of someone/pile, which is gone from the hub" in message
    assert "Delete ACTIVATIONS_DIR" in message
