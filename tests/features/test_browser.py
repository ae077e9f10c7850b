"""The feature browser: its files, and the page driven by a real browser as a person would."""

import contextlib
import json
import re
import shutil
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from utils.artifacts import write_json
from utils.features.browser import PAGE, PER_FILE, write_browser
from utils.features.catalogue import Catalogue

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason=f"none of {', '.join(NAMES)} is installed")
SUMMARY = {
    "model_name": "meta-llama/Llama-3.2-3B",
    "layer": 15,
    "kind": "topk",
    "n_latents": 100,
    "n_alive": 99,
    "dataset": "the pile",
    "n_tokens": 1_003_520,
    "fvu": 0.25,
    "held_out_fvu": 0.26,
    "l0": 31.94,
    "dead_fraction": 0.01,
    "cosine": 0.887,
    "cross_entropy": {"untouched": 3.127, "reconstruction": 3.402, "zero_ablated": 11.284},
    "loss_recovered": 0.9663,
    "excluded": {"bos": 3920, "norm_outlier": 112},
}
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
PIECES = [" a", f" {HOSTILE}", "\n", "\t&amp;", " Paris", "\x00", "\u2028", "é"]


def feature_table(n: int) -> pd.DataFrame:
    """Feature i is active on one token in 10 + i; the last is dead; the first is hostile."""
    number = np.arange(n)
    dead = number == n - 1
    return pd.DataFrame(
        {
            "feature": number,
            "frequency": np.where(dead, 0, 1 / (10 + number)),
            "max_activation": np.where(dead, 0, 8.0),
            "mean_activation": np.where(dead, 0, 2.0),
            "dead": dead,
            "label": [HOSTILE, *(f"word{i}" for i in range(1, n - 1)), ""],
            "peak_tokens": [[f" peak{i}", HOSTILE] for i in range(n)],
            "promoted_tokens": [[f" promoted{i}", HOSTILE, "\n"] for i in range(n)],
            "suppressed_tokens": [[" not"]] * n,
            "top_subset": np.where(number % 10 == 3, "Harbour & co", "Garden"),
            "top_subset_share": 0.72,
            "histogram": [np.r_[100, np.arange(31)[::-1]].astype(np.int32)] * n,
            "histogram_range": 8.0,
            "umap_x": np.where(dead, np.nan, number % 250),
            "umap_y": np.where(dead, np.nan, number // 250),
            "specificity": np.where(number % 2 == 1, 3 * number / n, np.nan),
            "explanation": [f"fires where {HOSTILE}", *[""] * (n - 1)],
            "neighbours": [[] if dead[i] else [(i + 7) % (n - 1)] for i in number],
            "neighbour_cosines": [[] if dead[i] else [0.5] for i in number],
        }
    )


def example_table(n_features: int) -> pd.DataFrame:
    peak = [8.0, *(8.0 * (5.5 - bucket) / 5 for bucket in range(1, 6))]
    return pd.DataFrame(
        {
            "feature": np.int32(feature),
            "bucket": np.int8(bucket),
            "rank": np.int16(rank),
            "activation": np.float32(peak[bucket]),
            "peak": np.int16(1),
            "document": 9000 + rank,
            "subset": "Garden",
            "tokens": np.arange(len(PIECES), dtype=np.int32),
            "activations": np.float32([peak[bucket] / 2, peak[bucket], 0, 0, 0, 0, 0, 0]),
        }
        for feature in range(n_features)
        for bucket in range(6)
        for rank in range(20 if bucket == 0 else 2)
    )


def make_browser(folder, n: int, n_with_examples: int):
    feature_table(n).to_parquet(folder / "features.parquet")
    example_table(n_with_examples).to_parquet(folder / "examples.parquet")
    write_json(folder / "vocabulary.json", PIECES)
    write_json(folder / "summary.json", {**SUMMARY, "n_latents": n, "n_alive": n - 1})
    picture = folder / "map.png"
    matplotlib.image.imsave(picture, np.random.default_rng(0).random((10, 20, 3)))
    catalogue = Catalogue(folder)
    shown = {"selected": [8, 7], "random": [3, 5, 9]}
    write_browser(folder / "browser", catalogue, catalogue.summary, {"A <map>": picture}, shown)
    return folder / "browser"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_browser(tmp_path_factory.mktemp("small"), n=100, n_with_examples=99)


# ------------------------------------------------------------------------------------------ files


def read_data(folder, name: str):
    """The JSON of a file of data, as the page gets it."""
    text = (folder / "data" / f"{name}.js").read_text("ascii")
    called, content = re.fullmatch(r'receive\("(\w+)", (.*)\);\n', text).groups()
    assert called == name and "<" not in content
    return json.loads(content)


def test_index_and_details_hold_the_tables(small):
    index = read_data(small, "index")
    assert index["label"][0] == HOSTILE and index["frequency"][:2] == [0.1, 0.09091]
    assert index["scores"] == ["specificity"] and index["specificity"][:2] == [None, 0.03]
    assert index["umap_x"][-1] is None
    assert [index["subsets"][i] for i in index["subset"][2:4]] == ["Garden", "Harbour & co"]
    facts = {name: value for name, value, _ in index["facts"]}
    assert facts["Live features"] == "99 of 100" and facts["Loss recovered"] == "96.6%"
    assert facts["Excluded positions"] == "3,920 bos; 112 norm outlier"
    assert facts["Variance explained"] == "75.0%; 74.0% on tokens held out of training"
    assert index["pictures"] == [
        {"file": "map.png", "caption": "A <map>", "width": 20, "height": 10}
    ]
    assert read_data(small, "search")[5] == f"\n peak5\n{HOSTILE}\n promoted5\n{HOSTILE}\n\n"
    files = sorted((small / "data").glob("0*.js"))
    assert [path.stem for path in files] == ["00000", "00001", "00002", "00003"]
    assert len(read_data(small, "00003")) == 100 - 3 * PER_FILE
    details = read_data(small, "00001")[40 - PER_FILE]
    assert details["neighbours"] == [47] and len(details["examples"]) == 30
    assert details["examples"][0]["runs"] == [[" a", 4.0], [PIECES[1], 8.0, 1], "".join(PIECES[2:])]
    assert read_data(small, "00003")[-1]["examples"] == []


def test_nothing_outside_the_folder_is_referenced():
    for path in PAGE.iterdir():
        source = path.read_text()
        source = source.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"https?:|//cdn|@import|url\(", source), path.name
        assert "innerHTML" not in source and "eval(" not in source, path.name


