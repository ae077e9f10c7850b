"""A finished analysis for other tools: Neuronpedia's files and API, SAEDashboard's files."""

import copy
import email.utils
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import httpx
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, environment
from neuronpedia_server import KEY, serving

from utils.artifacts import write_json
from utils.features import catalogue, dashboards, neuronpedia, saedashboard, share, upload
from utils.features.dashboards import Source
from utils.settings import InputError

N, N_DEAD = 300, 3  # features of a made-up analysis; the first ones are dead
WINDOW = 48
# Tokens: parts of 中, an emoji, control characters, half of nothing, a token without a text.
CHINESE = "中".encode().decode("ascii", "surrogateescape")
TEXTS = [" a", "\0", "\n", "\x1b[31m", CHINESE[:2], CHINESE[2], "👍", " é", "", "\u2028"]
SOURCE = Source("tiny-llama", 1, "topk-res-300", "tiny/Llama", "d", 40, 32)
MADE = "2026-11-27T03:04:05.678Z"


def features_table() -> pd.DataFrame:
    number = np.arange(N)
    dead = number < N_DEAD
    lists = {
        "promoted_tokens": [[" rose", "\0", "", "中"]] * N,
        "promoted_values": [[4.25, 3.0, 2.0, 1.00004]] * N,
        "suppressed_tokens": [["x"]] * N,
        "suppressed_values": [[-2.5]] * N,
        "neighbours": [[] if one else [7] for one in dead],
        "neighbour_cosines": [[] if one else [0.5] for one in dead],
        "histogram": [[0] * 32 if one else [60, 30, 5, 5, *[0] * 28] for one in dead],
        "peak_tokens": [["中"]] * N,
    }
    columns = {name: catalogue.list_column(list(itertools.chain(*values)), list(map(len, values)))
               for name, values in lists.items()}  # fmt: skip
    return pd.DataFrame(
        {
            "feature": number,
            "frequency": np.where(dead, 0, 1 / (2 + number)),
            "max_activation": np.where(dead, 0, 8.0),
            "dead": dead,
            "label": np.where(dead, "", "中"),
            "top_subset": "Garden",
            "histogram_range": np.where(dead, 0, 64.0),
            "umap_x": np.nan,
            **columns,
            "explanation": ["", *(f"“中” {'👍' * (i % 2 * 400)}\0" for i in range(1, N))],
        }
    )


def example(feature: int, bucket: int, rank: int) -> dict:
    """Silence, 中 in two tokens with its peak in the first, a text, and 40 places after the end."""
    activations = np.zeros(WINDOW, np.float32)
    peak = 8.0 * (1 - bucket / 6)
    activations[[6, 7, 9]] = peak, peak / 4, 0.0123456
    tokens = [0, 1, 2, 3, 8, 9, 4, 5, 6, 7, *[-1] * (WINDOW - 10)]
    return {
        "feature": np.int32(feature), "bucket": np.int8(bucket), "rank": np.int16(rank),
        "activation": np.float32(peak), "context": 0, "peak": np.int16(6), "document": 9,
        "subset": "Garden", "tokens": np.array(tokens, np.int32), "activations": activations,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    catalogue.save_features(folder / "features.parquet", features_table())
    rows = [example(f, b, r) for f in range(N_DEAD, N) for b in range(6) for r in range(2)]
    pd.DataFrame(rows).to_parquet(folder / "examples.parquet", row_group_size=500)
    (folder / "vocabulary.json").write_text(json.dumps(TEXTS))
    about = {"kind": "topk", "n_latents": N, "n_tokens": 10_000}
    write_json(folder / "summary.json", {**about, "model_name": "m", "layer": 1})
    return catalogue.Catalogue(folder)


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read_lines(path) -> list[dict]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    # Not splitlines(): U+2028 ends no line of JSON.
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_constants) for line in text[:-1].split("\n")]


