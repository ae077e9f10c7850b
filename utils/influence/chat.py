"""A chat in the terminal, in which features can be clamped between any two messages."""

import contextlib
import math
import shutil
from contextlib import AbstractContextManager

from utils.features.catalogue import Catalogue
from utils.features.search import show_feature
from utils.influence.generations import WritingSettings
from utils.settings import InputError, require
from utils.steering.clamps import Clamp, steered
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens, stream
from utils.terminal import one_line

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  input() edits its line, and remembers

HELP = """\
/find WORDS              search features by words
/clamp FEATURE STRENGTH  set a feature to STRENGTH times its maximum; 0 ablates it
/off, /on                switch the clamps off, on
/features                show the clamps
/reset                   start a new conversation without clamps
/quit                    leave (or Ctrl-D); Ctrl-C stops an answer"""
N_MATCHES = 5  # of a search


class Chat:
    """A conversation, and the clamps that are applied to its answers.

    Raises:
        InputError: The model has no chat template.
    """

    def __init__(self, catalogue: Catalogue, model: FeatureModel, settings: WritingSettings):
        self.catalogue, self.model, self.settings = catalogue, model, settings
        prompt_tokens(model.language_model, "", chat=True)
        self.reset()

    def reset(self) -> None:
        self.messages, self.clamps, self.is_on = [], {}, True

    def run(self) -> None:
        """Read lines until the user leaves."""
        print(
            f"Chat with {self.model.language_model.name}, answers of at most "
            f"{self.settings.max_new_tokens} tokens (--max-new-tokens). /help shows the commands."
        )
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")
                continue
            except UnicodeDecodeError:
                print("A message must be UTF-8; this one is not.")
                continue
            if line == "/quit":
                return None
            try:
                self.obey(line) if line.startswith("/") else self.answer(line)
            except InputError as error:
                print(error)
            except KeyboardInterrupt:  # before the answer's first token, or after its last
                print("(stopped)")

    def obey(self, line: str) -> None:
        """Carry out a command, and print the clamps."""
        command, *words = line.split()
        if command == "/find":
            self.find(" ".join(words))
        elif command == "/clamp":
            self.clamp(words)
        elif command in ("/on", "/off"):
            self.is_on = command == "/on"
        elif command == "/reset":
            self.reset()
        elif command != "/features":
            return print(HELP)
        if command != "/find":
            print(self.state())

    def find(self, words: str) -> None:
        features = self.catalogue.search(words, N_MATCHES)["feature"]
        for feature in features:
            print(show_feature(self.catalogue, feature, shutil.get_terminal_size().columns, 1))
        if not len(features):
            print(f"No feature goes by {words!r}.")

    def clamp(self, words: list[str]) -> None:
        """Clamp a feature, in place of an earlier clamp of it."""
        alive = self.catalogue.features[~self.catalogue.features["dead"]]
        rule = "/clamp takes a living feature and a finite strength, as in /clamp 12 1.5"
        try:
            number, times = words
            feature, strength = int(number), float(times)
        except ValueError:
            raise InputError(rule + ".") from None
        require(feature in alive.index, f"{rule}; {feature} is none.")
        require(math.isfinite(strength), f"{rule}; {strength} is not.")
        maximum = float(alive.loc[feature, "max_activation"])
        self.clamps[feature] = Clamp(feature, strength, maximum)
        self.is_on = True

    def state(self) -> str:
        """The clamps, and whether they are on, as one line."""
        names = self.catalogue.features["label"]
        clamps = [
            f"{feature} ({one_line(names[feature])}) at {clamp.strength:g} × its maximum"
            for feature, clamp in self.clamps.items()
        ]
        return f"Steering {'on' if self.is_on else 'off'}: {'; '.join(clamps) or 'no feature'}."

    def steering(self) -> AbstractContextManager:
        """Opens the clamps for the next token, if they are on."""
        clamps = list(self.clamps.values())
        is_steered = self.is_on and clamps
        return steered(self.model, clamps) if is_steered else contextlib.nullcontext()

    def answer(self, line: str) -> None:
        """Print the answer to a message while it is written.

        Ctrl-C ends the answer; the conversation keeps the part that was written.
        """
        if not line:
            return
        messages = [*self.messages, {"role": "user", "content": line}]
        language_model, settings = self.model.language_model, self.settings
        tokens = prompt_tokens(language_model, messages, chat=True)
        limits = settings.max_new_tokens, settings.temperature, settings.seed
        written = ""
        try:
            for (text,) in stream(language_model, tokens, self.steering, *limits):
                print(printable(text[len(written) :]), end="", flush=True)
                written = text
        except InputError as error:  # the conversation is too long, or a strength too large
            raise InputError(f"{error} /reset begins a new conversation.") from None
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        self.messages = [*messages, {"role": "assistant", "content": written}]


def printable(text: str) -> str:
    """Text without control characters, which could command the terminal."""
    return "".join(c for c in text if c.isprintable() or c == "\n")
