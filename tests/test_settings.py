"""Constants that are flags: help, types, typing errors, and imports without side effects."""

import ast
import errno
import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS, environment

from tests.structure import files_of
from utils.artifacts import writing
from utils.settings import InputError, as_dict, read_settings, require_positive, run, settings_block

FLAGS = {
    "save_activations": """
        --model-name --layer --dtype --for-autoencoder --hookpoint --dataset --config --split
        --text-column --subsets --separator
        --n-tokens --context-length --outlier-factor --activations-dir --storage-dtype
        --tokens-per-shard --contexts-per-batch --max-disk-gb --keep-gb --max-hours
        --overwrite --check
    """,
    "train_autoencoder": """
        --activations-dir --autoencoder-dir --held-out --n-held-out-tokens --kind --n-latents
        --decoder-norm --unit-decoder --input-normalizer --k --auxk-coefficient --selection-dtype
        --prefixes
        --sparsity-coefficient --sparsity-warmup --bandwidth --tanh-scale
        --preactivation-coefficient --n-passes --batch-size --learning-rate --learning-rate-warmup
        --learning-rate-decay --learning-rate-shape --gradient-clip-norm --moments-dtype
        --dead-after --follow --pool-gib --seed --sweep-latents --sweep-steps
        --sweep-learning-rates
        --import-from --hookpoint --accept-mismatch --export --export-dir
        --push-to-hub --dry-run --private
        --backend --distribution --log-every --tensorboard --backup-every --max-hours
        --overwrite
    """,
    "analyze_features": """
        --activations-dir --autoencoder-dir --n-tokens --n-loss-tokens --studies --n-studied
        --n-neuron-tokens --n-explained --other-autoencoders --map-features
        --n-reported --batch-size --seed --judge --judge-url --judge-price --search --search-like
        --search-prompt --search-not --search-token --search-classifier --n-found --export
        --export-dir --neuronpedia-source --upload --analysis-dir --max-hours --overwrite
    """,
    "influence_llm": """
        --study --playground --chat --port --prompt --chat-template --max-new-tokens --temperature
        --seed --feature --intervention --strength --where --save-vector --n-proposals --n-features
        --n-tried --max-perplexity --pair --n-ablated --n-prompts --prompt-tokens
        --features-per-prompt --activations-dir --analysis-dir --autoencoder-dir --influence-dir
    """,
}
READ_ONLY = "/proc/sys/kernel/ostype"  # that even root cannot write
BLOCK = '''"""Docstring # no comment"""
import os  # not a constant
BEFORE = 1  # stands under no heading
# --- group
SIZE = 4  # how large
NAME: str | None = None  # a name; None: no name
TEXT = "a # b"  # in the middle
PAIR = (
    1,
    2,
)  # at the end of several lines
lower = 6  # not in capitals
# --- another group
LONG: str = (
    "of a line"  # within several lines
)
# --- not settings
AFTER = 5  # how many
PLAIN = 5
def main():
    INSIDE = 7  # not of the module
'''


def test_settings_block_known_answer():
    assert settings_block(BLOCK) == {
        "SIZE": "how large",
        "NAME": "a name; None: no name",
        "TEXT": "in the middle",
        "PAIR": "at the end of several lines",
        "LONG": "within several lines",
    }


def test_a_setting_without_a_comment_is_named():
    with pytest.raises(InputError, match=r"^SIZE must have a comment at the end of its line"):
        settings_block(BLOCK.replace("  # how large", ""))


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags(name, run_here):
    printed = run_here(name, "--help").stdout
    assert re.findall(r"^[│ ] (--[a-z-]+)", printed, re.MULTILINE) == FLAGS[name].split()


def names_read(node: ast.AST) -> Iterator[str]:
    """Settings that code takes by name, outside of functions that merely check them.

    The options of a kind of autoencoder are the arguments of its constructor.
    """
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check"):
        return
    if isinstance(node, ast.FunctionDef) and node.name == "__init__":
        yield from (argument.arg for argument in node.args.args)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("settings"):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from names_read(child)


