"""Judges: a scripted server for refusals and retries, a real one, a local model; answers kept."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, environment

from utils.features.judge import (
    Answers,
    EndpointJudge,
    LocalJudge,
    ask_grades,
    ask_labels,
    open_judge,
)
from utils.features.questions import (
    DETECTION,
    FUZZING,
    grade_questions,
    label_question,
    marked_tokens,
    read_grades,
    read_label,
    show,
)
from utils.settings import InputError

KEY = "sk-secret-of-the-test"


# ---------------------------------------------------------------------------------- what is asked


def test_examples_are_shown_with_their_marks():
    token_texts, values = [" the", " war", "ship", "\n", " sank"], np.array([0, 4.0, 2.0, 0, 1.3])
    assert marked_tokens(values).tolist() == [False, True, True, False, True]
    text = show(token_texts, marked_tokens(values))
    assert "Text 1:  the<< warship>>⏎<< sank>>" in label_question([text])
    assert show(token_texts, np.zeros(5, bool)) == " the warship⏎ sank"


@pytest.mark.parametrize(
    ("pieces", "marked", "shown"),
    [
        (["a <", "b>", " c"], [0, 1, 0], "a <«b>» c"),  # next to << it would be another one
        (["cout << x", " >> y"], [1, 0], "«cout << x» >> y"),
        (["« <<", " x"], [0, 1], "« <<⟦1: x:1⟧"),
        (["⟦1: « <<", " x"], [0, 1], "⟦1: « <<⟦2: x:2⟧"),
        (["\ufdd0x\ufdd1", " y"], [1, 0], "<<\ufffdx\ufffd>> y"),
        (["x\r\nText 2:", "\u2028y"], [0, 1], "x⏎Text 2:<<⏎y>>"),
    ],
)
def test_markers_are_ones_that_the_text_does_not_hold(pieces, marked, shown):
    text = show(pieces, np.array(marked, bool))
    left = next(marker for marker in ("⟦2:", "⟦1:", "«", "<<") if marker in shown)
    for question in (label_question([text]), next(grade_questions(FUZZING, "x", [text, "no"]))):
        assert f"Text 1: {shown}\n" in question + "\n"
        assert f"between {left} and" in question or f"by {left} and" in question


def test_questions_hold_five_texts_each_and_any_sign():
    texts = [f"{{text}} {n}" for n in range(7)]
    first, second = grade_questions(DETECTION, "{label} of 100%", texts)
    assert "{label} of 100%" in first and "Text 5: {text} 4" in first and "these 5" in first
    assert "Text 2: {text} 6" in second and "Text 3" not in second
    assert "Text 1: a\nText 2: b" in label_question(["a", "b"])


@pytest.mark.parametrize(
    ("answer", "grades"),
    [
        ("[1, 0, 1]", [1, 0, 1]),
        ("Sure! [0,0,0] because", [0, 0, 0]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, true]", None),
        ("[1, 0, 'a']", None),
        ("1 0 1", [1, 0, 1]),
        ("1, 0,1\nfor", [1, 0, 1]),
        ("1. 0. 1", None),
        ("[1, 0, 11]", None),
        ("", None),
        ("[[1, 0, 1]]", [1, 0, 1]),
    ],
)
def test_grades_are_read_or_refused(answer, grades):
    assert read_grades(answer, 3, 1) == grades


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('"Words for war."\nThey all', "Words for war"),
        ("\n\n  ships ", "ships"),
        ("...", None),
        ("a" * 999, "a" * 200),
    ],
)
def test_labels_are_read_or_refused(answer, label):
    assert read_label(answer) == label


# -------------------------------------------------------------------------------- scripted server


class Scripted(BaseHTTPRequestHandler):
    """Answers with the text in capitals, after the refusals that the server still has to make."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], request))
        refusals = self.server.refusals
        status = refusals.pop(0) if refusals else 200
        content = {"error": {"message": f"refused; your key is {KEY}"}}
        if status == 200:
            text = self.server.answer(request["messages"][-1]["content"])
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            content["choices"] = [choice]
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After-Ms", "10")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.requests, server.refusals, server.answer = [], [], str.upper
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def same(answer: str, _prompt: str) -> str:
    return answer


