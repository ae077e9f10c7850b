"""The corpus: every format, bad input, ranks, and going on from any place."""

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.tables import texts_of
from utils.activations.corpus import LONGEST, Corpus, Position
from utils.activations.files import type_of
from utils.activations.manifest import FURTHER, MOST_SUBSETS, SubsetNumbers
from utils.settings import InputError

TEXTS = ["The first.", "A second one, é and 日本.", "line one\nline two", "4"]


def json_line(text: object, **fields: object) -> bytes:
    return json.dumps({"text": text, **fields}).encode() + b"\n"


def plain(corpus: Corpus) -> list[tuple[int, str, str]]:
    """(index, text, subset) of each document."""
    groups = itertools.groupby(corpus.documents(), lambda part: (part.index, part.subset))
    return [(index, "".join(part.text for part in parts), name) for (index, name), parts in groups]


def compress(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


# Formats -------------------------------------------------------------------------------------


def test_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"".join(json_line(text) for text in TEXTS))
    assert plain(Corpus(str(path))) == [(n, text, "mine") for n, text in enumerate(TEXTS)]
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert texts_of(path) == TEXTS


def test_jsonl_zst_with_the_piles_meta(tmp_path):
    path = tmp_path / "00.jsonl.zst"
    records = json_line("a", meta={"pile_set_name": "ArXiv"}) + json_line("b", meta=None)
    path.write_bytes(compress(records))
    subsets = [document.subset for document in Corpus(str(path)).documents()]
    assert subsets == ["ArXiv", "00"]


def test_zst_of_several_frames_longer_than_a_chunk(tmp_path):
    texts = [np.random.default_rng(n).bytes(300_000).hex() for n in range(8)]
    frames = [compress(json_line(text)) for text in texts]
    skippable_frame = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path = tmp_path / "big.jsonl.zst"
    path.write_bytes(skippable_frame + b"".join(frames))
    assert texts_of(path) == texts


def test_folder_is_read_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_bytes(json_line("first"))
    (tmp_path / "sub" / "c.jsonl.zst").write_bytes(compress(json_line("third")))
    (tmp_path / "notes.md").write_text("not read")
    assert texts_of(tmp_path) == ["first", "second", "third"]


RECORDS = [{"text": text} for text in TEXTS]
LINES = b"".join(json_line(text) for text in TEXTS)
CONTENTS = {
    "A.JSONL": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "list.json": json.dumps(RECORDS).encode(),
    "indented.json": b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=2).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "members.Json.GZ": gzip.compress(LINES[:90]) + gzip.compress(LINES[90:]) + bytes(600),
    "list.json.zst": compress(json.dumps(RECORDS).encode()),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_types_of_file(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENTS[name])
    stem = name.split(".")[0]
    for dataset in (tmp_path, tmp_path / name):
        subset = tmp_path.name if dataset == tmp_path else stem
        assert plain(Corpus(str(dataset))) == [(n, text, subset) for n, text in enumerate(TEXTS)]


def test_one_document_and_compressed_files_that_are_read_whole(tmp_path):
    text = "é" * 2**20  # longer than a chunk
    (tmp_path / "a.json").write_text(json.dumps({"text": text}, indent=1))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.TXT.zst").write_bytes(compress(text.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "d")
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress((tmp_path / "d").read_bytes()))
    assert texts_of(tmp_path) == [text] * 4


