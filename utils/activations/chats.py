"""Chats: records of messages, as the text that the model's chat template makes of them."""

import datetime
import functools

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from utils.language_model import load_tokenizer
from utils.settings import Json, require

# Some templates, LLaMA's among them, write the date, and a chat must be the same text every day.
DATE = datetime.datetime(2024, 7, 26)
FIXED_DATE = "{{%- macro strftime_now(format) -%}}{{{{ format{} }}}}{{%- endmacro -%}}".format(
    "".join(f".replace('%{code}', '{DATE.strftime('%' + code)}')" for code in "YymdbBaAjHMSIp")
)


class Chats:
    """The chat template of a model, whose tokenizer is loaded when it is first needed."""

    def __init__(self, model_name: str):
        self.model_name = model_name

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.model_name)
        require(
            bool(tokenizer.chat_template),
            f"The tokenizer of {self.model_name} must have a chat template, for the records of the "
            "dataset are chats; it has none. Take the instruct model made from it, or a "
            "TEXT_COLUMN of plain text.",
        )
        return tokenizer

    def text(self, messages: list[Json]) -> str | None:
        """The text of a chat without BOS, or None if the template refuses its messages.

        Raises:
            InputError: The tokenizer has no chat template, or cannot be loaded.
        """
        tokenizer = self._tokenizer
        template = FIXED_DATE + tokenizer.get_chat_template()
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None
        return text.removeprefix(tokenizer.bos_token or "")
