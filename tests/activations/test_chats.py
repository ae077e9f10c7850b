"""Records of messages: the tokens of the model's chat template, skipped and refused ones."""

import itertools
import json
from pathlib import Path

import pytest
from conftest import Flags, make_texts, save_tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.activations.chats import Chats
from utils.activations.contexts import pack_contexts
from utils.activations.corpus import Corpus
from utils.activations.store import ActivationStore
from utils.settings import InputError

TEMPLATE = (
    "{{ bos_token }}{% if strftime_now %}{{ strftime_now('%Y-%m-%d') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}"
    "{% endif %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
)
TEXTS = [text for text, _ in make_texts(60)]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """The tiny model, whose tokenizer has a chat template with special tokens."""
    folder = save_tiny_model(tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(chat_model) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model)


def chat_of(number: int) -> list[dict]:
    answer = {"role": "assistant", "content": TEXTS[number + 1]}
    return [{"role": "user", "content": TEXTS[number]}, answer] * (1 + number % 3)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Fifty chats, and five records that are none."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    records = [chat_of(number) for number in range(50)]
    wrong = [[{"role": "king", "content": "a"}], [{"content": "a"}], [7], [], None]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in records[:9] + wrong))
    with path.open("a") as file:
        file.writelines(json.dumps({"messages": one}) + "\n" for one in records[9:])
    return path


def test_the_tokens_are_those_of_the_template(chats, chat_model, tokenizer):
    corpus = Corpus(str(chats), column="messages")
    corpus.chats = Chats(str(chat_model))
    corpus.check()
    assert len(list(corpus.documents())) == 50
    assert corpus.skipped == {"that the chat template refuses": 4, "without a text": 1}
    contexts = list(pack_contexts(corpus.documents(), tokenizer, 32))
    tokens = [token for context in contexts for token in context.tokens[1:].tolist()]
    dated = TEMPLATE.replace("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26")  # as on any day
    whole = []
    for number in range(50):
        whole += tokenizer.apply_chat_template(
            chat_of(number), chat_template=dated, return_dict=False
        )
    assert whole.count(tokenizer.eos_token_id) == 198
    bos = tokenizer.bos_token_id
    spoken = [token for token in tokens if token != bos]
    expected = [token for token in whole if token != bos]
    assert spoken == expected[: len(spoken)] and len(spoken) > 0.9 * len(expected)
    for n in (0, 7, len(contexts) // 2):
        position = contexts[n].next_position
        rest = pack_contexts(corpus.documents(position), tokenizer, 32, position)
        for again, before in itertools.zip_longest(rest, contexts[n + 1 :]):
            assert (again.tokens == before.tokens).all()


def test_a_text_that_spells_special_tokens_has_none(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a<eos>" * 40}) + "\n")
    (context, *_) = pack_contexts(Corpus(str(path)).documents(), tokenizer, 32)
    assert tokenizer.eos_token_id not in context.tokens


def test_chats_are_saved_or_refused(chats, chat_model, tiny_model, tmp_path, run_here):
    def save(model: Path, *more: object, check: bool = True):
        flags = Flags(tmp_path, model, chats).save_activations
        return run_here("save_activations", *flags, "--n-tokens", 1_024, *more, check=check)

    assert "Choose TEXT_COLUMN among messages" in save(chat_model, check=False).message
    message = save(tiny_model, "--text-column", "messages", check=False).message
    assert f"The tokenizer of {tiny_model} must have a chat template" in message
    assert "Take the instruct model" in message and not (tmp_path / "activations").exists()
    assert "1,024 tokens" in save(chat_model, "--text-column", "messages").stdout
    store = ActivationStore(tmp_path / "activations")
    tokens = store.read("tokens", [0])[0]
    assert AutoTokenizer.from_pretrained(chat_model).decode(tokens).startswith("<bos>2024-07-26<|")


def test_without_a_template_it_is_an_error_of_the_input(chats, tiny_model):
    corpus = Corpus(str(chats), column="messages")
    corpus.chats = Chats(str(tiny_model))
    with pytest.raises(InputError, match="must have a chat template"):
        corpus.check()
