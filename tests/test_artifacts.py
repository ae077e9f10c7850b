"""A stage's folder: atomic files, one run in it, one process at a time."""

import dataclasses
import errno
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from filelock import FileLock
from full_disk import small_disk
from safetensors.numpy import save_file

from utils import artifacts, plots
from utils.artifacts import (
    CHECKSUMS_FILE,
    RunRecord,
    append_record,
    fingerprint,
    open_stage,
    read_json,
    read_log,
    replacing,
    require_disk_space,
    write_csv,
    write_json,
)
from utils.autoencoder.callbacks import Backup, Rounds, TrainingLog
from utils.autoencoder.kinds import L1Autoencoder
from utils.features.catalogue import save_features
from utils.settings import InputError, read_settings

OUTPUTS = ("*.npy", "summary.json")
SETTINGS = {"layer": 1, "names": ["a"]}


def make(folder: Path, settings: dict = SETTINGS, **options) -> None:
    """A run that writes one output."""
    with open_stage(folder, RunRecord(settings), OUTPUTS, **options) as opened:
        (opened / "a.npy").write_text(json.dumps(settings))


def names(folder: Path) -> set[str]:
    hidden = (".lock", CHECKSUMS_FILE)
    return {path.name for path in folder.iterdir() if not path.name.startswith(hidden)}


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


