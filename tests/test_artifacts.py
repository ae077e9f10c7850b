"""A stage's folder: atomic files, one run in it, one process at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.artifacts import (
    fingerprint,
    open_stage,
    read_json,
    replacing,
    require_disk_space,
    write_json,
)
from utils.settings import InputError

OUTPUTS = ("*.npy", "summary.json")
SETTINGS = {"layer": 1, "names": ["a"]}


def make(folder: Path, settings: dict = SETTINGS, **options) -> None:
    """A run that writes one output."""
    with open_stage(folder, settings, OUTPUTS, **options) as opened:
        (opened / "a.npy").write_text(json.dumps(settings))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}


# ----------------------------------------------------------------------------------------- files


def test_replacing_shows_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == {"a.txt"}


def test_replacing_keeps_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="midway"), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError("midway")
    assert path.read_text() == "old" and names(tmp_path) == {"a.txt"}


def test_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"name": "λ", "list": [1, 2.5, None]})
    assert read_json(path) == {"name": "λ", "list": [1, 2.5, None]}
    for content in (path.read_bytes()[:-5], b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.json is damaged .*Delete"):
            read_json(path)


def test_fingerprint_is_of_the_content_and_its_order(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    assert len(fingerprint(one)) == 16 and fingerprint(one) != fingerprint(other)
    assert fingerprint(one, other) != fingerprint(other, one)
    before = fingerprint(one)
    other.write_bytes(b"1")
    assert fingerprint(other) == before


# ------------------------------------------------------------------------------------ one run


def test_the_same_settings_open_the_folder_again(tmp_path):
    make(tmp_path / "new" / "folder")
    make(tmp_path / "new" / "folder")
    assert names(tmp_path / "new" / "folder") == {"a.npy", "settings.json"}
    assert read_json(tmp_path / "new" / "folder" / "settings.json") == SETTINGS


def test_other_settings_are_refused_by_name(tmp_path):
    make(tmp_path)
    before = (tmp_path / "a.npy").read_text()
    with pytest.raises(InputError) as error:
        make(tmp_path, {"layer": 2, "names": ["a"], "seed": 0})
    for part in ("LAYER: 1 there, 2 now", "SEED: None there, 0 now", "--overwrite", str(tmp_path)):
        assert part in str(error.value)
    assert "NAMES" not in str(error.value)
    assert (tmp_path / "a.npy").read_text() == before
    assert read_json(tmp_path / "settings.json") == SETTINGS


def test_a_folder_without_outputs_takes_any_settings(tmp_path):
    with pytest.raises(RuntimeError), open_stage(tmp_path, SETTINGS, OUTPUTS):
        raise RuntimeError("before anything was written")
    make(tmp_path, {"layer": 2})
    assert read_json(tmp_path / "settings.json") == {"layer": 2}


def test_overwrite_deletes_the_outputs_alone(tmp_path):
    make(tmp_path)
    (tmp_path / ".partial-b.npy").write_text("left by a kill")
    (tmp_path / "notes.txt").write_text("the user's")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.npy").write_text("the user's")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("an output that is a folder")
    with open_stage(tmp_path, {"layer": 2}, (*OUTPUTS, "page"), overwrite=True):
        assert names(tmp_path) == {"settings.json", "notes.txt", "own"}
    assert (tmp_path / "own" / "a.npy").read_text() == "the user's"


def test_overwrite_goes_on_with_the_same_settings(tmp_path):
    make(tmp_path)
    with open_stage(tmp_path, SETTINGS, OUTPUTS, overwrite=True):
        assert names(tmp_path) == {"a.npy", "settings.json"}


def test_the_folder_of_another_script_is_refused(tmp_path):
    make(tmp_path, {"script": "one.py"})
    with pytest.raises(InputError, match=r"is the folder of one\.py\. Name another"):
        make(tmp_path, {"script": "other.py"})
    assert names(tmp_path) == {"a.npy", "settings.json"}


def test_outputs_of_an_unknown_run_are_refused(tmp_path):
    for name in ("stray.npy", "other.npy", "third.npy", "fourth.npy"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"fourth\.npy, other\.npy, stray\.npy but no settings"):
        make(tmp_path)
    assert names(tmp_path) == {"stray.npy", "other.npy", "third.npy", "fourth.npy"}
    make(tmp_path, overwrite=True)
    assert names(tmp_path) == {"a.npy", "settings.json"}


def test_damaged_settings_are_refused_until_overwritten(tmp_path):
    make(tmp_path)
    (tmp_path / "settings.json").write_text('{"layer": ')
    with pytest.raises(InputError, match=r"settings\.json is damaged .*Delete"):
        make(tmp_path)
    assert (tmp_path / "a.npy").exists()
    make(tmp_path, overwrite=True)
    assert read_json(tmp_path / "settings.json") == SETTINGS


# -------------------------------------------------------------------------------- one process


def held_by_another_process(folder: Path, lock_name: str) -> subprocess.Popen:
    code = (
        "import sys; from utils.artifacts import open_stage\n"
        f"with open_stage({str(folder)!r}, {{'layer': 1}}, (), lock_name={lock_name!r}):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    with held_by_another_process(tmp_path, ".lock") as other:
        with pytest.raises(InputError, match="Another process is writing to"):
            make(tmp_path)
        with open_stage(tmp_path, {"layer": 1}, (), lock_name=".lock-1"):
            pass  # ranks of a run hold locks of different names
        other.kill()
    make(tmp_path)


@pytest.mark.parametrize("parts", [("file",), ("file", "below")])
def test_a_path_that_cannot_be_a_folder(tmp_path, parts):
    (tmp_path / "file").write_text("the user's")
    folder = tmp_path.joinpath(*parts)
    with pytest.raises(InputError, match=f"Cannot write to {folder}: .* Choose another folder"):
        make(folder)
    assert (tmp_path / "file").read_text() == "the user's"


def test_disk_space(tmp_path):
    require_disk_space(tmp_path, 1_000)
    with pytest.raises(InputError, match=r"needs 1,000,000\.0 GB and its disk has [\d,.]+ GB free"):
        require_disk_space(tmp_path, 10**15)
