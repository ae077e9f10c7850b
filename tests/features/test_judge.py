"""Judges: a scripted server for refusals and retries, a real one, a local model; answers kept."""

import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
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
    LONGER,
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


def as_label(answer, _prompt):
    return read_label(answer)


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
        ("<think>\nSay [0, 0, 0]? No.\n</think>\n\n[1, 0, 1]", [1, 0, 1]),
        ("<think>\nIt may be [0, 0, 0], or", None),
        ("Say [0, 0, 0]? No.\n</think>\n[1, 0, 1]", [1, 0, 1]),
        ("As in the example [0, 1, 0]: I would say\n[1, 0, 1]", [1, 0, 1]),
        ("**[1, 0, 1]**, as [2] and [tides, at, sea] say", [1, 0, 1]),
        ("Of the grades (0, 1, 0): [1, 0, 1]", [1, 0, 1]),
        ("[0, 0, 0] is wrong, it is [1, 0, 7]", None),
        ("Answer: 1, 0, 1.", [1, 0, 1]),
        ("Text 1: 1\nText 2: 0\nText 3: 1", [1, 0, 1]),
        ("Text 1: 1\nText 3: 0\nText 2: 1", None),
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
        ("<think>\nShips, perhaps.\n</think>\n\nWords for war", "Words for war"),
        ("<think></think>ships", "ships"),
        ("[THINK]Ships?[/THINK]\nships", "ships"),
        ("◁think▷Ships?◁/think▷ships", "ships"),
        ("<|channel|>analysis<|message|>Ships?<|end|><|channel|>final<|message|>ships", "ships"),
        ("The texts are of ships.\n</think>\nships", "ships"),
        ("<think>\nOkay, so the user", None),
        ("the </think> tag in chats", "the </think> tag in chats"),
        ("Sure! Here is the phrase:\n\n**Words for war.**", "Words for war"),
        ("Sure!\nWords for war", "Words for war"),
        ("Here's a phrase for these texts: “Words for war”", "Words for war"),
        ("**Label:** Words for war", "Words for war"),
        ('```json\n{"label": "Words for war"}\n```', "Words for war"),
        ("- ships: their names", "ships: their names"),
        ("The phrase is:", None),
        ("I'm sorry, but I can't help with that.", None),
        ('"I can\'t" and "I cannot"', 'I can\'t" and "I cannot'),
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
        if (refused := self.server.refuse(request)) is not None:
            status, content = refused
        elif status == 200:
            asked = request["messages"][-1]["content"]
            text = self.server.answer(asked)
            if callable(text):  # of the number of tokens there is room for
                text = text(request.get("max_tokens") or request["max_completion_tokens"])
            message = {"role": "assistant", "content": text}
            message |= text if isinstance(text, dict) else {}
            reason = message.pop("finish_reason", "stop")
            choice = {"index": 0, "message": message, "finish_reason": reason}
            content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            content["choices"] = [] if text is None else [choice]
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
    server.refuse = lambda _request: None
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


def test_half_a_surrogate_in_an_answer_is_no_fault(server, tmp_path):
    server.answer = "heart \ud83d".format
    answers = Answers(EndpointJudge(server.url, "m"), tmp_path / "judge.jsonl")
    assert answers.ask("labels", ["a"], 7, same) == ["heart ?"]
    assert Answers(answers.judge, answers.path).ask("labels", ["a"], 7, same) == ["heart ?"]
    assert len(server.requests) == 1


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
        expected = "3 questions to m, " if run == 0 else ""
        assert printed.startswith(f"Labels: {expected}" if expected else "")
        assert (
            "about 1 tokens in, at most 21 out besides thinking, 2.85 by JUDGE_PRICE" in printed
        ) == (run == 0)
        with log.open("a") as file:
            file.write('{"key": "torn')  # by a kill
    Answers(EndpointJudge(server.url, "another"), log).ask("labels", ["a"], 7, same)
    assert len(server.requests) == 4
    assert len(Answers(EndpointJudge(server.url, "m"), log)._kept) == 4