def test_a_file_is_compared_with_its_checksum(tmp_path):
    """A kill between the record and the file leaves the earlier one valid; so is one without."""
    path = tmp_path / "a.json"
    path.write_text("[1.5]")
    assert read_json(path) == [1.5]  # of an earlier version
    write_json(path, [2.5])
    write_json(tmp_path / "b.json", [3.5])
    with pytest.raises(OSError, match="killed"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        write_json(path, [4.5])
    assert read_json(path) == [2.5]
    write_json(path, [4.5])
    assert read_json(path) == [4.5] and read_json(tmp_path / "b.json") == [3.5]
    path.write_text(path.read_text().replace("4.5", "4.4"))
    rule = r"a\.json is damaged .*checksum.*\. Buy another\."
    with pytest.raises(InputError, match=rule):
        read_json(path, "Buy another.")
    path.unlink()
    with pytest.raises(InputError, match=r"a\.json is missing\. Delete .* and make it anew"):
        read_json(path)


def test_a_damaged_line_of_a_log_is_skipped(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"a": 1.5}\n')  # of an earlier version
    records = [{"a": 2.5, "b": {"c": [None, "é"]}}, {"a": 3.5}]
    for record in records:
        append_record(log, record)
    assert list(read_log(log, ["a"])) == [{"a": 1.5}, *records]
    log.write_text(log.read_text().replace("2.5", "2.4"))
    assert list(read_log(log, ["a"])) == [{"a": 1.5}, {"a": 3.5}]


def test_fingerprint_is_of_the_content_and_its_order(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    assert len(fingerprint(one)) == 16 and fingerprint(one) != fingerprint(other)
    assert fingerprint(one, other) != fingerprint(other, one)
    before = fingerprint(one)
    other.write_bytes(b"1")
    assert fingerprint(other) == before


# ------------------------------------------------------------------------------------- full disks

NOISE = np.random.default_rng(0).random((100, 100))


def draw_picture(path: Path) -> None:
    with plots.picture(path, "Noise", (6, 6)) as (_, axes):
        axes.imshow(NOISE)


def save_array(path: Path) -> None:
    with replacing(path) as partial, open(partial, "wb") as file:
        np.save(file, NOISE)


def save_tensors(path: Path) -> None:
    with replacing(path) as partial:
        save_file({"noise": NOISE}, partial)


def save_backup(path: Path) -> None:
    backup = Backup(path.parent, 1, Rounds(2, 1))
    backup.set_model(L1Autoencoder(d_model=50, n_latents=200))
    backup.on_epoch_end(0)


WRITERS = {
    "a.json": lambda path: write_json(path, NOISE.tolist()),
    "a.csv": lambda path: write_csv(path, pd.DataFrame(NOISE)),
    "a.parquet": lambda path: save_features(path, pd.DataFrame(NOISE)),
    "a.npy": save_array,
    "a.safetensors": save_tensors,
    "a.png": draw_picture,
    artifacts.BACKUP_FILE: save_backup,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_a_full_disk_refuses_is_named_and_the_earlier_one_stays(tmp_path, name):
    path = tmp_path / "disk" / name
    with small_disk(path.parent, 40_960, 20_000) as make_room:
        path.write_text("earlier")
        with pytest.raises(OSError, match=r"\[Errno \d+\]") as error:
            WRITERS[name](path)
        assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert error.value.filename == str(path)
        assert path.read_text() == "earlier" and names(path.parent) == {name}
        make_room()
        WRITERS[name](path)
        assert path.stat().st_size > 40_960


def test_a_log_that_a_full_disk_refuses_is_named(tmp_path):
    log, lines = tmp_path / "a.jsonl", TrainingLog(tmp_path / "a.csv", Rounds(2, 1), 32)
    model = L1Autoencoder(d_model=4, n_latents=8)
    model.compile(optimizer="adam")
    lines.set_model(model)
    lines.columns, lines.seconds = ["step", "seconds"], 0.0
    for path, write in (
        (log, lambda: append_record(log, {"a": 1})),
        (lines.path, lambda: lines.on_epoch_end(0, {})),
    ):
        path.symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write()


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
    with pytest.raises(RuntimeError), open_stage(tmp_path, RunRecord(SETTINGS), OUTPUTS):
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
    record = RunRecord({"layer": 2})
    with open_stage(tmp_path, record, (*OUTPUTS, "page"), overwrite=True):
        assert names(tmp_path) == {"settings.json", "notes.txt", "own"}
    assert (tmp_path / "own" / "a.npy").read_text() == "the user's"


def test_overwrite_goes_on_with_the_same_settings(tmp_path):
    make(tmp_path)
    with open_stage(tmp_path, RunRecord(SETTINGS), OUTPUTS, overwrite=True):
        assert names(tmp_path) == {"a.npy", "settings.json"}


def test_overwrite_deletes_nothing_that_another_process_uses(tmp_path):
    """A training follows a folder; the extraction that was killed goes on beside it."""
    make(tmp_path)
    with FileLock(tmp_path / ".lock-follow"):
        make(tmp_path, overwrite=True)
        with pytest.raises(InputError, match="Another process is writing"):
            make(tmp_path, SETTINGS | {"layer": 2}, overwrite=True)
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


# --------------------------------------------------------------------- runs of earlier versions

# What commit d597169, before the first setting was retired, records of runs at its defaults.
EARLIER = [
    {
        "script": "save_activations.py", "model_name": "meta-llama/Llama-3.2-3B", "layer": 15,
        "dtype": "auto", "dataset": "monology/pile-uncopyrighted", "n_tokens": 100_000_000,
        "context_length": 1024, "outlier_factor": 3.0, "storage_dtype": "float16",
        "tokens_per_shard": 65_536, "contexts_per_batch": 16, "world_size": 1,
    },
    {
        "script": "train_autoencoder.py", "held_out": 0.05, "kind": "topk", "n_latents": 65_536,
        "decoder_norm": None, "unit_decoder": None, "input_normalizer": "centered", "k": 64,
        "auxk_coefficient": 0.03125, "selection_dtype": "auto",
        "prefixes": [0.0625, 0.125, 0.25, 0.5, 1.0], "sparsity_coefficient": 2.0,
        "sparsity_warmup": None, "bandwidth": 2.0, "tanh_scale": 1.0,
        "preactivation_coefficient": 3e-06, "n_passes": 3.0, "batch_size": 4096,
        "learning_rate": None, "learning_rate_warmup": 0.0, "learning_rate_decay": 0.2,
        "learning_rate_shape": "linear", "gradient_clip_norm": 1.0, "weight_averaging": None,
        "dead_after": 10_000_000, "seed": 0, "sweep_steps": [], "backend": "auto",
        "log_every": 100, "activations": "2c2cda582458f97f",
    },
    {
        "script": "analyze_features.py", "n_tokens": 10_000_000, "n_loss_tokens": 16_384,
        "studies": [
            "specificity", "completeness", "neurons", "explanations", "outputs", "splitting",
            "directions",
        ],
        "n_studied": 1000, "n_neuron_tokens": 65_536, "n_explained": 200, "sentence_model": None,
        "map_features": True, "n_reported": 30, "batch_size": 8192, "seed": 0, "judge": None,
        "n_described": 5, "bytes_per_feature": 20_000, "page": "browser/index.html",
        "outputs": [
            "*.parquet", "*.csv", "pass.json", "study-*.json", "summary.json", "vocabulary.json",
            "*.png", "browser",
        ],
        "activations": "2c2cda582458f97f", "autoencoder": "760f3e2e661fa5cd",
        "other_autoencoders": ["a58a9fe9f5964b87"],
    },
]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("earlier", EARLIER, ids=lambda earlier: earlier["script"])
def test_a_run_of_an_earlier_version_goes_on(tmp_path, earlier, overwrite):
    make(tmp_path, earlier)
    script = importlib.import_module(earlier["script"].removesuffix(".py"))
    names_of_facts = ("world_size", "activations", "autoencoder")
    facts = {name: earlier[name] for name in names_of_facts if name in earlier}
    record = RunRecord.of(read_settings(script, []), script.NOT_RECORDED, **facts)
    with open_stage(tmp_path, record, OUTPUTS, overwrite):
        assert names(tmp_path) == {"a.npy", "settings.json"}
    assert read_json(tmp_path / "settings.json") == earlier
    other = dataclasses.replace(record, content=record.content | {"world_size": 2})
    rule = "WORLD_SIZE: [1N].* there, 2 now"
    with pytest.raises(InputError, match=rule), open_stage(tmp_path, other, OUTPUTS):
        pass


def test_settings_that_one_version_does_not_have_count_as_their_defaults():
    record = RunRecord({"script": "analyze_features.py", "seed": 0, "new": 1}, {"new": 1})
    earlier = {"script": "analyze_features.py", "seed": 0, "sentence_model": None}
    assert record.differences(earlier) == []
    changed = RunRecord(record.content | {"new": 2}, record.defaults)
    assert changed.differences(earlier) == ["  NEW: 1 there, 2 now"]
    assert record.differences(earlier | {"sentence_model": "embedded", "gone": 3}) == [
        "  SENTENCE_MODEL: 'embedded' there, which this version lacks",
        "  GONE: 3 there, None now",
    ]
    assert RunRecord({"script": "one.py", "seed": 0}).differences(earlier)  # not retired there


# -------------------------------------------------------------------------------- one process


def held_by_another_process(folder: Path, lock_name: str) -> subprocess.Popen:
    code = (
        "import sys; from utils.artifacts import RunRecord, open_stage\n"
        f"with open_stage({str(folder)!r}, RunRecord({{}}), (), lock_name={lock_name!r}):\n"
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
        with open_stage(tmp_path, RunRecord({}), (), lock_name=".lock-1"):
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
    with pytest.raises(InputError, match=r"needs 1,000 TB and its disk has [\d,.]+ [A-Z]B free"):
        require_disk_space(tmp_path, 10**15)


def test_what_is_written_already_needs_no_more_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500))
    (tmp_path / "page").mkdir()
    for path in ("a.png", "page/part", "the user's"):
        (tmp_path / path).write_bytes(bytes(300))
    require_disk_space(tmp_path, 1_099, ("*.png", "page"))
    with pytest.raises(InputError, match=r"needs 500 bytes .* has 500 bytes free"):
        require_disk_space(tmp_path, 1_100, ("*.png", "page"))


def test_a_file_replaced_while_it_is_compared_is_not_damaged(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_json(path, 1)

    def replace_then_check(*_):
        write_json(path, 2)  # as another process does
        return artifacts.checksum(path)

    monkeypatch.setattr(artifacts, "_checksum_of", replace_then_check)
    assert read_json(path) == 2