def test_what_is_not_read_is_said(tmp_path):
    for name in ("README.txt", "LICENSE-MIT.txt", "license_texts.jsonl", "readmes.txt", "x.md",
                 ".hidden.txt", "en/a.jsonl.gz", "en/.cache/b.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(json_line(name))
    (tmp_path / "en" / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "loop").symlink_to(tmp_path)
    corpus = Corpus(str(tmp_path))
    assert sum(1 for _ in corpus.documents()) == len(TEXTS) + 2
    assert corpus.describe().split("\n") == [
        "Reading 1 .jsonl.gz: en/a.jsonl.gz",
        "Reading 1 .jsonl: license_texts.jsonl",
        "Reading 1 .txt: readmes.txt",
        "Not reading 2 hidden: .hidden.txt, en/.cache/b.jsonl",
        "Not reading 2 READMEs or licences: LICENSE-MIT.txt, README.txt",
        "Not reading 2 of another type: loop, x.md",
    ]
    assert len(texts_of(tmp_path / "README.txt")) == len(texts_of(tmp_path / ".hidden.txt")) == 1


CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: ["en/part-*.jsonl"]
  - split: test
    path: en/held.jsonl
- config_name: de
  data_dir: de
---
# A dataset
"""


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset's folder of two languages, each of two splits, and an extra file."""
    for name in ("en/part-0.jsonl", "en/part-1.jsonl", "en/held.jsonl", "de/train.jsonl",
                 "de/test.jsonl", "extra.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_line(name))
    return tmp_path


def test_the_cards_configurations_and_splits(dataset):
    (dataset / "README.md").write_text(CARD)
    for options, names in (
        (("en",), ["en/part-0.jsonl", "en/part-1.jsonl"]),
        (("en", "test"), ["en/held.jsonl"]),
        (("de",), ["de/train.jsonl"]),
        (("de", "test"), ["de/test.jsonl"]),
    ):
        corpus = Corpus(str(dataset), *options)
        assert [document.text for document in corpus.documents()] == names
        assert list(corpus.sizes()) == names
        # It is what the hub's library reads.
        config, split = (*options, "train")[:2]
        rows = datasets.load_dataset(str(dataset), config, split=split, streaming=True)
        assert [row["text"] for row in rows] == names
    assert "Not reading 1 of the split train: de/train.jsonl" in corpus.describe()
    assert "Not reading 4 of no split in the card's configuration: en/held" in corpus.describe()
    parts = ["en/part-0.jsonl", "en/part-1.jsonl"]
    (dataset / "README.md").write_text(
        "---\nconfigs: [{config_name: a, data_dir: , data_files: [{path: en/part-*}]}]\n---\n"
    )
    assert list(Corpus(str(dataset)).sizes()) == parts
    (dataset / "README.md").write_text("---\nconfigs: [{data_files: [{split: a}]}]\n---\n")
    with pytest.raises(InputError, match="must name a path for each"):
        Corpus(str(dataset), None, "a")
    (dataset / "README.md").write_text(CARD)
    for options, message in (
        ((), r"has several configurations: en, de\. Choose one with CONFIG"),
        (("fr",), r"CONFIG of .* must be one of en, de; it is 'fr'"),
        (("en", "dev"), r"SPLIT of .* must be one of train, test; it is 'dev'"),
    ):
        with pytest.raises(InputError, match=message):
            Corpus(str(dataset), *options)
    (dataset / "README.md").write_text(CARD.replace("config_name: de", "config_name: default"))
    assert texts_of(dataset) == ["de/train.jsonl"]
    (dataset / "README.md").write_text(CARD.replace("part-*", "none-*"))
    with pytest.raises(InputError, match="none of the files that its card"):
        Corpus(str(dataset), "en")
    (dataset / "README.md").write_text("---\nconfigs: [1]\n---\n")
    with pytest.raises(InputError, match="must be a dataset card"):
        Corpus(str(dataset))


def test_conventional_names_of_splits(dataset):
    read = ["de/train.jsonl", "en/held.jsonl", "en/part-0.jsonl", "en/part-1.jsonl", "extra.jsonl"]
    assert texts_of(dataset) == read

    def as_json(name):
        return json.dumps({"text": name})

    names = ["dev/train.txt", "pile.val-00000-of-00001.txt", "Validation.json", "protest.txt"]
    for name in names:
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_text(as_json(name))
    read = plain(Corpus(str(dataset), split="validation"))
    root = dataset.name
    assert [text for _, text, _ in read] == [names[2], *map(as_json, names[:2])]
    assert [subset for *_, subset in read] == [root, "dev", root]
    assert texts_of(dataset)[-1] == as_json("protest.txt")
    with pytest.raises(InputError, match=r"SPLIT of .* must be one of validation, test, train"):
        Corpus(str(dataset), split="all")
    with pytest.raises(InputError, match=r"CONFIG of .* must be left out, for there are none"):
        Corpus(str(dataset), "en")
    with pytest.raises(InputError, match=r"is a file\. Leave them out"):
        Corpus(str(dataset / "extra.jsonl"), split="test")


def test_files_of_one_name_are_two(dataset):
    (dataset / "de" / "part-0.jsonl").write_bytes(json_line("longer than the other"))
    corpus = Corpus(str(dataset))
    path = "part-0.jsonl"
    assert {corpus.sizes()[f"en/{path}"], corpus.sizes()[f"de/{path}"]} == {28, 34}
    assert {document.subset for document in corpus.documents()} == {"en", "de", dataset.name}
    corpus.subset_a_file = True  # as earlier versions had it
    assert {"en/part-0", "de/part-0"} < {document.subset for document in corpus.documents()}
    earlier = {file.name: file.stat().st_size for file in corpus.files}  # as d597169 wrote it
    corpus.name_files_as(earlier | {path: 0})
    assert f"en/{path}" in corpus.sizes()
    corpus.name_files_as(earlier)
    assert corpus.sizes() == earlier


def test_the_column_of_the_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": range(4)}), tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_bytes(b"".join(json_line(7, body=text) for text in TEXTS))
    corpus = Corpus(str(tmp_path), column="body")
    corpus.check()
    assert [document.text for document in corpus.documents()] == TEXTS * 2
    with pytest.raises(InputError, match=r"a body; it .*text\. Choose TEXT_COLUMN among title, x"):
        (tmp_path / "c.jsonl").write_bytes(b'{"title": "a", "x": 1}\n')
        Corpus(str(tmp_path / "c.jsonl"), column="body").check()


def test_a_hub_name_with_a_configuration():
    corpus = Corpus("allenai/c4/en")
    assert (corpus.hub_name, corpus.config) == ("allenai/c4", "en")
    assert (Corpus("allenai/c4").hub_name, Corpus("gsm8k").config) == ("allenai/c4", None)
    with pytest.raises(InputError, match="CONFIG must be left out, or 'en' as in allenai/c4/en"):
        Corpus("allenai/c4/en", "de")


def test_the_files_of_a_folder_are_one_subset(tmp_path):
    root = tmp_path / "books"
    for name in ("a.txt", "b.txt", "poems/c.txt", "poems/old/d.txt", "prose/e.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(json_line(name))
    named = json_line("f", meta={"pile_set_name": "ArXiv"}) + json_line("g")
    (root / "prose" / "f.jsonl").write_bytes(named)
    subsets = [subset for *_, subset in plain(Corpus(str(root)))]
    assert subsets == ["books", "books", "poems", "poems", "prose", "ArXiv", "prose"]
    assert {subset for *_, subset in plain(Corpus(f"{root}/poems/../poems"))} == {"poems", "old"}


def test_the_name_of_a_subset_may_be_anything(tmp_path, capsys):
    names = ["ArXiv", 7, 2.5, ["a", "b"], {"a": 1}, "", None, "half \ud800"]
    lines = [json_line("text", meta={"pile_set_name": name}) for name in names]
    (tmp_path / "mine.jsonl").write_bytes(b"".join([*lines, json_line("text", meta=3)]))
    corpus = Corpus(str(tmp_path / "mine.jsonl"))
    expected = ["ArXiv", "7", "2.5", "mine", "mine", "mine", "mine", "half ?", "mine"]
    for _ in range(2):
        assert [subset for *_, subset in plain(corpus)] == expected
    said = "meta.pile_set_name must be a name or a number; of a record of"
    assert capsys.readouterr().out.count(said) == 1


def test_subsets_beyond_the_most_are_one(capsys):
    numbers = SubsetNumbers(["a", "b"])
    names = [f"s{n}" for n in range(2 * MOST_SUBSETS)]
    indices = [numbers[name] for name in (*names, "b", *names)]
    assert indices[: MOST_SUBSETS - 2] == list(range(2, MOST_SUBSETS))
    assert set(indices[MOST_SUBSETS - 2 : len(names)]) == {MOST_SUBSETS}
    assert indices[len(names)] == 1 and indices[len(names) + 1 :] == indices[: len(names)]
    assert list(numbers)[MOST_SUBSETS:] == [FURTHER] and SubsetNumbers(list(numbers)) == numbers
    assert capsys.readouterr().out.count("all others are one") == 1


def test_a_separator_within_txt(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(["one", "two\n", *["three"] * 120]))
    corpus = Corpus(str(tmp_path))
    (note,) = corpus.check()
    assert "spell <|endoftext|> 121 times" in note and "--separator '<|endoftext|>'" in note
    assert len(list(corpus.documents())) == 1
    corpus = Corpus(str(tmp_path), separator="<|endoftext|>")
    assert not corpus.check() and texts_of(tmp_path)[0] == path.read_text()
    assert [text for _, text, _ in plain(corpus)] == ["one", "two\n", *["three"] * 120]
    path.write_text("one</s>two")
    assert not Corpus(str(tmp_path)).check()
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(LINES)
    for dataset, separator in ((path, ""), (lines, "</s>")):
        with pytest.raises(InputError, match="SEPARATOR must be a text that stands between"):
            Corpus(str(dataset), separator=separator).check()


def test_a_large_txt_is_read_in_parts(tmp_path):
    path = tmp_path / "large.txt"
    text = "日本 words\n" * 400_000
    path.write_text(f"\ufeff{text}", "utf-8")
    tracemalloc.start()
    try:
        for document in Corpus(str(path)).documents():
            assert len(document.text) <= LONGEST
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size
    finally:
        tracemalloc.stop()
    assert texts_of(path) == [text]
    path.write_bytes(path.read_bytes() + b"\xff")
    with pytest.raises(InputError, match=f"byte {path.stat().st_size - 1} is not"):
        Corpus(str(path)).check()


def test_embedded_is_the_prepared_pile(embedded_pile):
    corpus = Corpus("embedded")
    corpus.check()
    assert corpus.files == sorted(Path("data/embedded/pile").glob("*.jsonl.zst"))
    subsets = {document.subset for document in itertools.islice(corpus.documents(), 500)}
    assert {"ArXiv", "Github", "Wikipedia (en)"} < subsets and len(subsets) == 7


# Bad input -----------------------------------------------------------------------------------


def test_bad_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "mixed.jsonl"
    bad = [
        b"{not json\n",
        b"caf\xe9\n",
        b"[1, 2]\n",
        b'"a string"\n',
        b'{"text": "\\ud800"}\n',
        b"[" * 100_000 + b"\n",
        json_line(7),
        json_line(None),
        json_line(" \n "),
        b'{"title": "no text"}\n',
    ]
    good = b"\xef\xbb\xbf" + json_line("good 0") + b"\n" + json_line("good 1")
    path.write_bytes(b"".join(bad) + good)
    corpus = Corpus(str(path))
    counts = {
        "not JSON": 2,
        "not UTF-8": 1,
        "without a text": 5,
        "with an empty text": 1,
        "not Unicode": 1,
    }
    for _ in range(2):  # the counts are those of one pass
        documents = [(document.index, document.text) for document in corpus.documents()]
        assert documents == [(0, "good 0"), (1, "good 1")]
        assert corpus.skipped == counts


def test_a_file_compressed_twice_is_not_read():
    assert type_of(Path("a.JSONL.gz")) == ".jsonl" and type_of(Path("a.jsonl.zst.gz")) is None


@pytest.mark.parametrize(("encoding", "byte"), [("latin-1", "byte 3"), ("utf-16", "byte 0")])
def test_txt_of_another_encoding(tmp_path, encoding, byte):
    (tmp_path / "a.txt").write_text("fine")
    path = tmp_path / "b.txt"
    path.write_text("caf\xe9", encoding)
    with pytest.raises(InputError) as error:
        Corpus(str(tmp_path)).check()
    for part in (str(path), byte, f"iconv -f {encoding} -t utf-8"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["none", "empty.jsonl", "blank.jsonl", "empty.jsonl.zst", "e.txt"])
def test_empty_dataset(tmp_path, name):
    if name != "none":
        (tmp_path / name).write_text(" \n\n" if name == "blank.jsonl" else "")
    with pytest.raises(InputError, match="must"):
        Corpus(str(tmp_path)).check()


def test_no_usable_document_says_why(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"x\ny\n" + json_line(""))
    with pytest.raises(InputError, match="2 not JSON, 1 with an empty text"):
        list(Corpus(str(path)).documents())


def test_unknown_type(tmp_path):
    path = tmp_path / "text.doc"
    path.write_text("text\n")
    with pytest.raises(
        InputError, match=r"\.jsonl, \.ndjson, \.json, .*\n.*another type: text.doc"
    ):
        Corpus(str(tmp_path))
    with pytest.raises(InputError, match=r"text\.doc must be or hold a file of a known type"):
        Corpus(str(path))


@pytest.mark.parametrize("name", ["", "./pile", "/no/such", "a/b/c/d", "pile.jsonl", "a/b.parquet"])
def test_missing_file(name):
    with pytest.raises(InputError, match="no file or folder"):
        Corpus(name)


def test_hub_out_of_reach_is_one_message_without_the_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(InputError) as error:
        Corpus("someone/no-such-dataset").check()
    for part in ("someone/no-such-dataset", "HF_TOKEN in .env", "--dataset embedded", "licence"):
        assert part in str(error.value)
    assert "hf_secret" not in str(error.value)
    assert error.value.__suppress_context__


def test_parquet_without_a_text_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_bytes(json_line("read first"))
    with pytest.raises(InputError, match="must have a column text; it has content"):
        Corpus(str(tmp_path)).check()


def test_truncated_and_damaged_files(tmp_path):
    lines = b"".join(json_line(f"number {n * 7919}") for n in range(50_000))
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(compress(lines)[:-1000])
    with pytest.raises(InputError, match=r"cut\.jsonl\.zst ends in the middle"):
        texts_of(path)
    path.write_bytes(b"this is no zstd file")
    with pytest.raises(InputError, match=r"cut\.jsonl\.zst is damaged"):
        texts_of(path)
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress(lines)[:-5])
    with pytest.raises(InputError, match=r"cut\.json\.gz ends in the middle"):
        texts_of(path)
    path.write_bytes(gzip.compress(lines)[:-8] + bytes(8))  # the checksum
    with pytest.raises(InputError, match=r"cut\.json\.gz is damaged"):
        texts_of(path)


def test_files_that_cannot_be_read_are_no_traceback(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "b.jsonl").write_bytes(json_line("one"))
    assert texts_of(tmp_path) == ["one"]
    assert Corpus(str(tmp_path)).sizes() == {"b.jsonl": (tmp_path / "b.jsonl").stat().st_size}
    with pytest.raises(InputError, match="no file or folder"):
        Corpus("x" * 300 + ".jsonl")


# Ranks ---------------------------------------------------------------------------------------


def test_ranks_partition_the_usable_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json_line(str(n)) + b"bad\n" for n in range(11)))
    corpus = Corpus(str(path))
    everything = list(corpus.documents())
    by_rank = [list(corpus.documents(rank=rank, world_size=3)) for rank in range(3)]
    assert (
        sorted((d for documents in by_rank for d in documents), key=lambda d: d.index) == everything
    )
    assert [document.index for document in by_rank[1]] == [1, 4, 7, 10]
    for rank in range(3):
        rest = list(corpus.documents(Position(2, 0), rank=rank, world_size=3))
        assert rest == by_rank[rank][2:]
    assert list(corpus.documents(Position(99, 0))) == []
    assert list(corpus.documents(rank=20, world_size=30)) == []