# ------------------------------------------------------------------------------------ the browser


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open a browser's page from the file system; whatever it complains of fails the test."""
    with contextlib.ExitStack() as stack:

        def visit(folder, address: str = "", width: int = 1280):
            context = chromium.new_context(viewport={"width": width, "height": 800})
            stack.callback(context.close)
            page = context.new_page()
            said = []
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("console", lambda message: said.append(message.text))
            page.goto(f"{(folder / 'index.html').as_uri()}{address}")
            until(page, "index !== null && searched.length > 0")
            stack.callback(lambda: not said or pytest.fail(str(said)))
            return page

        yield visit


def until(page, condition: str) -> None:
    """Wait for a condition of the page, which its own policy forbids to be compiled within it."""
    for _ in range(150):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"not within 3 s: {condition}")


def labels_of(page) -> list[str]:
    return page.locator("#rows b").all_inner_texts()


def heading_of(page, text: str) -> None:
    page.locator("#feature h2", has_text=text).wait_for(timeout=3_000)


@needs_chromium
def test_search_filter_and_order(small, visit):
    page = visit(small)
    count = page.locator("#count")
    assert count.inner_text() == "99 of 100 features"  # the dead one is left out
    for query, numbers in (
        ("word42", [42]), ("PEAK17", [17]), ("promoted23", [23]), ("31", [31]), ("fires w", [0]),
        ("word4", [4, *range(40, 50)]), ("ord42", []), ("word5", [5, *range(50, 60)]),
        ("omoted23", []), ("where </s", [0]), ("word4(", []),
    ):  # fmt: skip
        page.fill("#query", query)
        until(page, f"found.join() === '{','.join(map(str, numbers))}'")
    page.fill("#query", "no such thing")
    until(page, "found.length === 0")
    page.fill("#query", "")
    page.click("summary")
    page.select_option("#filter-subset", "Harbour & co")
    until(page, "found.length === 10")
    assert labels_of(page)[:2] == ["word3", "word13"]
    page.locator("#filter-specificity").fill("1.5")
    until(page, "found.join() === '53,63,73,83,93'")
    page.select_option("#order", "specificity")
    assert labels_of(page) == ["word93", "word83", "word73", "word63", "word53"]
    page.click("#turn")
    assert labels_of(page)[0] == "word53"
    page.locator("#filter-least").fill("-1.9")  # one token in 79
    until(page, "found.join() === '53,63'")
    page.click("#reset")
    until(page, "found.length === 99")
    page.check("#dead")
    until(page, "found.length === 100")
    page.select_option("#filter-label", "without")
    until(page, "found.join() === '99'")
    page.click("#reset")
    page.select_option("#shown", "random")
    until(page, "found.join() === '3,5,9'")


