"""Constants that are flags: help, types, typing errors, and imports without side effects."""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS, environment

from utils.settings import (
    InputError,
    as_dict,
    read_settings,
    require_positive,
    run,
    trailing_comments,
)


def test_trailing_comments_known_answer():
    source = (
        '"""Docstring # no comment"""\n'
        "import os  # not a constant\n"
        "# --- group\n"
        "SIZE = 4  # how large\n"
        "NAME: str | None = None  # a name; None: no name\n"
        'TEXT = "a # b"  # in the middle\n'
        "PAIR = (\n    1,\n    2,\n)  # at the end of several lines\n"
        "PLAIN = 5\n"
        "lower = 6  # not in capitals\n"
        "def main():\n    INSIDE = 7  # not of the module\n"
    )
    assert trailing_comments(source) == {
        "SIZE": "how large",
        "NAME": "a name; None: no name",
        "TEXT": "in the middle",
        "PAIR": "at the end of several lines",
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_constant_with_its_comment_and_default(name, run_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # so that no comment is wrapped
    options = run_here(name, "--help").stdout.split(" options ")[1]
    options = " ".join(options.replace("│", "").split())
    script = importlib.import_module(name)
    comments = trailing_comments((ROOT / f"{name}.py").read_text())
    assert len(comments) >= 8
    for constant, comment in comments.items():
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


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("train_autoencoder", ["--n-latent", 5], "--n-latents"),
        ("analyze_features", ["--n-tokns", 5], "--n-tokens"),
        ("train_autoencoder", ["--n-latents", "many"], "--n-latents"),
        ("train_autoencoder", ["--learning-rate", "fast"], "--learning-rate"),
        ("influence_llm", ["--strength", "1", "a"], "--strength"),
        ("influence_llm", ["--max-new-tokens"], "--max-new-tokens"),
    ],
)
def test_a_wrong_flag_or_value_is_named(run_here, name, flags, says):
    ended = run_here(name, *flags, check=False)
    assert ended.returncode == 2
    assert says in ended.stdout and "Traceback" not in ended.stdout


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