# Subsets and chats ---------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> Path:
    """3,000 documents: of every six, three of ArXiv, two of Github, one of "Wikipedia (en)"."""
    names = ["ArXiv", "Github", "ArXiv", "Wikipedia (en)", "Github", "ArXiv"]
    lines = (
        json_line(f"text {n} " * (n % 7), meta={"pile_set_name": names[n % 6]})
        for n in range(3_000)
    )
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def test_subsets_are_chosen_and_documents_keep_their_numbers(mixed):
    everything = {document.index: document for document in Corpus(str(mixed)).documents()}
    corpus = Corpus(str(mixed), subsets=("Github=0.5", "Wikipedia (en)"))
    assert corpus.check() == []
    chosen = list(corpus.documents())
    assert all(document == everything[document.index] for document in chosen)
    counts = {name: 0 for name in ("ArXiv", "Github", "Wikipedia (en)")}
    of_all = dict(counts)
    for document in chosen:
        counts[document.subset] += 1
    for document in everything.values():
        of_all[document.subset] += 1
    assert counts["ArXiv"] == 0 and counts["Wikipedia (en)"] == of_all["Wikipedia (en)"]
    assert counts["Github"] == pytest.approx(of_all["Github"] / 2, rel=0.1)
    assert corpus.skipped == {"with an empty text": 429}
    # On from any place, of any rank, and from a position without a place.
    for n in (0, 1, 200, len(chosen) - 1):
        assert list(corpus.documents(Position(n, 1, chosen[n].place))) == chosen[n:]
        assert list(corpus.documents(Position(n + 1, 0, chosen[n].place))) == chosen[n + 1 :]
        assert list(corpus.documents(Position(n, 1))) == chosen[n:]
    by_rank = [list(corpus.documents(rank=rank, world_size=3)) for rank in range(3)]
    by_rank = itertools.chain(*by_rank)
    assert sorted(by_rank, key=lambda document: document.index) == chosen


