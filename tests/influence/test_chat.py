"""The chat, by its user's command in a pseudo-terminal."""

import io
import json
import shutil
import signal
from types import SimpleNamespace

import pexpect
import pytest
from conftest import ROOT, command, environment

from utils.artifacts import write_json
from utils.features.catalogue import Catalogue
from utils.influence.chat import Chat, printable

PROMPT = "\r\n> "


@pytest.fixture(scope="module")
def feature(tiny_run):
    return int(Catalogue(tiny_run.folder / "analysis").search("rose", 1)["feature"].iloc[0])


@pytest.fixture(scope="module")
def analysis(tiny_run, tiny_model, tmp_path_factory):
    """The analysis, of a model that has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    model = shutil.copytree(tiny_model, folder / "model")
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    analysis = shutil.copytree(tiny_run.folder / "analysis", folder / "analysis")
    summary = json.loads((analysis / "summary.json").read_text())
    write_json(analysis / "summary.json", summary | {"model_name": str(model)})
    return analysis


@pytest.fixture
def say(tiny_run, analysis, request):
    """Type a line; the answer, up to where the next line can be typed."""
    flags = [*tiny_run.flags.influence_folders, "--chat", "--max-new-tokens", request.param]
    flags += ["--analysis-dir", analysis]
    program, *words = command("influence_llm", *flags)
    child = pexpect.spawn(
        program, words, cwd=ROOT, env=environment(TERM="dumb"), encoding="utf-8",
        codec_errors="replace", timeout=60, dimensions=(50, 200),
        # As in a terminal: what starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    child.expect(PROMPT)

    def say(line):
        child.sendline(line)
        child.expect(PROMPT)
        return child.before.partition("\r\n")[2]

    say.child = child
    yield say
    child.close(force=True)


@pytest.mark.parametrize("say", [20], indirect=True)
def test_steering_on_and_off_in_mid_chat(say, feature):
    assert "/clamp FEATURE STRENGTH" in say("/help")
    assert f"Feature {feature}:" in say("/find rose")
    untouched = say("rose tulip")
    assert untouched.strip()
    # The conversation goes on, and with a feature clamped it goes on differently.
    assert f"Steering on: {feature} (" in say(f"/clamp {feature} 10")
    say("/reset")
    say(f"/clamp {feature} 10")
    steered = say("rose tulip")
    assert steered != untouched
    say("/reset")
    say(f"/clamp {feature} 10")
    assert "Steering off" in say("/off")
    assert say("rose tulip") == untouched
    second = say("ship")
    say("/reset")
    say(f"/clamp {feature} 10")
    say("/off")
    assert say("rose tulip") == untouched
    assert "Steering on" in say("/on")
    assert say("ship") != second


@pytest.mark.parametrize("say", [20], indirect=True)
def test_mistakes_are_told_and_the_chat_goes_on(say, feature):
    for line, told in [
        ("/clamp 100000 1", "100000 is none"),
        (f"/clamp {feature} nan", "nan is not"),
        ("/clamp rose", "as in /clamp 12 1.5"),
        ("/find nowordlikethis", "No feature goes by"),
        ("/nonsense", "/quit"),
        ("rose " * 300, "leave room"),
        ("/features", "no feature"),
    ]:
        assert told in say(line)


@pytest.mark.parametrize("say", [240], indirect=True)
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(say):
    child = say.child
    whole = say("rose tulip")
    for _ in range(5):  # on a busy machine the Ctrl-C may come after the answer's end
        say("/reset")
        child.sendline("rose tulip")
        child.expect("rose tulip\r\n.")
        child.sendintr()
        stopped = not child.expect([r"\(stopped\)", PROMPT])
        answer = child.before
        child.sendline("/nonsense")  # its output shows where the next line can be typed
        child.expect("/quit .*" + PROMPT)
        if stopped:
            break
    assert stopped and len(answer) < len(whole)
    assert "Steering" in say("/features")
    child.sendintr()  # with no answer to stop
    child.expect("Ctrl-D leaves")
    child.expect(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def test_a_model_without_a_chat_template_is_refused(tiny_run, run_here):
    ended = run_here("influence_llm", *tiny_run.flags.influence_folders, "--chat", check=False)
    assert "need a model with a chat template" in ended.message


def test_an_answer_cannot_command_the_terminal():
    assert printable("a\x1b[2J\rb\nc\x07é") == "a[2Jb\ncé"


class Interrupted(Chat):
    """A chat without a model, whose answers end before their first token."""

    def __init__(self):
        self.model = SimpleNamespace(language_model=SimpleNamespace(name="m"))
        self.settings = SimpleNamespace(max_new_tokens=1)

    def answer(self, line):
        raise KeyboardInterrupt


def test_a_message_of_another_encoding_does_not_end_the_chat(monkeypatch, capsys):
    typed = io.BytesIO(b"caf\xe9\n" + b" " * 2**20 + b"rose\n")  # far enough to be read apart
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8"))
    Interrupted().run()
    printed = capsys.readouterr().out
    assert printed.index("A message must be UTF-8") < printed.index("(stopped)")


def test_ctrl_c_before_the_first_token_does_not_end_the_chat(monkeypatch, capsys):
    lines = iter(["rose", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    Interrupted().run()
    assert "(stopped)" in capsys.readouterr().out and next(lines, None) is None