def contents(folder) -> dict:
    """All files but the log of their checksums."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---------------------------------------------------------------------------------------- contents


def test_a_dashboard_is_whole_whatever_its_tokens_are(made_up):
    dead, *_, first = list(dashboards.read_dashboards(made_up, "reading"))[: N_DEAD + 1]
    assert dead.activations == [] and dead.histogram == [] and dead.density == 0
    assert first.density == 0.2 and first.maximum == 8.0
    assert first.promoted == [(" rose", 4.25), ("␀", 3.0), ("中", 1.0)]
    assert first.suppressed == [("x", -2.5)] and first.neighbours == [(7, 0.5)]
    assert first.histogram == [(1.0, 60), (3.0, 30), (5.0, 5), (7.0, 5)]
    assert len(first.activations) == 12
    tokens, values, peak, interval = first.activations[0]
    assert tokens == [" a", "␀", "\n", "\x1b[31m", "\u2028", "中", "👍", " é"]
    assert values == [0, 0, 0, 0, 0, 8.0, 0, 0.01235] and peak == 5
    assert interval == (-1, 8.0, -1)


def test_intervals_known_answer():
    # 60 of 100 activations in 0 to 2, 30 in 2 to 4, 5 each in the last two bins.
    found = dashboards.intervals([60, 30, 5, 5], 8.0, 8.0)
    assert found[1:] == [(6.4, 8.0, 0.04), (4.8, 6.4, 0.04), (3.2, 4.8, 0.14), (1.6, 3.2, 0.3),
                         (0.0, 1.6, 0.48)]  # fmt: skip


def test_names_on_neuronpedia():
    def of(name, kind="topk", n=65_536):
        model, set_name = dashboards.model_id(name), dashboards.default_set(kind, n)
        assert dashboards.parse_source(f"{model}/0-{set_name}") == (model, 0, set_name)
        return model, set_name

    assert of("meta-llama/Llama-3.2-3B") == ("llama-3.2-3b", "topk-res-65k")
    assert of("/tmp/My model__v..2", "batch_topk", 128) == ("my-model-v-2", "batch-topk-res-128")
    assert dashboards.parse_source("gpt2-small/6-a") == ("gpt2-small", 6, "a")
    wrong = "llama Llama/1-a llama/a llama/1-a--b llama/1-neurons l/1-a a..b/1-a llama/1-a/2"
    for name in [*f"{wrong} {'l' * 33}/1-a llama/1-a- llama/1-".split(), ""]:
        with pytest.raises(InputError, match="must be MODEL/LAYER-SET"):
            dashboards.parse_source(name)


# The tables of hijohnnylin/neuronpedia, utils/neuronpedia-utils/neuronpedia_utils/db_models/.
FEATURE = """modelId:str layer:str index:str creatorId:str createdAt:str maxActApprox:float
    hasVector:bool vector:[float] vectorLabel:None vectorDefaultSteerStrength:int hookName:None
    topkCosSimIndices:[int] topkCosSimValues:[float] neuron_alignment_indices:[int]
    neuron_alignment_values:[float] neuron_alignment_l1:[float] correlated_neurons_indices:[int]
    correlated_neurons_pearson:[float] correlated_neurons_l1:[float]
    correlated_features_indices:[int] correlated_features_pearson:[float]
    correlated_features_l1:[float] neg_str:[str] neg_values:[float] pos_str:[str]
    pos_values:[float] frac_nonzero:float freq_hist_data_bar_heights:[int]
    freq_hist_data_bar_values:[float] logits_hist_data_bar_heights:[float]
    logits_hist_data_bar_values:[float] decoder_weights_dist:[float] sourceSetName:str"""
ACTIVATION = """id:str tokens:[str] index:str layer:str modelId:str maxValue:float
    maxValueTokenIndex:int minValue:float values:[float] creatorId:str dataSource:None
    dataIndex:None dfaValues:[float] dfaTargetIndex:None dfaMaxValue:None createdAt:str
    lossValues:[float] logitContributions:None binMin:float binMax:float binContains:float
    qualifyingTokenIndex:int zIndices:None zValues:None"""
EXPLANATION = """id:str modelId:str layer:str index:str description:str authorId:str
    embedding:None triggeredById:None typeName:None explanationModelName:None notes:None
    createdAt:str"""
RELEASE = """name:str description:str creatorName:str creatorId:str visibility:str isNewUi:bool
    featured:bool descriptionShort:str urls:[str] creatorEmail:None creatorNameShort:str
    defaultSourceSetName:None defaultSourceId:None defaultUmapSourceIds:[str] createdAt:str"""
MODEL = """id:str instruct:bool creatorId:str displayNameShort:str displayName:str tlensId:None
    dimension:None visibility:str defaultSourceSetName:None defaultSourceId:None
    inferenceEnabled:bool layers:int neuronsPerLayer:int createdAt:str owner:str updatedAt:str
    website:None"""
SET = """modelId:str name:str creatorId:str hasDashboards:bool visibility:str description:str
    type:str creatorName:str urls:[str] creatorEmail:None releaseName:str defaultOfModelId:None
    defaultRange:int defaultShowBreaks:bool showDfa:bool showCorrelated:bool
    showHeadAttribution:bool showUmap:bool createdAt:str"""
OF_SOURCE = """id:str modelId:str setName:str creatorId:str hasDashboards:bool
    inferenceEnabled:bool inferenceHosts:[str] saelensConfig:None saelensRelease:None
    saelensSaeId:None hfRepoId:None hfFolderId:None visibility:str defaultOfModelId:None
    hasUmap:bool hasUmapLogSparsity:bool hasUmapClusters:bool num_prompts:int
    num_tokens_in_prompt:int dataset:str notes:None createdAt:str"""


def type_of(value: object) -> str:
    if isinstance(value, list):
        return f"[{type_of(value[0])}]" if value else "[]"
    return type(value).__name__.replace("NoneType", "None")


def assert_rows(rows: list[dict], columns: str) -> None:
    """Rows have these columns alone, of these types; an empty list is of any."""
    kinds = dict(column.split(":") for column in columns.split())
    for row in rows:
        assert set(row) == set(kinds)
        for name, value in row.items():
            assert type_of(value) == kinds[name] or (value == [] and kinds[name][0] == "["), name


def test_the_bulk_layout_is_neuronpedia_s(made_up, tmp_path):
    neuronpedia.write(tmp_path, made_up, SOURCE, 4, MADE)
    about = {"release": RELEASE, "model": MODEL, "sourceset": SET, "source": OF_SOURCE}
    for name, columns in about.items():
        rows = read_lines(tmp_path / f"{name}.jsonl")
        assert len(rows) == 1
        assert_rows(rows, columns)
    tables = {name: read_lines(tmp_path / name / "batch-0.jsonl.gz")
              for name in ("features", "activations", "explanations")}  # fmt: skip
    for name, columns in zip(tables, (FEATURE, ACTIVATION, EXPLANATION), strict=True):
        assert_rows(tables[name], columns)
    assert [row["index"] for row in tables["features"]] == list(map(str, range(N)))
    assert len(tables["activations"]) == 12 * (N - N_DEAD)
    assert len(tables["explanations"]) == N - 1
    ids = [row["id"] for name in ("activations", "explanations") for row in tables[name]]
    assert len(set(ids)) == len(ids) and {len(each) for each in ids} == {25}
    first = tables["activations"][0]
    assert (first["layer"], first["index"], first["maxValueTokenIndex"]) == (
        "1-topk-res-300",
        "3",
        5,
    )
    assert (first["maxValue"], first["minValue"], first["binMin"]) == (8.0, 0.0, -1.0)
    assert (
        "\\u0000"
        not in gzip.decompress(
            (tmp_path / "activations" / "batch-0.jsonl.gz").read_bytes()
        ).decode()
    )


# sae_dashboard 0.8, neuronpedia/neuronpedia_dashboard.py.
DASHBOARD = """feature_index:int neuron_alignment_indices:[int] neuron_alignment_values:[float]
    neuron_alignment_l1:[float] correlated_neurons_indices:[int] correlated_neurons_l1:[float]
    correlated_neurons_pearson:[float] correlated_features_indices:[int]
    correlated_features_l1:[float] correlated_features_pearson:[float] neg_str:[str]
    neg_values:[float] pos_str:[str] pos_values:[float] frac_nonzero:float
    freq_hist_data_bar_values:[float] freq_hist_data_bar_heights:[int]
    logits_hist_data_bar_heights:[float] logits_hist_data_bar_values:[float] n_prompts_total:int
    n_tokens_in_prompt:int dataset:str decoder_weights_dist:[float] activations:[dict]
    vector:[float]"""
SEQUENCE = """bin_min:float bin_max:float bin_contains:float tokens:[str] values:[float]
    qualifying_token_index:int"""


def test_saedashboard_s_files(made_up, tmp_path):
    saedashboard.write(tmp_path, made_up, SOURCE)
    batches = [json.loads((tmp_path / f"batch-{i}.json").read_text("utf-8")) for i in range(3)]
    numbers = [feature["feature_index"] for batch in batches for feature in batch["features"]]
    assert numbers == list(range(N_DEAD, N)) and len(list(tmp_path.glob("batch*"))) == 3
    for batch in batches:
        about = {name: value for name, value in batch.items() if name != "features"}
        assert about == {"model_id": "tiny-llama", "layer": 1, "sae_set": "topk-res-300",
                         "sae_id_suffix": None}  # fmt: skip
        assert_rows(batch["features"], DASHBOARD)
        for feature in batch["features"]:
            assert_rows(feature["activations"], SEQUENCE)
    skipped = json.loads((tmp_path / "skipped_indexes.json").read_text())
    assert skipped == {"model_id": "tiny-llama", "layer": "1", "sae_set": "topk-res-300",
                       "log_sparsity": -4.0, "skipped_indexes": [0, 1, 2]}  # fmt: skip


def test_numbers_that_are_none_are_never_written(made_up, tmp_path):
    broken = copy.copy(made_up)
    broken.features = made_up.features.assign(frequency=np.nan)
    with pytest.raises(ValueError, match="Out of range float"):
        neuronpedia.write(tmp_path, broken, SOURCE, 4, MADE)
    with pytest.raises(ValueError, match="Out of range float"):
        saedashboard.write(tmp_path, broken, SOURCE)
    with pytest.raises(ValueError, match="Out of range float"):
        next(upload.read_batches(broken, SOURCE, "reading", 0))
    assert not list(tmp_path.glob("features/*")) + list(tmp_path.glob("batch*"))


def test_an_earlier_version_s_analysis_and_one_without_explanations(made_up):
    missing = ["promoted_values", "suppressed_values", "explanation"]
    earlier = copy.copy(made_up)
    earlier.features = made_up.features.drop(columns=missing)
    shown = list(dashboards.read_dashboards(earlier, "reading"))
    assert shown[N_DEAD].promoted == [] and shown[N_DEAD].explanation == "中"
    assert shown[0].explanation == ""


@pytest.mark.parametrize("tool", ["neuronpedia", "saedashboard"])
def test_an_export_that_was_killed_goes_on(made_up, tmp_path, monkeypatch, tool):
    module = {"neuronpedia": neuronpedia, "saedashboard": saedashboard}[tool]
    monkeypatch.setattr(dashboards, "TOGETHER", 48)
    monkeypatch.setattr(module, "PER_BATCH", 32)

    def write(folder):
        folder.mkdir(exist_ok=True)
        extra = (4, MADE) if tool == "neuronpedia" else ()
        module.write(folder, made_up, SOURCE, *extra)

    write(tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("**/*batch-9*"))) == (
        3 if tool == "neuronpedia" else 1
    )
    replacing, left = module.replacing, iter(range(11))

    def killed(path):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replacing(path)

    monkeypatch.setattr(module, "replacing", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut")
    begun = contents(tmp_path / "cut")
    monkeypatch.setattr(module, "replacing", replacing)
    written = [path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("**/batch-0*")]
    write(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(begun) == 11
    assert written == [path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("**/batch-0*")]


# ------------------------------------------------------------------------------------------ upload


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving() as neuronpedia_server:
        monkeypatch.setenv("NEURONPEDIA_URL", neuronpedia_server.address)
        monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
        monkeypatch.chdir(tmp_path)  # no .env of the machine's
        yield neuronpedia_server


def send(made_up, folder, analysis="a", source=SOURCE):
    client = upload.Client(upload.read_address(), upload.read_key())
    client.make_source(source, "words", lambda: 4)
    folder.mkdir(exist_ok=True)
    upload.upload(made_up, source, folder, analysis, client)


def sent_by(server, source=SOURCE) -> list[int]:
    """Features that the server holds, which must hold each once."""
    assert all(len(stored) == 1 for stored in server.features.values())
    assert {key[:2] for key in server.features} == {(source.model, source.id)}
    return sorted(index for _, _, index in server.features)


def uploads(server) -> list[float]:
    return [at for _, path, at in server.requests if path == "feature/upload-batch"]


def test_features_are_sent_as_neuronpedia_takes_them(server, made_up, tmp_path):
    send(made_up, tmp_path / "log")
    assert server.models == {"tiny-llama": 4}
    assert sent_by(server) == list(range(N_DEAD, N)) and len(uploads(server)) == 3
    feature = server.features["tiny-llama", "1-topk-res-300", N_DEAD][0]
    assert feature["density"] == 0.2 and len(feature["activations"]) == 12
    (explanation,) = feature["explanations"]
    assert len(explanation["text"].encode("utf-16-le")) == 1_024  # no emoji is cut in two
    assert explanation["text"].startswith("“中” 👍") and explanation["text"].endswith("👍")
    first, second = feature["activations"][0], feature["activations"][2]
    assert (first["quantileMin"], first["quantileMax"], first["quantileFraction"]) == (-1, 8, None)
    assert (second["quantileMin"], second["quantileMax"]) == (6.4, 8)
    begun = len(server.requests)
    send(made_up, tmp_path / "log")  # nothing is left
    assert [path for _, path, _ in server.requests[begun:]] == [
        "source-set/tiny-llama/topk-res-300"
    ]


def test_a_busy_and_a_failing_server_are_asked_again(server, made_up, tmp_path, capfd):
    lost = (502, {}, True)  # stored, but the answer does not arrive
    server.failures = [(429, {"Retry-After": "1"}, False), None, (500, {}, False), None, lost]
    send(made_up, tmp_path / "log")
    assert sent_by(server) == list(range(N_DEAD, N))
    first, second, *_ = uploads(server)
    assert second - first >= 1 and len(uploads(server)) == 5
    printed = capfd.readouterr()
    assert (
        "HTTP 429, as the test asks; the key was ***. Asking again in 1 s."
        in printed.err + printed.out
    )
    assert KEY not in printed.out + printed.err


def test_requests_are_of_at_most_so_many_bytes(server, made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "MOST_BYTES", 40_000)
    batches = list(upload.read_batches(made_up, SOURCE, "reading", 0))
    assert all(len(batch.body) <= 40_100 for batch in batches) and len(batches) > 10
    assert sum(batch.n_features for batch in batches) == N - N_DEAD
    send(made_up, tmp_path / "log")
    assert sent_by(server) == list(range(N_DEAD, N))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from utils.features import upload
from utils.features.catalogue import Catalogue
from utils.features.dashboards import Source
upload.MOST_FEATURES = 20
client = upload.Client(upload.read_address(), upload.read_key())
upload.upload(Catalogue({analysis!r}), Source(*{source!r}), Path({log!r}), "a", client)
"""