def test_a_subset_that_there_is_not(mixed, tmp_path):
    def check(path: Path, *subsets: str) -> list[str]:
        return Corpus(str(path), subsets=subsets).check()

    with pytest.raises(InputError, match=r"'ArXive' is not .*: ArXiv, Github.*mean 'ArXiv'\?"):
        check(mixed, "Github", "ArXive=0.5")
    with pytest.raises(InputError, match=r"'Enron' is not among those of all documents: ArXiv, G"):
        check(mixed, "Enron")
    for share in ("0", "1.5", "-1", "nan"):
        with pytest.raises(InputError, match=r"above 0 and at most 1, as in 'Github=0\.5'"):
            check(mixed, f"Github={share}")
    # Where there are more documents than are looked at, it may come later.
    long = tmp_path / "long.jsonl"
    long.write_bytes(5 * mixed.read_bytes() + json_line("a", meta={"pile_set_name": "Enron"}))
    (note,) = check(long, "Enron", "Github")
    assert "10,000 documents are of ArXiv, Github" in note and "any of Enron is not known" in note
    assert [document.text for document in Corpus(str(long), subsets=("Enron",)).documents()] == [
        "a"
    ]
    with pytest.raises(InputError, match="'wikipedia' is not among those of the first 10,000"):
        check(long, "wikipedia")
    named = tmp_path / "named.jsonl"
    named.write_bytes(json_line("a", meta={"pile_set_name": "x=y"}))
    assert check(named, "x=y") == []
