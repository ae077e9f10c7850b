"""The playground, driven in Chromium by what a visitor does; two visitors at once."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command, environment
from keras import ops
from playwright.sync_api import Page, expect, sync_playwright

from utils.features.catalogue import Catalogue
from utils.influence.generations import load_model
from utils.influence.playground import HOST, N_OFFERED, Playground
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PROMPT = "rose tulip ship"
SECONDS = 60_000  # milliseconds; a page waits for what it expects at most so long


@pytest.fixture(scope="module")
def playground(tiny_run):
    catalogue = Catalogue(tiny_run.folder / "analysis")
    path = tiny_run.folder / "autoencoder" / "autoencoder.keras"
    return Playground(catalogue, load_model(catalogue, path))


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def address(tiny_run):
    """Of the page, served by the user's command."""
    port = free_port()
    flags = [*tiny_run.flags.influence_folders, "--prompt", "rose tulip ship"]
    flags += ["--max-new-tokens", 100, "--playground", "--port", port]
    process = subprocess.Popen(
        command("influence_llm", *flags), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    with process:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection((HOST, port)):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield f"http://{HOST}:{port}"
        process.terminate()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open the page as another visitor; nothing but this machine may be asked for anything."""
    visitors = []

    def open_page() -> Page:
        visitor = browser.new_context()
        asked = []
        visitor.on("request", lambda request: asked.append(request.url))
        visitors.append((visitor, asked))
        page = visitor.new_page()
        page.set_default_timeout(SECONDS)
        page.goto(address)
        expect(page.locator("#tokens .token").first).to_be_visible(timeout=SECONDS)
        return page

    yield open_page
    for visitor, asked in visitors:
        elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        visitor.close()
        assert not elsewhere


def text_of(page: Page, name: str) -> str:
    return page.locator(f"#{name} textarea").input_value()


def turn(page: Page, words: str, strength: float) -> None:
    """Find a feature, look at it, turn it."""
    page.locator("#words input, #words textarea").first.fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_contain_text(f"Found for '{words}'", timeout=SECONDS)
    page.locator("#found label").first.click()
    expect(page.locator("#about textarea")).to_have_value(re.compile("^Active on"), timeout=SECONDS)
    page.click("#turn")
    slider = page.locator("#slider-0 input[type=number]")
    expect(slider).to_have_value("1", timeout=SECONDS)
    slider.fill(str(strength))
    slider.press("Tab")


def finished(page: Page) -> SimpleNamespace:
    """The two texts, once they have stopped growing; one may end before its first character."""
    seen = None
    for _ in range(120):
        now = (text_of(page, "untouched"), text_of(page, "steered"))
        if now == seen and any(now):
            return SimpleNamespace(untouched=now[0], steered=now[1])
        seen = now
        time.sleep(1)
    raise AssertionError("no text after two minutes")


def strongest(playground: Playground) -> int:
    return playground.features_at(PROMPT, False, 3)[0][0]


@needs_chromium
def test_search_turn_generate(visit, playground):
    page = visit()
    page.fill("#prompt textarea", PROMPT)
    turn(page, str(strongest(playground)), 10)
    page.click("#go")
    texts = finished(page)
    assert texts.untouched != texts.steered
    strengths = {strongest(playground): 10.0}
    *_, expected = playground.write(PROMPT, False, strengths, 100)
    assert (texts.untouched, texts.steered) == expected
    page.click("#remove-0")
    expect(page.locator("#slider-0")).to_be_hidden(timeout=SECONDS)
    page.click("#go")
    expect(page.locator("#steered textarea")).to_have_value(texts.untouched, timeout=SECONDS)


@needs_chromium
def test_words_and_tokens_find_features(visit, playground):
    page = visit()
    turn(page, "rose", 1)
    first = playground.catalogue.search("rose", 1)["feature"].iloc[0]
    assert page.locator("#found label").first.inner_text().startswith(f"{first} ")
    page.fill("#prompt textarea", PROMPT)
    expect(page.locator("#tokens .token").nth(3)).to_have_text(" ship", timeout=SECONDS)
    page.locator("#tokens .token").nth(3).click()
    feature, activation = playground.features_at(PROMPT, False, 3)[0]
    expect(page.locator("#at_token label").first).to_have_text(
        re.compile(rf"^\s*{feature} · .*: {activation:.2f}\s*$"), timeout=SECONDS
    )


STOP_AT_FIRST_WORDS = """() => {
    const watch = setInterval(() => {
        if (document.querySelector("#untouched textarea").value) {
            document.querySelector("#stop").click();
            clearInterval(watch);
        }
    }, 5)
}"""


@needs_chromium
def test_stop_ends_the_text_where_it_is(visit, playground):
    *_, (whole, _) = playground.write(PROMPT, False, {}, 240)
    lengths = []
    for _ in range(3):  # so small a model may be done before the click arrives
        page = visit()
        page.fill("#prompt textarea", PROMPT)
        page.get_by_label("New tokens").fill("240")
        page.evaluate(STOP_AT_FIRST_WORDS)
        page.click("#go")
        stopped = finished(page).untouched
        assert whole.startswith(stopped)
        lengths.append(len(stopped))
        if lengths[-1] < len(whole):
            break
    assert lengths[-1] < len(whole)


@needs_chromium
def test_two_visitors_at_once_do_not_share_features(visit, playground):
    one, other = visit(), visit()
    for page in (one, other):
        page.fill("#prompt textarea", PROMPT)
    turn(one, str(strongest(playground)), 10)
    expect(other.locator("#slider-0")).to_be_hidden()
    for page in (one, other):
        page.click("#go")
    turned, plain = finished(one), finished(other)
    assert plain.untouched == plain.steered == turned.untouched != turned.steered


@needs_chromium
def test_a_prompt_with_html_stays_text(visit):
    page = visit()
    prompt = "<img src=x onerror=\"document.title='owned'\"><b id=bold>rose</b><script>1</script>"
    page.fill("#prompt textarea", prompt)
    page.locator("#words input, #words textarea").first.fill(prompt)
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_contain_text("<b id=bold>", timeout=SECONDS)
    page.wait_for_function(
        """prompt => [...document.querySelectorAll("#tokens .text")]
            .map(token => token.textContent).join("").endsWith(prompt)""",
        arg=prompt,
    )
    page.click("#go")
    finished(page)
    assert page.title() == "Playground"
    assert page.locator("#bold, img[src=x]").count() == 0


def test_features_of_a_token_are_the_largest_of_its_latents(playground):
    model = playground.model
    tokens = prompt_tokens(model.language_model, PROMPT)
    residual = model.residual(tokens)[0]
    latents = ops.convert_to_tensor(model.autoencoder.encode(residual)).detach()
    expected = latents * ops.norm(model.autoencoder.W_dec, axis=1).detach()
    for position in range(1, tokens.shape[1]):
        pairs = playground.features_at(PROMPT, False, position)
        assert 0 < len(pairs) <= N_OFFERED
        features, activations = zip(*pairs, strict=True)
        values = torch.tensor(activations)
        torch.testing.assert_close(values, expected[position, list(features)])
        assert values.tolist() == sorted(values.tolist(), reverse=True)
        assert values[0] == pytest.approx(expected[position].max().item(), rel=1e-5)
    # Every position is above a norm of 0.
    strict = FeatureModel(model.language_model, model.layer, model.autoencoder, 0.0)
    assert Playground(playground.catalogue, strict).features_at(PROMPT, False, 2) == []


def test_dead_and_missing_features_are_not_found(playground, monkeypatch):
    features, feature = playground.catalogue.features.copy(), strongest(playground)
    assert playground.find(str(len(features))) == playground.find("nowordlikethis") == []
    assert playground.find(str(feature)) == [feature]
    features.loc[feature, "dead"] = True
    monkeypatch.setattr(playground.catalogue, "features", features)
    assert playground.find(str(feature)) == []


def test_a_port_that_is_taken_is_refused(tiny_run, run_here):
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        flags = [*tiny_run.flags.influence_folders, "--playground", "--port", port]
        ended = run_here("influence_llm", *flags, check=False)
    assert re.search(rf"PORT must be free on {HOST}; {port} is not .*--port", ended.message)
    assert "Loading" not in ended.stdout