def test_an_endpoint_is_asked_again_when_it_is_busy(server, tmp_path):
    server.refusals = [429, 503, 500]
    answers = Answers(EndpointJudge(server.url, "m"), tmp_path / "judge.jsonl")
    assert answers.ask("labels", ["a", "b", "c"], 7, same) == ["A", "B", "C"]
    assert len(server.requests) == 6
    path, authorization, request = server.requests[0]
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("m", 7, 0)


def test_a_failure_names_the_remedy_and_never_the_key(server, tmp_path, capsys):
    log = tmp_path / "judge.jsonl"
    answers = Answers(EndpointJudge(server.url, "m"), log)
    assert answers.ask("labels", ["a"], 7, same) == ["A"]
    server.refusals = [401]
    with pytest.raises(InputError, match=r"JUDGE_API_KEY in \.env") as refused:
        answers.ask("labels", ["a", "b"], 7, same)
    assert "***" in str(refused.value)
    again = Answers(EndpointJudge(server.url, "m"), log)
    assert again.ask("labels", ["a", "b"], 7, same) == ["A", "B"]
    asked = [request["messages"][0]["content"] for _, _, request in server.requests]
    assert asked == ["a", "b", "b"]  # what was answered before the failure is not asked again
    assert KEY not in str(refused.value) + log.read_text() + "".join(capsys.readouterr())


def test_answers_are_kept_and_those_that_do_not_parse_counted(server, tmp_path, capsys):
    log = tmp_path / "judge.jsonl"
    prompts = ["a", "1", "b", "a"]

    def read(answer, _):
        return int(answer) if answer.isdigit() else None

    for run in range(2):
        answers = Answers(EndpointJudge(server.url, "m"), log, price=(1e6, 1e5))
        assert answers.ask("labels", prompts, 7, read) == [None, 1, None, None]
        assert answers.summary()["asked"] == {"labels": 4}
        assert answers.summary()["unparsed"] == {"labels": 3}
        assert len(server.requests) == 3
        printed = capsys.readouterr().out
        expected = "3 questions to m at http" if run == 0 else ""
        assert printed.startswith(f"Labels: {expected}" if expected else "")
        assert ("about 1 tokens in, at most 21 out, 2.85 by JUDGE_PRICE" in printed) == (run == 0)
        with log.open("a") as file:
            file.write('{"key": "torn')  # by a kill
    Answers(EndpointJudge(server.url, "another"), log).ask("labels", ["a"], 7, read)
    Answers(EndpointJudge(server.url, "m"), log).ask("labels", ["a"], 8, read)
    assert len(server.requests) == 5
    assert len(Answers(EndpointJudge(server.url, "m"), log)._kept) == 5


def test_labels_and_grades_of_features(server, tmp_path):
    def answer(prompt):
        return "ships" if "in one phrase" in prompt else "[1, 0]" if "Text 2: no" in prompt else "?"

    server.answer = answer
    answers = Answers(EndpointJudge(server.url, "m"), tmp_path / "judge.jsonl")
    examples = pd.DataFrame(
        {"feature": [4, 4], "token_texts": [["a"], ["b"]], "activations": [[1], [2]]}
    )
    assert ask_labels(examples, answers) == {4: "ships"}
    features = pd.Series([4, 7, 9, 4, 7])
    shown, labels = ["yes", "yes", "yes", "no", "?"], {4: "ships", 7: "tides"}
    grades = ask_grades(DETECTION, features, labels, shown, answers)
    np.testing.assert_array_equal(grades, [1, np.nan, np.nan, 0, np.nan])
    assert answers.unparsed == {"labels": 0, "detection": 1}


