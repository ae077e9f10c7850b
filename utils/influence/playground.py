"""The playground: a page where features are found, turned, and seen at work while the model writes.

Served to this machine alone. The model is one for all visitors; what a visitor chose is kept in
that visitor's session. Each token is one pass for the untouched and the steered text together,
under a lock and with its own hooks: visitors take turns, and never meet another's features.
"""

import contextlib
import functools
import html
import os
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Protocol

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
import torch

from utils.embedded import TITLES
from utils.features.catalogue import Catalogue
from utils.influence.generations import WritingSettings
from utils.settings import InputError, require
from utils.steering.clamps import Clamp, change_by, changed
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens, stream
from utils.terminal import one_line

HOST = "127.0.0.1"
N_FOUND = 6  # features that a search, or a token, offers
N_EXAMPLES = 4
N_SLOTS = 5  # features turned at once
LONGEST_PROMPT = 20_000  # characters
FONTS = ["system-ui", "sans-serif"]  # the themes' own would be fetched from the web
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#examples .textfield {font-size: 0.85em; line-height: 1.4}
#examples .block {padding: 4px 8px}
#tokens .token {border-bottom: 1px dotted; margin-right: 1px}
#tokens label span, #examples label span {display: none}
.remove {min-width: 2.5em !important; max-width: 2.5em; align-self: center}
footer {display: none !important}
"""


class Playground:
    """What stands behind the controls of the page; it keeps nothing of any visitor.

    Args:
        catalogue: The features.
        model: The model that they are of.
    """

    def __init__(self, catalogue: Catalogue, model: FeatureModel):
        self.catalogue, self.model = catalogue, model
        self.running = threading.Lock()

    def name(self, feature: int) -> str:
        return f"{feature} · {one_line(self.catalogue.features.loc[feature, 'label'])}"

    def find(self, words: str) -> list[int]:
        """Living features by a number or by words; without either, some that stand out."""
        catalogue, words = self.catalogue, words.strip()
        if words.isdecimal():
            alive = catalogue.features.index[~catalogue.features["dead"]]
            return [int(words)] if int(words) in alive else []
        found = catalogue.search(words, N_FOUND) if words else catalogue.propose(N_FOUND)
        return found["feature"].tolist()

    def examples(self, feature: int) -> list[list[tuple[str, float | None]]]:
        """A feature's highest examples, each its token_texts with their shares of the maximum."""
        maximum = self.catalogue.features.loc[feature, "max_activation"]
        examples = self.catalogue.examples_of([feature])
        texts = []
        top = examples[examples["bucket"] == 0].sort_values("rank").head(N_EXAMPLES)
        for example in top.itertuples():
            shares = [float(activation / maximum) or None for activation in example.activations]
            texts.append(list(zip(map(one_line, example.token_texts), shares, strict=True)))
        return texts + [[]] * (N_EXAMPLES - len(texts))

    def describe(self, feature: int) -> str:
        row = self.catalogue.features.loc[feature]
        promoted = " ".join(one_line(token).strip() for token in row.promoted_tokens[:6])
        return (
            f"Active on {100 * row.frequency:.2g}% of tokens, "
            f"at most {row.max_activation:.3g}; promotes {promoted}"
        )

    def token_texts(self, prompt: str, chat: bool) -> list[tuple[str, None]]:
        """The prompt's tokens as texts."""
        numbers = prompt_tokens(self.model.language_model, prompt, chat)[0].cpu().numpy()
        return [(one_line(piece), None) for piece in self.catalogue.token_texts[numbers]]

    def features_at(self, prompt: str, chat: bool, position: int) -> list[tuple[int, float]]:
        """The strongest features at a token of the prompt, with their activations f_i ‖W_dec,i‖.

        None at BOS and other positions of outlying norm, which no autoencoder is trained on.
        """
        tokens = prompt_tokens(self.model.language_model, prompt, chat)[:, : position + 1]
        with self.running:
            residual = self.model.residual(tokens)[0, -1]
            activations = self.model.encode(residual)
        if not self.model.trained_positions(tokens[0, -1], residual):
            return []
        strongest = activations.topk(N_FOUND)
        pairs = zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [(feature, activation) for feature, activation in pairs if activation > 0]

    def write(
        self, prompt: str, chat: bool, strengths: dict[int, float], length: int, *drawing
    ) -> Iterator[tuple[str, str]]:
        """The untouched and the steered continuation so far, as they are written side by side.

        Args:
            strengths: Of the features that are turned, by number.
            length: New tokens, at most.
            drawing: Temperature and seed, as for `stream`.
        """
        maxima, language_model = (
            self.catalogue.features["max_activation"],
            self.model.language_model,
        )
        clamps = [Clamp(f, strength, float(maxima[f])) for f, strength in strengths.items()]
        change = change_by(self.model, [[], clamps], language_model.device)
        tokens = prompt_tokens(language_model, prompt, chat).expand(2, -1)
        for texts in stream(language_model, tokens, lambda: self.changed(change), length, *drawing):
            yield tuple(texts)

    @contextlib.contextmanager
    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """The model, changed, for one pass: nobody else's meanwhile."""
        with self.running, changed(self.model, change):
            yield