def test_every_setting_is_read_somewhere():
    read = {name for path in files_of(ROOT) for name in names_read(ast.parse(path.read_text()))}
    for name in SCRIPTS:
        settings = settings_block((ROOT / f"{name}.py").read_text())
        assert not {setting.lower() for setting in settings} - read, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_constant_with_its_comment_and_default(name, run_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # so that no comment is wrapped
    options = run_here(name, "--help").stdout.split(" options ")[1]
    options = " ".join(options.replace("│", "").split())
    script = importlib.import_module(name)
    for constant, comment in settings_block((ROOT / f"{name}.py").read_text()).items():
        flag = "--" + constant.lower().replace("_", "-")
        default = getattr(script, constant)
        values = default if isinstance(default, tuple) else [default]
        shown = " ".join(shlex.quote(str(value)) for value in values)
        entry = rf"{flag},? [^()]*{re.escape(comment)} \(default: {re.escape(shown)}\)"
        assert re.search(entry, options), constant


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_importing_a_script_loads_no_framework(name):
    code = (
        f"import sys, {name}\n"
        "loaded = {'torch', 'keras', 'tensorflow', 'jax', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'{loaded} loaded' if loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WITHOUT_TENSORFLOW = """
import importlib, pkgutil, runpy, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        is_hidden = name.partition(".")[0] in ("tensorflow", "jax")
        return None if is_hidden else super().find_spec(name, *rest)

sys.argv = sys.argv[1:]
sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
runpy.run_path(sys.argv[0], run_name="__main__")
left_out = ("utils.influence.playground", "utils.autoencoder.triton_kernels")  # slow; optional
for module in pkgutil.walk_packages(["utils"], "utils."):
    if module.name not in left_out:
        importlib.import_module(module.name)
from utils.backend import use_backend
use_backend("tensorflow")
"""


def test_all_runs_without_tensorflow(tiny_run, tmp_path):
    flags = ["--n-passes", 0.05, "--backend", "auto", "--autoencoder-dir", tmp_path]
    words = ["train_autoencoder.py", *tiny_run.flags.train_autoencoder, *flags]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, *map(str, words)], cwd=ROOT, env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert " on torch: " in done.stdout and (tmp_path / "autoencoder.keras").exists()
    assert done.stderr.endswith("BACKEND tensorflow is not installed: pip install tensorflow.\n")


ALLOCATING = """
import resource, sys
from utils.backend import use_backend
use_backend("torch", keep_memory=sys.argv[1] == "True")
import torch

def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(25_000_000)  # as a gradient, allocated anew in each step
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(20)  # until there is room for one that is aligned
print(faults(10))
"""


@pytest.mark.skipif(
    os.environ.get("LD_PRELOAD", "") != "" or platform.libc_ver()[0] != "glibc",
    reason="needs glibc's malloc",
)
@pytest.mark.parametrize("is_kept", [True, False])
def test_memory_that_is_kept_is_not_cleared_in_each_step(is_kept):
    command = [sys.executable, "-c", ALLOCATING, str(is_kept)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 100) == is_kept


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("train_autoencoder", ["--n-latent", 5], "--n-latents"),
        ("analyze_features", ["--n-tokns", 5], "--n-tokens"),
        ("train_autoencoder", ["--n-latents", "many"], "--n-latents"),
        ("train_autoencoder", ["--learning-rate", "fast"], "--learning-rate"),
        ("influence_llm", ["--strength", "1", "a"], "--strength"),
        ("influence_llm", ["--max-new-tokens"], "--max-new-tokens"),
        (
            "save_activations",
            ["--dtype", "int8"],
            "'int8' for argument '--dtype'. Expected one of ('auto', 'bfloat16', 'float16', 'float",
        ),
        ("train_autoencoder", ["--backend", "tensorfow"], "'auto', 'tensorflow', 'jax', 'torch'"),
        ("analyze_features", ["--studies", "outputs", "spelling"], "'spelling' for argument"),
        ("influence_llm", ["--study", "prove"], "('steer', 'evidence', 'attribute')"),
    ],
)
def test_a_wrong_flag_or_value_is_named(run_here, monkeypatch, name, flags, says):
    monkeypatch.setenv("COLUMNS", "400")  # so that no message is wrapped
    ended = run_here(name, *flags, check=False)
    assert ended.returncode == 2
    assert says in ended.stdout


@pytest.mark.parametrize(
    ("constant", "rule"),
    [
        ('Literal["linear", "cosine"] = "step"', "one of linear, cosine; it is 'step'"),
        ('Literal["data", "model"] | None = "all"', "one of data, model or None; it is 'all'"),
        ('tuple[Literal["a", "b"], ...] = ("a", "c")', r"a tuple, each one of a, b; it is \('a'"),
        ('tuple[float, ...] | Literal["auto"] = "x"', "a tuple, each float or one of auto; it is"),
        ('float | None = "fast"', "float or None; it is 'fast'"),
        ("tuple[int | str, ...] = 5", "a tuple, each int or str; it is 5"),
    ],
)
def test_a_constant_of_a_wrong_value_is_refused(tmp_path, monkeypatch, constant, rule):
    (tmp_path / "edited.py").write_text(
        "from typing import Literal\n"
        "# --- group\n"
        'RIGHT: tuple[float, ...] | Literal["auto"] | None = (1, 2.5)  # of its type\n'
        f"SHAPE: {constant}  # of another\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited", raising=False)
    with pytest.raises(InputError, match=f"^SHAPE must be {rule}"):
        read_settings(importlib.import_module("edited"), [])


def fields(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**values)


def test_settings_are_frozen_and_typed(monkeypatch):
    script = importlib.import_module("train_autoencoder")
    settings = read_settings(script, ["--k", "7", "--decoder-norm", "None", "--overwrite"])
    assert settings.k == 7 and settings.decoder_norm is None and settings.overwrite
    assert settings.n_latents == script.N_LATENTS
    with pytest.raises(FrozenInstanceError):
        settings.k = 8
    left_out = as_dict(settings, leave_out=("k", "overwrite"))
    assert left_out == {
        name: value for name, value in as_dict(settings).items() if name not in ("k", "overwrite")
    }
    influence = read_settings(importlib.import_module("influence_llm"), ["--strength", "1", "2.5"])
    assert as_dict(influence)["strength"] == [1.0, 2.5]


def test_one_value_or_several():
    script = importlib.import_module("save_activations")
    for words, layer in ((["15"], 15), (["8", "15", "22"], (8, 15, 22))):
        assert read_settings(script, ["--layer", *words]).layer == layer


def test_require_positive():
    require_positive(fields(a=1, b=0.1, c=None), "a", "b", "c")
    for value in (0, -1, float("nan")):
        with pytest.raises(InputError, match="N_TOKENS must be greater than 0; it is"):
            require_positive(fields(n_tokens=value), "n_tokens")


def test_run_turns_mistakes_and_ctrl_c_into_a_message(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/train_autoencoder.py"])

    def fails_with(error: BaseException):
        def main():
            raise error

        return main

    with pytest.raises(SystemExit, match=r"^\ntrain_autoencoder\.py: K is wrong\.$"):
        run(fails_with(InputError("K is wrong.")))
    with pytest.raises(SystemExit, match=r"^\nStopped\. Run the same command again"):
        run(fails_with(KeyboardInterrupt()))
    with pytest.raises(ZeroDivisionError):  # a fault of ours is shown whole
        run(fails_with(ZeroDivisionError()))
    error = InputError("K is wrong.")
    error.add_note("It was 5.")
    with pytest.raises(SystemExit, match=r"K is wrong\.\nIt was 5\.$"):
        run(fails_with(error))


def test_run_says_what_cannot_be_written_and_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_autoencoder.py"])
    full = tmp_path / "full.txt"
    full.symlink_to("/dev/full")

    def write_named() -> None:
        with writing(full):
            full.write_text("x")

    go_on = "run the same command again to go on."
    for main, words in (
        (write_named, f"Cannot write full.txt in {tmp_path}: No space left on device ("),
        (lambda: full.write_text("x"), f"Cannot write a file in {ROOT}: No space left on device"),
        (lambda: os.close(os.open(READ_ONLY, os.O_WRONLY)), "Cannot write ostype in /proc/sys/"),
    ):
        with pytest.raises(SystemExit) as end:
            run(main)
        assert str(end.value).startswith(f"\ntrain_autoencoder.py: {words}")
        assert "What was saved before stays. " in str(end.value)
        assert str(end.value).endswith(f", and {go_on}") and "\n" not in str(end.value).strip()
    for error in (FileNotFoundError(errno.ENOENT, "x", "a"), PermissionError(errno.EACCES, "port")):
        with pytest.raises(type(error)):  # no file was refused
            run(lambda error=error: (_ for _ in ()).throw(error))