def test_an_analysis_with_a_judge_goes_on_where_it_was(server, tiny_run, tmp_path, run_here):
    flags = [*tiny_run.flags.analyze_features[:-1], tmp_path / "analysis"]
    flags += ["--studies", "specificity", "explanations", "--n-studied", 3, "--n-explained", 3]
    flags += ["--n-neuron-tokens", 8_192, "--judge", "m", "--judge-url", server.url]
    server.answer, server.refusals = lambda _: "Well.", [200] * 40 + [401]
    stopped = run_here("analyze_features", *flags, check=False)
    assert "Answers so far are kept" in stopped.message
    kept = (tmp_path / "analysis" / "judge.jsonl").read_text().count("\n")
    assert kept >= 40 - 8
    before = len(server.requests)
    printed = run_here("analyze_features", *flags).stdout
    summary = json.loads((tmp_path / "analysis" / "summary.json").read_text())
    found = summary["explanations"]
    assert found["judge"] == f"m at {server.url}" and "score" not in found
    assert found["unparsed"]["labels"] == 0 < found["unparsed"]["fuzzing"]
    assert set(found["asked"]) == {"labels", "detection", "fuzzing"}
    unread = f"{found['unparsed']['fuzzing']} of {found['asked']['fuzzing']} answers (fuzzing)"
    assert f"Judge: {unread} could not be read." in printed
    assert summary["specificity"] == []
    assert pd.read_csv(tmp_path / "analysis" / "specificity.csv")["score"].isna().all()
    assert "answers cannot be read and are left out" in stopped.stdout
    features = pd.read_parquet(tmp_path / "analysis" / "features.parquet")
    assert features["explanation_score"].isna().all() and (features["explanation"] == "Well").any()
    lines = (tmp_path / "analysis" / "judge.jsonl").read_text().splitlines()
    assert len(lines) == kept + len(server.requests) - before  # none was asked twice
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--judge-url", "http://127.0.0.1:1/v1"], "JUDGE_URL needs JUDGE"),
        (["--judge", "m", "--judge-url", "127.0.0.1"], "must be an http or https address"),
        (["--judge", "m", "--judge-url", "http://me:pw@host/v1"], "Put the key into .env"),
        (["--judge-price", -1, 1], "JUDGE_PRICE must not be negative"),
    ],
)
def test_settings_that_cannot_be_meant(run_here, flags, rule):
    refused = run_here("analyze_features", *flags, check=False)
    assert refused.returncode == 1 and rule in refused.message and "pw" not in refused.message


# -------------------------------------------------------------------------------------- real ones


def test_a_local_judge_answers_each_prompt_as_if_alone(tiny_model, tmp_path):
    folder = tmp_path / "instruct"
    shutil.copytree(tiny_model, folder)
    with pytest.raises(InputError, match="has no chat template"):
        list(LocalJudge(str(folder)).ask(["rose"], 4))
    template = "{% for m in messages %}{{ '<bos>' + m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    judge = LocalJudge(str(folder))
    prompts = ["rose tulip", "ship", "tide crane dock sail rope"]
    together = dict(judge.ask(prompts, 6))
    alone = {i: next(judge.ask([prompt], 6))[1] for i, prompt in enumerate(prompts)}
    assert together == alone and all(together.values())


def test_settings_choose_the_judge(tmp_path):
    settings = SimpleNamespace(judge=None, judge_url=None, judge_price=None)
    assert open_judge(settings, tmp_path) is None
    settings.judge = "embedded"
    assert isinstance(open_judge(settings, tmp_path).judge, LocalJudge)
    settings.judge_url = "http://127.0.0.1:1/v1"
    assert open_judge(settings, tmp_path).judge.name == "embedded at http://127.0.0.1:1/v1"


@contextlib.contextmanager
def serving(model: Path) -> Iterator[str]:
    """The address of a `transformers serve` of a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def test_a_real_server_and_the_same_model_here(embedded_model, tmp_path):
    prompt = "What is the capital of France? Answer in one word."
    texts = [prompt, next(iter(grade_questions(DETECTION, "ships", ["the ship sank"])))]
    with serving(embedded_model) as url:
        there = Answers(EndpointJudge(url, str(embedded_model)), tmp_path / "there.jsonl")
        answered = there.ask("labels", texts, 6, lambda answer, _: read_label(answer))
        one_token = there.ask(
            "detection", texts[1:], 1, lambda answer, _: read_grades(answer, 1, 1)
        )
    here = Answers(LocalJudge(str(embedded_model)), tmp_path / "here.jsonl")
    local = here.ask("labels", texts, 6, lambda answer, _: read_label(answer))
    assert "Paris" in answered[0] and "Paris" in local[0] and None not in (answered[1], local[1])
    assert one_token == [None]  # a list does not fit into one token
    assert there.unparsed == {"labels": 0, "detection": 1} and here.unparsed == {"labels": 0}