# ---------------------------------------------------------------------------------------- the page


class PageSettings(WritingSettings, Protocol):
    """What the controls begin with, and the page's port, of the settings of influence_llm.py."""

    prompt: str
    chat_template: bool
    port: int


def build_page(playground: Playground, settings: PageSettings) -> gr.Blocks:
    """The page: what is seen, and what each control does."""
    with gr.Blocks(title="Playground", analytics_enabled=False) as page:
        _connect(playground, _lay_out(playground, settings))
    return page


def _lay_out(playground: Playground, settings: PageSettings) -> SimpleNamespace:
    """What is seen, by name."""
    summary, seen = playground.catalogue.summary, SimpleNamespace()
    name = summary["model_name"]
    seen.shown = gr.State(None)  # number of the feature whose examples are seen
    seen.chosen = gr.State([])  # numbers of the features that are turned
    gr.Markdown(
        f"## Playground\n{summary['n_alive']:,} features of layer {summary['layer']} of "
        f"{TITLES['model_name'] if name == 'embedded' else name}. "
        "Find one, turn it, and see what becomes of the text."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=360):
            seen.words = gr.Textbox(
                label="Find features by words, or by number", submit_btn="Find", elem_id="words"
            )
            standing_out = [(feature, None) for feature in playground.find("")]
            seen.found = _offer("Some that stand out", playground, standing_out, elem_id="found")
            seen.at_token = gr.Radio(visible=False, elem_id="at_token")
            seen.turn = gr.Button(visible=False, variant="primary", elem_id="turn")
            seen.about = gr.Textbox(visible=False, elem_id="about", lines=2, label="What it is")
            with gr.Column(elem_id="examples", elem_classes="gap"):
                seen.examples = [
                    gr.HighlightedText(visible=False, show_label=False) for _ in range(N_EXAMPLES)
                ]
        with gr.Column(scale=3, min_width=480):
            seen.prompt = gr.Textbox(
                settings.prompt,
                label="Prompt",
                lines=2,
                max_length=LONGEST_PROMPT,
                elem_id="prompt",
            )
            seen.chat = gr.Checkbox(
                settings.chat_template,
                label="Ask it, in the model's chat template",
                visible=playground.model.language_model.tokenizer.chat_template is not None,
                elem_id="chat",
            )
            seen.tokens = gr.HighlightedText(
                playground.token_texts(settings.prompt, settings.chat_template),
                label="Its tokens; click one for its top features",
                elem_id="tokens",
            )
            seen.slots = [_slot(number) for number in range(N_SLOTS)]
            with gr.Row():
                seen.length = gr.Number(
                    settings.max_new_tokens, label="New tokens", precision=0, minimum=1
                )
                seen.temperature = gr.Number(settings.temperature, label="Temperature", minimum=0)
                seen.seed = gr.Number(
                    settings.seed, label="Seed", precision=0, minimum=0, maximum=2**32
                )
            with gr.Row():
                seen.go = gr.Button("Generate", variant="primary", elem_id="go")
                seen.stop = gr.Button("Stop", elem_id="stop")
            with gr.Row():
                seen.untouched = gr.Textbox(label="Untouched", lines=9, elem_id="untouched")
                seen.steered = gr.Textbox(label="Steered", lines=9, elem_id="steered")
    return seen


