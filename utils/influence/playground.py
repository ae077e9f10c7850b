"""The playground: a web page to search features, clamp them, and watch the model write.

It is served to this machine alone. All visitors share one model; each visitor's choices are kept in
a session. Each token is one pass for the untouched and the steered text together, under a lock and
with its own hooks, so visitors take turns and no visitor's features affect another's text.
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
N_OFFERED = 6  # features that a search or a token offers
N_EXAMPLES = 4
N_SLOTS = 5  # features clamped at once
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
    """The functions behind the page's controls; no state of any visitor is kept here."""

    def __init__(self, catalogue: Catalogue, model: FeatureModel):
        self.catalogue, self.model = catalogue, model
        self.running = threading.Lock()

    def name(self, feature: int) -> str:
        return f"{feature} · {one_line(self.catalogue.features.loc[feature, 'label'])}"

    def find(self, words: str) -> list[int]:
        """Living features by number or by words; for an empty text, some proposals."""
        catalogue, words = self.catalogue, words.strip()
        if words.isdecimal():
            alive = catalogue.features.index[~catalogue.features["dead"]]
            return [int(words)] if int(words) in alive else []
        matches = catalogue.search(words, N_OFFERED) if words else catalogue.propose(N_OFFERED)
        return matches["feature"].tolist()

    def examples(self, feature: int) -> list[list[tuple[str, float | None]]]:
        """A feature's highest examples: token texts with activations as shares of the maximum."""
        maximum = self.catalogue.features.loc[feature, "max_activation"]
        examples = self.catalogue.examples_of([feature])
        texts = []
        highest = examples[examples["bucket"] == 0].sort_values("rank").head(N_EXAMPLES)
        for example in highest.itertuples():
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
        language_model = self.model.language_model
        (tokens,) = prompt_tokens(language_model, prompt, chat)
        texts = self.catalogue.prompt_texts(language_model, tokens)
        return [(one_line(text), None) for text in texts]

    def features_at(self, prompt: str, chat: bool, position: int) -> list[tuple[int, float]]:
        """The strongest features at a token of the prompt, with their activations f_i ‖W_dec,i‖.

        None at BOS and norm outliers, which autoencoders are not trained on.
        """
        tokens = prompt_tokens(self.model.language_model, prompt, chat)[:, : position + 1]
        with self.running:
            residual = self.model.residual(tokens)[0, -1]
            activations = self.model.encode(residual)
        if not self.model.trained_positions(tokens[0, -1], residual):
            return []
        strongest = activations.topk(N_OFFERED)
        pairs = zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [(feature, activation) for feature, activation in pairs if activation > 0]

    def write(
        self, prompt: str, chat: bool, strengths: dict[int, float], length: int, *drawing
    ) -> Iterator[tuple[str, str]]:
        """Yield the untouched and the steered continuation, longer by a token each time.

        Args:
            strengths: By feature.
            length: New tokens, at most.
            drawing: Temperature and seed, as for `stream`.
        """
        maxima = self.catalogue.features["max_activation"]
        language_model = self.model.language_model
        clamps = [Clamp(f, strength, float(maxima[f])) for f, strength in strengths.items()]
        change = change_by(self.model, [[], clamps], language_model.device)
        tokens = prompt_tokens(language_model, prompt, chat).expand(2, -1)
        for texts in stream(
            language_model, tokens, lambda: self.one_pass(change), length, *drawing
        ):
            yield tuple(texts)

    @contextlib.contextmanager
    def one_pass(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """While open, the model is changed and locked for one pass."""
        with self.running, changed(self.model, change):
            yield


# ---------------------------------------------------------------------------------------- the page


class PageSettings(WritingSettings, Protocol):
    """The settings of influence_llm.py that give the controls' first values, and the port."""

    prompt: str
    chat_template: bool
    port: int


def build_page(playground: Playground, settings: PageSettings) -> gr.Blocks:
    with gr.Blocks(title="Playground", analytics_enabled=False) as page:
        _connect(playground, _lay_out(playground, settings))
    return page


def _lay_out(playground: Playground, settings: PageSettings) -> SimpleNamespace:
    """The page's components, by name."""
    summary, parts = playground.catalogue.summary, SimpleNamespace()
    name = summary["model_name"]
    parts.shown = gr.State(None)  # the feature whose examples are shown
    parts.chosen = gr.State([])  # the features that are clamped
    gr.Markdown(
        f"## Playground\n{summary['n_alive']:,} features of layer {summary['layer']} of "
        f"{TITLES['model_name'] if name == 'embedded' else name}. "
        "Find one, turn it, and see what becomes of the text."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=360):
            parts.words = gr.Textbox(
                label="Find features by words, or by number", submit_btn="Find", elem_id="words"
            )
            proposals = [(feature, None) for feature in playground.find("")]
            parts.matches = _offer("Some that stand out", playground, proposals, elem_id="found")
            parts.at_token = gr.Radio(visible=False, elem_id="at_token")
            parts.turn = gr.Button(visible=False, variant="primary", elem_id="turn")
            parts.about = gr.Textbox(visible=False, elem_id="about", lines=2, label="What it is")
            with gr.Column(elem_id="examples", elem_classes="gap"):
                parts.examples = [
                    gr.HighlightedText(visible=False, show_label=False) for _ in range(N_EXAMPLES)
                ]
        with gr.Column(scale=3, min_width=480):
            size = {"lines": 2, "max_length": LONGEST_PROMPT}
            parts.prompt = gr.Textbox(settings.prompt, label="Prompt", elem_id="prompt", **size)
            parts.chat = gr.Checkbox(
                settings.chat_template,
                label="Ask it, in the model's chat template",
                visible=playground.model.language_model.tokenizer.chat_template is not None,
                elem_id="chat",
            )
            parts.tokens = gr.HighlightedText(
                playground.token_texts(settings.prompt, settings.chat_template),
                label="Its tokens; click one for its top features",
                elem_id="tokens",
            )
            parts.slots = [_slot(number) for number in range(N_SLOTS)]
            with gr.Row():
                parts.length = gr.Number(
                    settings.max_new_tokens, label="New tokens", precision=0, minimum=1
                )
                parts.temperature = gr.Number(settings.temperature, label="Temperature", minimum=0)
                parts.seed = gr.Number(
                    settings.seed, label="Seed", precision=0, minimum=0, maximum=2**32
                )
            with gr.Row():
                parts.go = gr.Button("Generate", variant="primary", elem_id="go")
                parts.stop = gr.Button("Stop", elem_id="stop")
            with gr.Row():
                parts.untouched = gr.Textbox(label="Untouched", lines=9, elem_id="untouched")
                parts.steered = gr.Textbox(label="Steered", lines=9, elem_id="steered")
    return parts


def _connect(playground: Playground, parts: SimpleNamespace) -> None:
    """Give each control its function."""
    question = [parts.prompt, parts.chat]
    clamps = [parts.chosen, *(slider for _, slider, _ in parts.slots)]
    slots = [component for row, slider, _ in parts.slots for component in (row, slider)]

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
        return _update_slots(playground, strengths | {feature: strengths.get(feature, 1.0)})

    def remove(slot, chosen, *strengths):
        strengths = dict(zip(chosen, strengths, strict=False))
        del strengths[chosen[slot]]
        return _update_slots(playground, strengths)

    def write(prompt, chat, *controls):
        length, temperature, seed, chosen, *strengths = controls
        strengths = dict(zip(chosen, strengths, strict=False))
        drawing = temperature or 0, seed or 0
        try:
            yield from playground.write(prompt, chat, strengths, length or 1, *drawing)
        except InputError as error:
            raise gr.Error(html.escape(str(error))) from None

    parts.words.submit(search, parts.words, parts.matches)
    for offer in (parts.matches, parts.at_token):
        offer.input(look, offer, [parts.shown, parts.turn, parts.about, *parts.examples])
    for control in question:
        control.change(playground.token_texts, question, parts.tokens, trigger_mode="always_last")
    parts.tokens.select(read, question, parts.at_token)
    parts.turn.click(add, [parts.shown, *clamps], [parts.chosen, *slots])
    for number, (_, _, button) in enumerate(parts.slots):
        button.click(functools.partial(remove, number), clamps, [parts.chosen, *slots])
    writing = parts.go.click(
        write,
        [*question, parts.length, parts.temperature, parts.seed, *clamps],
        [parts.untouched, parts.steered],
        concurrency_limit=None,
    )
    parts.stop.click(None, cancels=[writing])


def _slot(number: int) -> tuple[gr.Row, gr.Slider, gr.Button]:
    """A row for a clamped feature: a slider for its strength and a button to remove it."""
    with gr.Row(visible=False) as row:
        slider = gr.Slider(-10, 10, 1, step=0.1, elem_id=f"slider-{number}", scale=8)
        button = gr.Button("✕", elem_id=f"remove-{number}", elem_classes="remove", scale=0)
    return row, slider, button


def _offer(
    title: str, playground: Playground, pairs: list[tuple[int, float | None]], **options
) -> gr.Radio:
    """A choice of one feature; each is shown with its activation, where there is one."""
    choices = [
        (playground.name(feature) + ("" if value is None else f": {value:.2f}"), feature)
        for feature, value in pairs
    ]
    return gr.Radio(choices, value=None, label=title, visible=True, **options)


def _update_slots(playground: Playground, strengths: dict[int, float]) -> list:
    """The clamped features, and an update of each slot's row and slider."""
    updates = []
    for feature, strength in strengths.items():
        label = f"{playground.name(feature)}, times its maximum"
        updates += [gr.Row(visible=True), gr.Slider(value=strength, label=label)]
    updates += [gr.Row(visible=False), gr.Slider()] * (N_SLOTS - len(strengths))
    return [list(strengths), *updates]


def require_free_port(port: int) -> None:
    """Refuse a port that is out of range, in use or not permitted, before the model is loaded."""
    require(1 <= port <= 65_535, f"PORT must be from 1 to 65535; it is {port}.")
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise InputError(
            f"PORT must be free on {HOST}; {port} is not ({error}). Choose another --port."
        ) from None


def serve(playground: Playground, settings: PageSettings) -> None:
    """Serve the page on this machine, at ``settings.port``, until Ctrl-C."""
    theme = gr.themes.Default(primary_hue="orange", font=FONTS, font_mono=["monospace"])
    print(f"Playground: http://{HOST}:{settings.port}  (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        build_page(playground, settings).launch(
            server_name=HOST, server_port=settings.port, share=False, quiet=True, theme=theme,
            css=CSS, ssr_mode=False, mcp_server=False, footer_links=[],
        )  # fmt: skip