def test_answers_are_kept_for_the_model_wherever_it_is_served(server, tmp_path):
    """Also those of earlier versions, but for their failures: empty, or cut off in thinking."""
    log, elsewhere = tmp_path / "judge.jsonl", "http://127.0.0.1:1/v1"
    assert Answers(EndpointJudge(server.url, "m"), log).ask("labels", ["a"], 7, same) == ["A"]
    moved = Answers(EndpointJudge(elsewhere, "m"), log)
    assert moved.ask("labels", ["a"], 7, same) == ["A"]
    with log.open("a") as file:
        for prompt, answer in {"b": "kept", "c": "", "d": "<think>\nSo"}.items():
            content = json.dumps([f"m at {server.url}", 7, prompt])
            key = hashlib.sha256(content.encode()).hexdigest()[:32]
            file.write(json.dumps({"key": key, "prompt": prompt, "answer": answer}) + "\n")
    again = Answers(EndpointJudge(server.url, "m"), log)
    assert again.ask("labels", ["a", "b", "c", "d"], 7, same) == ["A", "kept", "C", "D"]
    assert len(server.requests) == 3


def test_a_thinking_judge_gets_room(server, tmp_path):
    def think(prompt):
        def answer(room):
            if room < 100:
                return {"content": "<think>\nSo", "finish_reason": "length"}
            return f"<think>\nSo.\n</think>\n{prompt}"

        return answer

    server.answer = think
    answers = Answers(EndpointJudge(server.url, "m"), tmp_path / "judge.jsonl")
    assert answers.ask("labels", ["a"], 7, as_label) == ["a"]
    assert [request["max_tokens"] for _, _, request in server.requests] == [7, LONGER]
    assert answers.ask("labels", ["b", "c"], 7, as_label) == ["b", "c"]
    assert [request["max_tokens"] for _, _, request in server.requests[2:]] == [LONGER] * 2
    server.refuse = lambda request: (
        (400, {"error": {"message": "max_tokens is too large: 4096"}})
        if request["max_tokens"] == LONGER
        else None
    )
    assert answers.ask("labels", ["d"], 7, as_label) == ["d"]  # with what its context has room for
    server.answer = lambda _: {"reasoning_content": "So.", "content": "tides"}
    assert answers.ask("labels", ["e"], 7, as_label) == ["tides"]
    server.answer = lambda _: {"content": [
        {"type": "thinking", "thinking": []}, {"type": "text", "text": "ships"}
    ]}  # fmt: skip
    assert answers.ask("labels", ["f"], 7, as_label) == ["ships"]


def test_failures_are_counted_by_reason_and_asked_again(server, tmp_path, capsys):
    """One bad question never fails the rest."""
    refused = {"error": {"message": "not this one", "code": "content_filter"}}
    server.refuse = lambda request: (
        (400, refused) if "filtered" in request["messages"][0]["content"] else None
    )
    server.answer = lambda prompt: {
        "nothing": None, "empty": "", "long": {"content": "So", "finish_reason": "length"},
        "withheld": {"content": None, "refusal": "no"},
    }.get(prompt, prompt)  # fmt: skip
    log = tmp_path / "judge.jsonl"
    prompts = ["a", "filtered", "nothing", "empty", "long", "withheld", "unread"]
    for _ in range(2):
        answers = Answers(EndpointJudge(server.url, "m"), log)
        answered = answers.ask("labels", prompts, 7, lambda a, _: a if a == "a" else None)
        assert answered == ["a"] + [None] * 6
        assert answers.summary()["reasons"] == {"labels": {
            "HTTP 400: content_filter": 1, "no answer in the response (HTTP 200)": 1,
            "an empty answer": 1, "refused by the judge's content filter": 1,
            "the answer does not end in the tokens there is room for": 1,
            "not in the form asked for": 1,
        }}  # fmt: skip
        assert "Judge: 6 of 7 answers (labels) could not be read: " in answers.in_words()[0]
    assert [json.loads(line)["prompt"] for line in log.read_text().splitlines()] == ["a", "unread"]
    server.refuse, server.answer = lambda _: None, str.upper
    again = Answers(EndpointJudge(server.url, "m"), log)
    answered = again.ask("labels", prompts, 7, same)
    assert answered == ["a", "FILTERED", "NOTHING", "EMPTY", "LONG", "WITHHELD", "unread"]