def _connect(playground: Playground, seen: SimpleNamespace) -> None:
    """What each control does."""
    question = [seen.prompt, seen.chat]
    turned = [seen.chosen, *(slider for _, slider, _ in seen.slots)]
    slots = [part for row, slider, _ in seen.slots for part in (row, slider)]

    def search(words):
        pairs = [(feature, None) for feature in playground.find(words)]
        return _offer(f"Found for {words!r}: {len(pairs)}", playground, pairs)

    def read(prompt, chat, event: gr.SelectData):
        pairs = playground.features_at(prompt, chat, event.index)
        return _offer(f"Active at token {event.index}: {len(pairs)}", playground, pairs)

    def look(feature):
        return (
            feature,
            gr.Button(f"Turn {playground.name(feature)}", visible=True),
            gr.Textbox(playground.describe(feature), visible=True),
            *(gr.HighlightedText(e, visible=bool(e)) for e in playground.examples(feature)),
        )

    def add(feature, chosen, *strengths):
        strengths = dict(zip(chosen, strengths, strict=False))
        if feature not in strengths and len(strengths) == N_SLOTS:
            raise gr.Error(f"{N_SLOTS} features at most. Remove one first.")
        return _turned(playground, strengths | {feature: strengths.get(feature, 1.0)})

    def remove(slot, chosen, *strengths):
        strengths = dict(zip(chosen, strengths, strict=False))
        del strengths[chosen[slot]]
        return _turned(playground, strengths)

    def write(prompt, chat, *controls):
        length, temperature, seed, chosen, *strengths = controls
        strengths = dict(zip(chosen, strengths, strict=False))
        drawing = temperature or 0, seed or 0
        try:
            yield from playground.write(prompt, chat, strengths, length or 1, *drawing)
        except InputError as error:
            raise gr.Error(html.escape(str(error))) from None

    seen.words.submit(search, seen.words, seen.found)
    for offer in (seen.found, seen.at_token):
        offer.input(look, offer, [seen.shown, seen.turn, seen.about, *seen.examples])
    for asked in question:
        asked.change(playground.token_texts, question, seen.tokens, trigger_mode="always_last")
    seen.tokens.select(read, question, seen.at_token)
    seen.turn.click(add, [seen.shown, *turned], [seen.chosen, *slots])
    for number, (_, _, button) in enumerate(seen.slots):
        button.click(functools.partial(remove, number), turned, [seen.chosen, *slots])
    writing = seen.go.click(
        write,
        [*question, seen.length, seen.temperature, seen.seed, *turned],
        [seen.untouched, seen.steered],
        concurrency_limit=None,
    )
    seen.stop.click(None, cancels=[writing])


def _slot(number: int) -> tuple[gr.Row, gr.Slider, gr.Button]:
    """Room for a feature that is turned: a slider, and a button that takes it away."""
    with gr.Row(visible=False) as row:
        slider = gr.Slider(-10, 10, 1, step=0.1, elem_id=f"slider-{number}", scale=8)
        button = gr.Button("✕", elem_id=f"remove-{number}", elem_classes="remove", scale=0)
    return row, slider, button


def _offer(
    title: str, playground: Playground, pairs: list[tuple[int, float | None]], **options
) -> gr.Radio:
    """Features to choose one from, each with its activation, if that is known."""
    choices = [
        (playground.name(feature) + ("" if value is None else f": {value:.2f}"), feature)
        for feature, value in pairs
    ]
    return gr.Radio(choices, value=None, label=title, visible=True, **options)


def _turned(playground: Playground, strengths: dict[int, float]) -> list:
    """The numbers of the features that are turned, and every slot as it is to be seen."""
    seen = []
    for feature, strength in strengths.items():
        label = f"{playground.name(feature)}, times its maximum"
        seen += [gr.Row(visible=True), gr.Slider(value=strength, label=label)]
    seen += [gr.Row(visible=False), gr.Slider()] * (N_SLOTS - len(strengths))
    return [list(strengths), *seen]


def require_free(port: int) -> None:
    """Refuse no port, and one that another process listens on, before the model is loaded.

    Raises:
        InputError: It is none, taken, or not for this user.
    """
    require(1 <= port <= 65_535, f"PORT must be from 1 to 65535; it is {port}.")
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise InputError(
            f"PORT must be free on {HOST}; {port} is not ({error}). Choose another --port."
        ) from None


def serve(playground: Playground, settings: PageSettings) -> None:
    """Show the page on this machine, at ``settings.port``, until Ctrl-C; see `build_page`."""
    theme = gr.themes.Default(primary_hue="orange", font=FONTS, font_mono=["monospace"])
    print(f"Playground: http://{HOST}:{settings.port}  (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        build_page(playground, settings).launch(
            server_name=HOST, server_port=settings.port, share=False, quiet=True, theme=theme,
            css=CSS, ssr_mode=False, mcp_server=False, footer_links=[],
        )  # fmt: skip