@needs_chromium
def test_a_feature_and_its_neighbours(small, visit):
    page = visit(small, "#feature=40")
    heading_of(page, "#40 word40")
    text = page.locator("#feature").inner_text()
    for shown in ("2.0% of tokens (1 in 50)", "8.00", "Garden (72%)", "n = 565 tokens"):
        assert shown in text
    # Of 32 bins the last is empty: the axis ends where the activations do.
    assert page.locator("#feature svg rect:not(.hit)").count() == 31
    marks = page.locator("#feature mark")
    assert page.locator("#feature .examples li").count() == 30 and marks.count() == 60
    assert marks.nth(1).evaluate("mark => mark.style.getPropertyValue('--a')") == "1"
    marks.nth(0).hover()
    assert page.locator("#tip").inner_text() == "activation 4"
    for share in ("80 to 100%", "0 to 20%"):
        assert f"Random examples at {share} of the maximum" in text
    page.click(".neighbours a")
    heading_of(page, "#47 word47")
    assert page.url.endswith("#feature=47")
    page.go_back()
    heading_of(page, "#40 word40")


@needs_chromium
def test_hostile_text_is_text(small, visit):
    page = visit(small, "#feature=0")
    heading_of(page, "<script>")
    text = page.locator("#feature").inner_text()
    assert text.count(HOSTILE) >= 20 and "␀" in text and "&amp;" in text and "↵" in text
    assert labels_of(page)[0] == HOSTILE
    assert page.locator("#rows script, #feature script, #feature img").count() == 0
    assert page.evaluate("window.hacked") is None


@needs_chromium
def test_keys(small, visit):
    page = visit(small)
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    heading_of(page, "#1 word1")
    page.keyboard.press("/")
    page.keyboard.type("word5")  # j, k and the like are letters now
    until(page, "found.length === 11")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    heading_of(page, "#50 word50")
    page.keyboard.press("Escape")
    heading_of(page, "Pick a feature")
    page.keyboard.press("Escape")
    until(page, "found.length === 99")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    page.keyboard.press("o")
    page.locator("#overview img").wait_for()
    assert "31.9" in page.locator("#overview").inner_text()
    assert page.locator("#overview img").evaluate("image => image.decode().then(() => true)")


@needs_chromium
def test_the_map_leads_to_a_feature(small, visit):
    page = visit(small, "#map=40")
    place = SimpleNamespace(**page.locator("#canvas").bounding_box())
    middle = (place.x + place.width / 2, place.y + place.height / 2)
    page.mouse.move(*middle)
    assert "#40 word40" in page.locator("#tip").inner_text()
    before = page.evaluate("[view.scale, view.x]")
    page.mouse.wheel(0, -300)
    page.mouse.down()
    page.mouse.move(middle[0] + 90, middle[1])
    page.mouse.up()
    after = page.evaluate("[view.scale, view.x]")
    assert after[0] > before[0] and after[1] == pytest.approx(before[1] - 90 / after[0])
    assert page.url.endswith("#map=40")  # a drag is no click
    page.mouse.click(middle[0] + 90, middle[1])
    heading_of(page, "#40 word40")


@needs_chromium
def test_a_phone_shows_the_list_then_the_feature(small, visit):
    page = visit(small, width=390)
    assert page.locator("#finder").is_visible() and page.locator("#feature").is_hidden()
    page.click("#rows a:nth-child(3)")
    heading_of(page, "#2 word2")
    assert page.locator("#finder").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click(".back")
    page.locator("#finder").wait_for(timeout=3_000)  # a change of address is told a moment later


@needs_chromium
def test_65536_features_are_in_view_within_a_second(tmp_path, visit):
    n = 65_536
    folder = make_browser(tmp_path, n=n, n_with_examples=2)
    assert len(list((folder / "data").iterdir())) == n // PER_FILE + 2
    shown = "performance.getEntriesByName('shown')[0].startTime"  # since the page was asked for
    assert min(visit(folder).evaluate(shown) for _ in range(3)) < 1_000  # others compute beside it
    page = visit(folder)
    assert page.locator("#rows a").count() < 50 and labels_of(page)[1] == "word1"
    asked = (
        "performance.getEntriesByType('resource').filter(({ name }) => /\\d{5}\\.js/.test(name))"
    )
    assert page.evaluate(f"{asked}.length") == 0
    page.evaluate("byId('list').scrollTop = 60000 * ROW")
    page.locator("#rows b", has_text="word60000").wait_for()
    page.fill("#query", "peak65000")
    until(page, "found.join() === '65000'")
    page.keyboard.press("Enter")
    heading_of(page, "#65000 word65000")