def test_an_upload_that_was_killed_goes_on_and_sends_nothing_twice(server, made_up, tmp_path):
    """Killed after Neuronpedia stored a batch, before it answered."""
    server.models, server.sets = {"tiny-llama": 4}, {("tiny-llama", "topk-res-300"): [SOURCE.id]}
    killed = threading.Event()
    left = iter(range(3))

    def kill():
        if next(left, None) is None and not killed.is_set():
            process.kill()
            process.wait()
            killed.set()

    server.accepted = kill
    log = tmp_path / "log"
    log.mkdir()
    code = KILLED.format(
        root=str(ROOT), analysis=str(made_up.folder), source=tuple(SOURCE), log=str(log)
    )
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment(), stderr=subprocess.PIPE
        )
        printed = process.communicate()[1].decode()
        assert KEY not in printed
    assert killed.is_set() and process.returncode == 0, printed
    assert sent_by(server) == list(range(N_DEAD, N)) and len(uploads(server)) == 15
    assert all(KEY not in path.read_text() for path in log.iterdir())


def test_what_neuronpedia_refuses_is_said_at_once(server, made_up, tmp_path, monkeypatch, capfd):
    def refused(words, **settings):
        begun = len(server.requests)
        with pytest.raises(InputError, match=words) as error:
            send(made_up, tmp_path / "log", **settings)
        assert KEY not in "".join(traceback.format_exception(error.value))
        return len(server.requests) - begun

    monkeypatch.setenv("NEURONPEDIA_API_KEY", "another")
    assert refused(r"HTTP 401, no such key: \*\*\*(?s:.*)Check NEURONPEDIA_API_KEY in .env") == 1
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    server.failures = [(413, {}, False), (404, {}, False), (307, {"Location": "http://x/"}, False)]
    refused(r"HTTP 413, as the test asks; the key was \*\*\*(?s:.*)too large")
    refused(r"HTTP 404, (?s:.*)no such model or source")
    refused("moved to http://x/(?s:.*)NEURONPEDIA_URL")
    server.sets["tiny-llama", "topk-res-300"] = ["0-topk-res-300"]
    refused("topk-res-300 of tiny-llama without 1-topk-res-300, with 0-topk-res-300")
    server.sets["tiny-llama", "topk-res-300"] = [SOURCE.id]
    monkeypatch.setattr(upload, "RETRIES", 1)
    server.failures = [(500, {}, False)] * 2
    refused(r"HTTP 500(?s:.*)another user made the source set")
    send(made_up, tmp_path / "log")
    refused("must hold one analysis", analysis="b")
    (tmp_path / "log" / "uploaded.jsonl").unlink()
    refused("must be empty; it has feature 3")
    assert sent_by(server) == list(range(N_DEAD, N))
    monkeypatch.setenv("NEURONPEDIA_URL", "http://127.0.0.1:1")
    refused("no connection")
    assert KEY not in "".join(capfd.readouterr())


