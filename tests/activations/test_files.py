"""Tables of records: parquet, arrow and comma-separated files, and the folders they lie in."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from tests.tables import write_table
from utils.activations.corpus import Corpus
from utils.activations.files import read_records
from utils.settings import InputError

TEXTS = [
    "The first.",
    'A "second" one, é and 日本.',
    "line one\nline two\r\n\n",
    "4",
    "x" * 300_000,
]


NAMES = ["a.parquet", "a.arrow", "file.arrow", "a.csv", "a.tsv"]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_read_from_any_row_on(tmp_path, name):
    texts = [*TEXTS, *(f"row {n}" for n in range(30))]
    path = write_table(tmp_path / name, texts, other=list(range(35)))
    for start in (0, 1, 4, 6, 7, 8, 34, 35):
        rows = list(read_records(path, "text", start))
        assert rows == [(n, {"text": texts[n]}) for n in range(start, 35)]
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed" / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for dataset in (path, packed, tmp_path / "packed"):
        assert _texts(dataset) == texts


def _texts(dataset: Path) -> list[str]:
    parts = Corpus(str(dataset)).documents()
    texts: dict[int, str] = {}
    for part in parts:
        texts[part.index] = texts.get(part.index, "") + part.text
    return list(texts.values())


@pytest.mark.parametrize("name", ["pile.parquet", "pile.arrow"])
def test_the_subset_is_that_of_the_record(tmp_path, name):
    metas = [{"pile_set_name": "Github"}] * 2 + [None] * 2
    path = write_table(tmp_path / name, TEXTS[:4], meta=metas)
    subsets = [document.subset for document in Corpus(str(path)).documents()]
    assert subsets == ["Github", "Github", "pile", "pile"]


@pytest.mark.parametrize("name", NAMES)
def test_without_the_column_those_there_are_are_named(tmp_path, name):
    path = write_table(tmp_path / name, TEXTS)
    with pytest.raises(InputError, match=r"must have a column body; it has text\. Choose one with"):
        Corpus(str(path), column="body").check()


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_table(tmp_path, name):
    path = write_table(tmp_path / name, [*TEXTS, '"'])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if "sv" not in name else content[:-3])
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        _texts(path)


def test_a_comma_separated_file_must_be_utf_8(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nné\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.csv must be UTF-8 .* iconv"):
        _texts(tmp_path / "a.csv")


def test_a_row_with_too_few_fields_has_no_text(tmp_path):
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2\n3,three\n")
    corpus = Corpus(str(tmp_path))
    assert [document.text for document in corpus.documents()] == ["one", "three"]
    assert corpus.skipped == {"without a text": 1}


def test_tables_beside_texts_are_about_them(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    (tmp_path / "metadata.csv").write_text("file,licence\na.jsonl,MIT\n")
    corpus = Corpus(str(tmp_path))
    corpus.check()
    assert [document.text for document in corpus.documents()] == ["a"]
    assert "Not reading 1 tables beside other files: metadata.csv" in corpus.describe()


def test_what_the_datasets_library_saved(tmp_path):
    """A folder of `save_to_disk`, with its splits."""
    splits = {name: datasets.Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        corpus = Corpus(str(tmp_path / "saved"), split=split)
        assert [path.parent.name for path in corpus.files] == [split]
    assert _texts(tmp_path / "saved") == TEXTS
    assert _texts(tmp_path / "saved" / "test") == TEXTS
