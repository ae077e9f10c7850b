import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from utils.browser import write_report

SUMMARY = {
    "model_name": "meta-llama/Llama-3.2-3B",
    "layer": 15,
    "kind": "topk",
    "n_latents": 4608,
    "n_alive": 4312,
    "dataset": "the pile",
    "n_tokens": 1_003_520,
    "fvu": 0.25,
    "l0": 31.94,
    "dead_fraction": 0.0642,
    "cosine": 0.887,
    "cross_entropy": {"untouched": 3.127, "reconstruction": 3.402, "zero_ablated": 11.284},
    "loss_recovered": 0.9663,
    "excluded": {"bos": 3920, "norm_outlier": 112},
    "of_no_concern": 1,
}
PIECES = [" a", " <script>alert(1)</script>", "\n", "\t&amp;", " https://example.com/x.js", "\x00"]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **wanted):
        found = [attributes for name, attributes in self.tags if name == tag]
        return [a for a in found if wanted.items() <= a.items()]


def feature_row(feature, dead=False):
    return {
        "feature": feature,
        "frequency": 0.0 if dead else 0.0025,
        "max_activation": 0.0 if dead else 8.0,
        "mean_activation": 0.0 if dead else 2.0,
        "dead": dead,
        "label": "" if dead else f"label <b>{feature}</b>",
        "peak_tokens": None if dead else [" a"],
        "promoted_tokens": None if dead else [" Paris", "<script>", "\n"],
        "suppressed_tokens": None if dead else [" not"],
        "top_subset": None if dead else "Github & co",
        "top_subset_share": np.nan if dead else 0.72,
        "umap_x": np.nan,
        "umap_y": np.nan,
    }


def example_row(feature, bucket, rank):
    activation = 8.0 if bucket == 0 else 8.0 * (5.5 - bucket) / 5
    return {
        "feature": feature,
        "bucket": bucket,
        "rank": rank,
        "activation": activation,
        "context": 3,
        "peak": 1,
        "document": 9000 + rank,
        "subset": "Github & co",
        "pieces": PIECES,
        "activations": [activation / 2, activation, 0.0, 0.0, 0.0, 0.0],
    }


@pytest.fixture
def tables(tmp_path):
    """Features 7 and 8 with examples, feature 9 dead; read back from Parquet, as in a run."""
    features = pd.DataFrame([feature_row(7), feature_row(8), feature_row(9, dead=True)])
    examples = pd.DataFrame(
        example_row(feature, bucket, rank)
        for feature in (7, 8)
        for bucket in range(6)
        for rank in range(20 if bucket == 0 else 2)
    )
    features.to_parquet(tmp_path / "features.parquet")
    examples.to_parquet(tmp_path / "examples.parquet")
    return [pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("features", "examples")]


@pytest.fixture
def page(tmp_path, tables):
    picture = tmp_path / "map.png"
    matplotlib.image.imsave(picture, np.random.default_rng(0).random((10, 20, 3)))
    path = tmp_path / "report.html"
    shown = {"random": [7, 9], "selected": [8, 7]}
    write_report(path, SUMMARY, *tables, {"A <map>": picture}, shown)
    return Page(path.read_text(encoding="utf-8"))


def test_text_of_the_corpus_stays_text(page):
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text
    assert "&amp;" in page.text
    assert "\x00" not in page.text
    assert "␀" in page.text
    assert "↵" in page.text


def test_nothing_outside_the_file_is_referenced(page):
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
        assert "url(" not in attributes.get("style", "")
        assert not any(name.startswith("on") for name in attributes)
    style = page.text[: page.text.index("features of meta-llama")]
    assert not re.search(r"url\(|@import|https?:", style)


def test_every_feature_shown_has_a_card_and_a_link_to_it(page):
    cards = [attributes["id"] for attributes in page.all("article")]
    assert cards == ["random-7", "random-9", "selected-8", "selected-7"]
    links = [attributes["href"] for attributes in page.all("a")]
    assert {f"#{card}" for card in cards} <= set(links)
    assert "label <b>7</b>" in page.text
    assert "0.25% of tokens (1 in 400)" in page.text
    assert "Dead: never active" in page.text


def test_examples_are_marked_by_their_share_of_the_maximum(page):
    n_examples = 3 * (20 + 5 * 2)
    assert len(page.all("mark", **{"class": "peak"})) == n_examples
    assert len(page.all("mark")) == 2 * n_examples
    assert page.all("mark", style="--a:1.00", title="8.00")
    assert page.all("mark", style="--a:0.10", title="0.80")  # half of the weakest bucket's peak
    assert page.text.count("12 more") == 3
    ranges = re.findall(r"(\S+%) of the maximum", page.text)
    assert ranges == ["80–100%", "60–80%", "40–60%", "20–40%", "0–20%"] * 3


def test_summary_and_pictures(page):
    for fact in ("4,312 of 4,608", "75.0%", "96.6%", "3,920 bos; 112 norm outlier"):
        assert fact in page.text
    (image,) = page.all("img")
    assert (image["width"], image["height"], image["alt"]) == ("20", "10", "A <map>")


def test_a_feature_that_is_not_in_the_table_is_an_error(tmp_path, tables):
    with pytest.raises(KeyError, match="12"):
        write_report(tmp_path / "r.html", SUMMARY, *tables, {}, {"random": [12], "selected": []})
    assert not (tmp_path / "r.html").exists()