def test_retry_after_is_a_number_or_a_date():
    def of(value):
        return upload.retry_after(httpx.Headers({"Retry-After": value}))

    assert of("12") == 12 and of("soon") is None and upload.retry_after(httpx.Headers()) is None
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < of(later) <= 31 and of("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_the_key_may_be_in_env(monkeypatch, tmp_path):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "")
    monkeypatch.delenv("NEURONPEDIA_API_KEY")  # and again after the test
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"NEURONPEDIA_API_KEY={KEY}\n")
    assert upload.read_key() == KEY


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_a_key_that_is_none_is_refused_and_not_shown(monkeypatch, tmp_path, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", key)
    with pytest.raises(InputError, match=r"NEURONPEDIA_API_KEY in \.env") as error:
        upload.read_key()
    assert not key or key not in str(error.value)


@pytest.mark.parametrize(
    "address", ["http://neuronpedia.org", "neuronpedia.org", "ftp://localhost"]
)
def test_the_key_is_sent_encrypted_alone(monkeypatch, address):
    monkeypatch.setenv("NEURONPEDIA_URL", address)
    with pytest.raises(InputError, match="must begin with https://"):
        upload.read_address()
    monkeypatch.setenv("NEURONPEDIA_URL", "https://me:secret@neuronpedia.org")
    with pytest.raises(InputError, match=r"must not hold a name or a password\.$"):
        upload.read_address()


# ------------------------------------------------------------------------------------- the command


def test_an_export_is_of_one_analysis(made_up, tmp_path, capsys):
    """An earlier version's, without values of promoted tokens, then that of this one."""
    folder = shutil.copytree(made_up.folder, tmp_path / "analysis")
    earlier = made_up.features.drop(columns=["promoted_values", "suppressed_values"])
    catalogue.save_features(folder / "features.parquet", earlier)

    def export(overwrite):
        settings = SimpleNamespace(
            script="analyze_features.py", export=("saedashboard",), export_dir=tmp_path / "export",
            upload=None, overwrite=overwrite,
        )  # fmt: skip
        share.share(settings, folder, SOURCE)
        path = tmp_path / "export" / "saedashboard" / "tiny-llama" / SOURCE.id / "batch-0.json"
        return json.loads(path.read_text())["features"][0]["pos_values"]

    assert export(False) == []
    assert "Promoted tokens are left out" in capsys.readouterr().out
    catalogue.save_features(folder / "features.parquet", made_up.features)
    with pytest.raises(InputError, match="with other settings:\n  ANALYSIS"):
        export(False)
    assert export(True) == [4.25, 3.0, 1.0]
    assert "Promoted" not in capsys.readouterr().out


def test_the_command_shares_a_finished_analysis(tiny_run, run_here, monkeypatch, tmp_path):
    flags = [*tiny_run.flags.analyze_features, "--export-dir", tmp_path]
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    with serving() as server:
        monkeypatch.setenv("NEURONPEDIA_URL", server.address)
        tools = ["--export", "neuronpedia", "saedashboard"]
        printed = run_here("analyze_features", *flags, *tools, "--upload", "preview").stdout
        assert not server.requests
        analysis = catalogue.Catalogue(tiny_run.folder / "analysis")
        alive = analysis.features["feature"][~analysis.features["dead"]].tolist()
        assert f"{len(alive)} features with examples" in printed
        named = "tiny/1-topk-res-128"
        printed += run_here("analyze_features", *flags, "--upload", "send").stdout
        assert f"as {named}" in printed and f"Sent: {server.address}/{named}" in printed
        assert sorted(index for *_, index in server.features) == alive
        assert server.models == {"tiny": 4}
    path = tmp_path / "neuronpedia" / named / "activations" / "batch-0.jsonl.gz"
    rows = read_lines(path)
    feature = alive[0]
    expected = analysis.examples_of([feature]).sort_values(["bucket", "rank"])
    found = [row for row in rows if row["index"] == str(feature)]
    assert len(found) == len(expected)
    for row, each in zip(found, expected.itertuples(), strict=True):
        assert row["maxValue"] == pytest.approx(each.activation, rel=1e-3)
        assert row["tokens"] == [text for text in each.token_texts if text]
        assert row["tokens"][row["qualifyingTokenIndex"]] == each.token_texts[each.peak]
    (about,) = read_lines(path.parents[1] / "source.jsonl")
    assert about["num_tokens_in_prompt"] == 32 and about["num_prompts"] == 49_152 // 32
    assert (tmp_path / "saedashboard" / named / "batch-0.json").exists()
    assert KEY not in printed
    assert not [name for name, content in contents(tmp_path).items() if KEY.encode() in content]
    assert KEY.encode() not in b"".join(contents(tiny_run.folder).values())

    wrong = run_here(
        "analyze_features", *flags, *tools, "--neuronpedia-source", "m1/2-ab", check=False
    )
    assert "must be of layer 1" in wrong.message
    wrong = run_here("analyze_features", *flags, *tools, "--search", "rose", check=False)
    assert "EXPORT and UPLOAD are of an analysis" in wrong.message
