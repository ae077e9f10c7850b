"""Tables of records: parquet, arrow and comma-separated files, and the folders they lie in."""

import gzip
import json

import datasets
import pytest

from tests.tables import texts_of, write_table
from utils.activations import files
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
        assert texts_of(dataset) == texts


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


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_damaged_table(tmp_path, name):
    path = write_table(tmp_path / name, TEXTS)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        texts_of(path)


def test_rows_that_are_not_utf_8_are_counted(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\none\nné\nthree\n".encode("latin-1"))
    corpus = Corpus(str(tmp_path))
    assert [document.text for document in corpus.documents()] == ["one", "three"]
    assert corpus.skipped == {"not Unicode": 1}


def test_ends_of_lines_and_stray_marks(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'text\tn\rHe said "no"\t1\r"Yes" she said\t2\r')
    assert texts_of(tmp_path) == ['He said "no"', "Yes she said"]


def test_a_quotation_mark_that_is_not_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_FIELD", 1_000)
    (tmp_path / "a.csv").write_text('text\none\n"two\n' + "three\n" * 1_000)
    with pytest.raises(InputError, match=r"a row that cannot be read .* line \d+\. Look for a quo"):
        texts_of(tmp_path)


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\n1,2\n")
    with pytest.raises(InputError, match=r"a\.csv must have one column text; it has several"):
        Corpus(str(tmp_path)).check()


def test_a_large_batch_of_an_arrow_file_is_taken_in_parts(tmp_path):
    path = write_table(tmp_path / "a.arrow", [str(n) for n in range(1_000)], rows_a_piece=1_000)
    first = next(files._arrow_batches(path, path.open("rb"), 0, "text"))[1]
    assert len(first) == files.TOGETHER
    assert [n for n, _ in read_records(path, "text", 700)] == list(range(700, 1_000))


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
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "a"}))
    with pytest.raises(InputError, match=r"If the texts are in .*metadata\.csv, move the other"):
        texts_of(tmp_path)


def test_what_the_datasets_library_saved(tmp_path):
    """A folder of `save_to_disk`, with its splits."""
    splits = {name: datasets.Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        corpus = Corpus(str(tmp_path / "saved"), split=split)
        assert [path.parent.name for path in corpus.files] == [split]
    assert texts_of(tmp_path / "saved") == TEXTS
    assert texts_of(tmp_path / "saved" / "test") == TEXTS
    saved = datasets.load_from_disk(tmp_path / "saved")["train"]
    saved.map(lambda row: {"text": row["text"][::-1]}, load_from_cache_file=False)
    saved.shuffle(seed=0)  # both leave caches beside the data
    assert len(list((tmp_path / "saved" / "train").glob("cache-*.arrow"))) == 2
    assert texts_of(tmp_path / "saved") == TEXTS


def test_a_split_is_chosen_before_tables_are_left_out(tmp_path):
    write_table(tmp_path / "train.csv", TEXTS)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "of the test"}))
    assert texts_of(tmp_path) == TEXTS