def test_what_others_were_paid_for_is_kept_when_a_request_fails(server, tmp_path):
    prompts = [f"slow {i}" for i in range(7)] + ["key"]
    refused = 401, {"error": {"message": "no"}}
    server.refuse = lambda request: refused if "key" in str(request["messages"]) else None
    server.answer = lambda prompt: time.sleep(0.5) or prompt
    log = tmp_path / "judge.jsonl"
    with pytest.raises(InputError, match="Answers so far are kept"):
        Answers(EndpointJudge(server.url, "m"), log).ask("labels", prompts, 7, same)
    kept = {json.loads(line)["prompt"] for line in log.read_text().splitlines()}
    assert kept == set(prompts[:7])


def test_what_a_model_refuses_to_be_told_is_left_out(server, tmp_path):
    def refuse(request):
        for name, words in {
            "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.",
            "temperature": "'temperature' does not support 0 with this model.",
        }.items():
            if name in request:
                return 400, {"error": {"message": words, "param": name}}
        return None

    server.refuse = refuse
    answers = Answers(EndpointJudge(server.url, "m"), tmp_path / "judge.jsonl")
    assert answers.ask("labels", ["a"], 7, same) == ["A"]
    assert len(server.requests) == 3 and server.requests[-1][2]["max_completion_tokens"] == 7
    assert answers.ask("labels", ["b", "c"], 7, same) == ["B", "C"]
    assert len(server.requests) == 5  # learnt once


def test_a_study_of_which_nothing_can_be_read_has_failed(server, tmp_path):
    answers = Answers(EndpointJudge(server.url, "m"), tmp_path / "judge.jsonl")
    server.refuse = lambda _: (400, {"error": {"message": "context of 128 tokens"}})
    rule = r"no answer \(labels\) that can be read: HTTP 400: context of N tokens \(2\)\. Name"
    with pytest.raises(InputError, match=rule):
        answers.ask("labels", ["a", "b"], 7, same)
    server.refuse = lambda _: None
    assert answers.ask("labels", ["a", "b"], 7, same) == ["A", "B"]
    answers.ask("labels", ["c"], 7, lambda *_: None)  # not all of the study's


def test_a_server_that_is_down_ends_the_study(server, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.features.judge.RETRIES", 0)
    log = tmp_path / "judge.jsonl"
    server.refuse = lambda request: (500, {}) if request["messages"][0]["content"] == "3" else None
    prompts = [str(i) for i in range(40)]
    answered = Answers(EndpointJudge(server.url, "m"), log).ask("labels", prompts, 7, same)
    assert [i for i, answer in enumerate(answered) if answer is None] == [3]
    server.refuse = lambda _: (503, {})
    with pytest.raises(InputError, match="Answers so far are kept"):
        Answers(EndpointJudge(server.url, "n"), log).ask("labels", prompts, 7, same)
    assert len(server.requests) < 40 + 40


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

    def answer(prompt):
        if "in one phrase" in prompt:
            return "Well."
        n_texts = prompt.count("\nText ")
        return "Hm." if zlib.crc32(prompt.encode()) % 3 == 0 else str([1, 0, 1, 0, 1][:n_texts])

    server.answer = answer
    server.refuse = lambda request: (
        (400, {"error": {"message": "no"}}) if "0 to 3" in str(request) else None
    )
    failed = run_here("analyze_features", *flags, check=False)
    assert "no answer (rubric) that can be read: HTTP 400: no" in failed.message
    assert not list((tmp_path / "analysis").glob("study-specificity*"))
    log = tmp_path / "analysis" / "judge.jsonl"
    labels = log.read_text().count("\n")
    server.refuse, server.refusals = lambda _: None, [200] * 40 + [401]
    stopped = run_here("analyze_features", *flags, check=False)
    assert "Answers so far are kept" in stopped.message
    kept = log.read_text().count("\n")
    assert kept >= labels + 40
    before = len(server.requests)
    printed = run_here("analyze_features", *flags).stdout
    summary = json.loads((tmp_path / "analysis" / "summary.json").read_text())
    assert set(summary["judge"]) == {"specificity", "explanations"}
    counts = summary["judge"]["explanations"]
    assert counts["judge"] == "m" and set(counts["asked"]) == {"labels", "detection", "fuzzing"}
    assert counts["unparsed"]["labels"] == 0 < counts["unparsed"]["fuzzing"]
    assert counts["reasons"]["fuzzing"] == {
        "not in the form asked for": counts["unparsed"]["fuzzing"]
    }
    unread = f"{counts['unparsed']['fuzzing']} of {counts['asked']['fuzzing']} answers (fuzzing)"
    assert f"Judge: {unread} could not be read: not in the form asked for (" in printed
    assert "answers (rubric) could not be read" in printed
    assert pd.read_csv(tmp_path / "analysis" / "specificity.csv")["score"].isna().any()
    assert "answers cannot be read and are left out" in stopped.stdout
    features = pd.read_parquet(tmp_path / "analysis" / "features.parquet")
    assert (features["explanation"] == "Well").any()
    lines = log.read_text().splitlines()
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


def test_a_local_judge_that_thinks_gets_room(tiny_model, tmp_path):
    """Its template may open the thinking; a question longer than its context is left out alone."""
    template = "{% for m in messages %}{{ '<bos>' + m['content'] + '\n<think>END\n' }}{% endfor %}"
    prompts = ["rose tulip", "ship " * 300, "sail"]
    for end, reasons in {"</think>": 0, "": 2}.items():
        folder = tmp_path / f"{reasons}"
        shutil.copytree(tiny_model, folder)
        (folder / "chat_template.jinja").write_text(template.replace("END", end))
        answers = Answers(LocalJudge(str(folder)), tmp_path / f"{reasons}.jsonl")
        given = dict(answers.judge.ask(prompts, 4))
        thoughts = [answer for answer in given.values() if str(answer).startswith("<think>")]
        assert len(thoughts) == reasons and all(len(thought) > 100 for thought in thoughts)
        if not reasons:
            labels = answers.ask("labels", prompts, 4, as_label)
            assert labels[0] and labels[1] is None and labels[2]
        else:
            with pytest.raises(InputError, match=r"thinking without an end \(2\)"):
                answers.ask("labels", prompts, 4, as_label)
        assert answers.reasons["labels"]["the question is longer than the judge's context"] == 1


def test_settings_choose_the_judge(tmp_path):
    settings = SimpleNamespace(judge=None, judge_url=None, judge_price=None)
    assert open_judge(settings, tmp_path) is None
    settings.judge = "embedded"
    assert isinstance(open_judge(settings, tmp_path).judge, LocalJudge)
    settings.judge_url = "http://127.0.0.1:1/v1"
    assert isinstance(open_judge(settings, tmp_path).judge, EndpointJudge)


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
        grades = there.ask("detection", texts[1:], 1, lambda answer, _: answer)
    here = Answers(LocalJudge(str(embedded_model)), tmp_path / "here.jsonl")
    local = here.ask("labels", texts, 6, lambda answer, _: read_label(answer))
    assert "Paris" in answered[0] and "Paris" in local[0] and None not in (answered[1], local[1])
    assert len(grades[0]) > 2  # a list does not fit into one token: there is room for more
    assert there.unparsed == {"labels": 0, "detection": 0} and here.unparsed == {"labels": 0}
