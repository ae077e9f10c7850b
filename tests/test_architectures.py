"""Architectures of transformers, random and tiny: what the scripts do with each, against the plain
model; what is left out, and which are refused."""

import contextlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny_llama import D_MODEL, tiny_autoencoder
from torch.nn.functional import cross_entropy
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from utils.activations.store import ActivationStore
from utils.features.catalogue import Catalogue
from utils.features.neurons import NoNeurons, neurons_of
from utils.features.studies.cross_entropy import measure_losses
from utils.features.studies.places import promoted_tokens
from utils.influence.attribution import attribute
from utils.language_model import block_name, load_language_model, residual_at, watched_passes
from utils.settings import InputError
from utils.steering.clamps import Clamp, steered
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import generate_tokens, prompt_tokens, stream

LAYER, N_LAYERS, CONTEXT = 1, 3, 16
PROMPTS = ("rose tulip ship tide", "sail")
CLAMP = Clamp(5, 1.0, 6.0, "add")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES = {
    "vocab_size": 320, "hidden_size": D_MODEL, "intermediate_size": 64, "head_dim": 8,
    "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
ROTARY = {"rotary_dim": 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16}
LATENT_ATTENTION = EXPERTS | {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip

# Of each: where its blocks are, the last matrix of a block's MLP (None: left out), and options.
ARCHITECTURES = {
    "llama": ("model.layers", "mlp.down_proj", {}),
    "mistral": ("model.layers", "mlp.down_proj", {"sliding_window": 4}),
    "qwen2": ("model.layers", "mlp.down_proj", {}),
    "qwen3": ("model.layers", "mlp.down_proj", {}),
    "gemma": ("model.layers", "mlp.down_proj", {}),
    "gemma2": ("model.layers", "mlp.down_proj", {"sliding_window": 4}),
    "gemma3_text": ("model.layers", "mlp.down_proj", {"sliding_window": 4}),
    "gemma3": ("model.language_model.layers", "mlp.down_proj", {}),
    "llava": ("model.language_model.layers", "mlp.down_proj", {}),
    "gpt2": ("transformer.h", "mlp.c_proj", {}),
    "gpt_bigcode": ("transformer.h", "mlp.c_proj", {}),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", {}),
    "gptj": ("transformer.h", "mlp.fc_out", ROTARY),
    "opt": ("model.decoder.layers", "fc2", {"word_embed_proj_dim": 16, "ffn_dim": 64}),
    "phi": ("model.layers", "mlp.fc2", {}),
    "phi3": ("model.layers", "mlp.down_proj", {}),
    "olmo": ("model.layers", "mlp.down_proj", {}),
    "olmo2": ("model.layers", "mlp.down_proj", {}),
    "cohere": ("model.layers", "mlp.down_proj", {}),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h", {}),
    "bloom": ("transformer.h", "mlp.dense_4h_to_h", {}),
    "mpt": ("transformer.blocks", "ffn.down_proj", {}),
    "stablelm": ("model.layers", "mlp.down_proj", {}),
    "starcoder2": ("model.layers", "mlp.c_proj", {}),
    "granite": ("model.layers", "mlp.down_proj", {}),
    "smollm3": ("model.layers", "mlp.down_proj", {}),
    "nemotron": ("model.layers", "mlp.down_proj", {}),
    "glm4": ("model.layers", "mlp.down_proj", {}),
    "xglm": ("model.layers", "fc2", {}),
    "mixtral": ("model.layers", None, EXPERTS),
    "qwen2_moe": ("model.layers", None, EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("model.layers", None, EXPERTS),
    "gpt_oss": ("model.layers", None, EXPERTS),
    "deepseek_v3": ("model.layers", None, LATENT_ATTENTION),
    "mamba": ("backbone.layers", None, {}),
}
# Of each: what the first script says, and, where it needs the weights to see it, options.
REFUSED = {
    "vit": (r"must be a causal language model; .* is a vit\.", None),
    "bart": (r"one list of blocks, .* has 0 lists of 3 modules", None),
    "xlm": (r"one list of blocks, .* has 4 lists of 3 modules", None),
    "bert": ("a token changes what the model makes of those before it", {}),
    "deepseek_v4": ("block 1 gives no stream of 32 numbers a token", LATENT_ATTENTION),
    "rwkv": ("no cache to go on from", {}),
}


def tiny_config(kind: str, **options) -> PreTrainedConfig:
    """The configuration of an architecture, of few blocks of width `D_MODEL`."""
    if kind in ("gemma3", "llava"):
        parts = {"vision_config": VISION | {"model_type": "clip_vision_model"}}
        parts = {"vision_config": VISION} if kind == "gemma3" else parts
        text = SIZES | {"model_type": "gemma3_text" if kind == "gemma3" else "llama"}
        return CONFIG_MAPPING[kind](text_config=text, **parts)
    made = CONFIG_MAPPING[kind]
    known = {*made.__dataclass_fields__, *made.attribute_map}
    return made(**{name: value for name, value in SIZES.items() if name in known} | options)


def plain_class(config: PreTrainedConfig) -> type:
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Weights large enough that all parts matter, and norms far from those that training begins."""
    torch.manual_seed(0)
    model = plain_class(config).from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        small = parameter.ndim == 1
        parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter if small else 0))
    return model


class Subject:
    """An architecture: saved, through the first script, loaded by the project and plainly."""

    def __init__(self, kind, folder, save):
        blocks, self.matrix, options = ARCHITECTURES[kind]
        save(folder, random_model(tiny_config(kind, **options)))
        self.store = ActivationStore(folder / "activations")
        self.model = load_language_model(str(folder / "model"), LAYER, "float32")
        self.plain = plain_class(self.model.model.config).from_pretrained(folder / "model").eval()
        self.plain.requires_grad_(False)
        self.blocks = self.plain.get_submodule(blocks)
        self.tokens = torch.from_numpy(self.store.read("tokens", range(8))).long()
        hidden = self.plain(self.tokens, output_hidden_states=True, use_cache=False).hidden_states
        self.residual = hidden[LAYER if kind == "mamba" else LAYER + 1]  # others: embeddings first
        autoencoder = tiny_autoencoder("topk", self.residual)
        self.steered = FeatureModel(self.model, LAYER, autoencoder, self.store.outlier_norm)

    @contextlib.contextmanager
    def hooked(self, change):
        """While open, a hook written by hand changes the plain model's block ``LAYER``."""

        def hook(_module, _inputs, output):
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handle = self.blocks[LAYER].register_forward_hook(hook)
        yield
        handle.remove()

    def added(self, residual, tokens, first=1):
        """A residual stream with `CLAMP`'s direction added, from a position on, but not at BOS."""
        direction = CLAMP.strength * CLAMP.maximum * self.steered.directions(torch.tensor([5]))[0]
        at = (tokens != 0) & (torch.arange(tokens.shape[1]) >= first)
        at &= residual.norm(dim=-1) <= self.store.outlier_norm
        return residual + at[..., None] * direction

    def continuation(self, prompt, n, first=1):
        """The plain model's likeliest tokens, without a cache, with the stream changed by hand."""
        tokens = prompt
        for _ in range(n):
            with self.hooked(lambda residual, fed=tokens: self.added(residual, fed, first)):
                logits = self.plain(tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
            if tokens[0, -1] == 1:  # the end of the text
                break
        return tokens[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="module")
def save(tiny_model, tiny_text, run_here):
    """Save a model, or its configuration alone, and run the first script on it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def run(folder, model, n_tokens=128, **options):
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return run_here(
            "save_activations", "--model-name", folder / "model", "--layer", LAYER,
            "--dataset", tiny_text, "--dtype", "float32", "--storage-dtype", "float32",
            "--n-tokens", n_tokens, "--context-length", CONTEXT,
            "--activations-dir", folder / "activations", **options,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request, tmp_path_factory, save):
    return Subject(request.param, tmp_path_factory.mktemp(request.param), save)


def test_the_first_script_saves_the_plain_models_residual_stream(subject):
    saved = np.concatenate([shard["activations"] for shard in subject.store.shards])
    torch.testing.assert_close(torch.from_numpy(saved), subject.residual, **CLOSE)


def test_other_tools_find_the_block_by_its_name_in_the_causal_model(subject):
    name, folder = subject.store.block, subject.model.name
    if plain_class(subject.plain.config) is AutoModelForCausalLM:
        assert subject.plain.get_submodule(name) is subject.blocks[LAYER]
        assert block_name(folder, LAYER) == name
        return
    assert name is None
    with pytest.raises(InputError, match="which has more parts"):
        block_name(folder, LAYER)


def test_a_steered_block_changes_the_logits_as_a_hook_by_hand_does(subject):
    plain = subject.plain(subject.tokens, use_cache=False).logits
    with subject.hooked(lambda residual: subject.added(residual, subject.tokens)):
        expected = subject.plain(subject.tokens, use_cache=False).logits
    with steered(subject.steered, [CLAMP]):
        logits = subject.model.model(subject.tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (expected - plain).abs().max() > 0.01


@pytest.mark.parametrize("where", ["everywhere", "generated"])
def test_texts_written_with_a_cache_are_those_without_one(subject, where):
    prompts = [prompt_tokens(subject.model, prompt) for prompt in PROMPTS]
    first = [1 if where == "everywhere" else prompt.shape[1] for prompt in prompts]
    expected = [subject.continuation(p, 5, at) for p, at in zip(prompts, first, strict=True)]
    with steered(subject.steered, [CLAMP], where):  # one batch, the shorter padded
        texts = generate_tokens(subject.model, prompts, 5)
    assert [text.tolist() for text in texts] == expected


def test_texts_streamed_are_those_without_a_cache(subject):
    prompt = prompt_tokens(subject.model, PROMPTS[0])
    expected = subject.continuation(prompt, 5)
    texts = stream(subject.model, prompt, lambda: steered(subject.steered, [CLAMP]), 5)
    with watched_passes(subject.model) as passes:
        fed = [passes[0].tokens[0].tolist() for _ in texts]
    assert fed == [prompt[0].tolist(), *([token] for token in expected[:-1])]


def test_promoted_tokens_are_those_that_moving_the_residual_stream_raises(subject):
    plain, last = subject.plain, subject.blocks[-1]
    tokens, streams = torch.tensor([[7]]), []

    def logits(change):
        def hook(_module, _inputs, output):
            residual = output[0] if isinstance(output, tuple) else output
            streams.append(residual[0, 0].clone())
            moved = residual + change[:, None]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = last.register_forward_hook(hook)
        made = plain(tokens.expand(len(change), -1), use_cache=False).logits[:, 0]
        handle.remove()
        return made.double()

    logits(torch.zeros(1, D_MODEL))
    # A move along the residual stream itself, or along (1, ..., 1), changes the norm's division.
    apart = torch.linalg.qr(torch.stack([streams[0], torch.ones(D_MODEL)], dim=1)).Q
    directions = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0))
    directions -= directions @ apart @ apart.T
    changes = logits(0.02 * directions) - logits(-0.02 * directions)
    scores = (changes - changes.mean(dim=0)) / changes.std(dim=0)
    texts = [f"t{i}" for i in range(320)]
    table = promoted_tokens(subject.model, directions.numpy(), texts)
    for column, sign in (("promoted_tokens", 1), ("suppressed_tokens", -1)):
        expected = [[texts[i] for i in row] for row in (sign * scores).topk(10).indices]
        assert np.mean(np.array(table[column].tolist()) == np.array(expected)) > 0.98


def test_neurons_are_what_the_last_matrix_of_the_mlp_takes(subject):
    if subject.matrix is None:
        with pytest.raises(NoNeurons, match="Neurons are left out: block"):
            neurons_of(subject.model, LAYER + 1).__enter__()
        return
    inputs = []
    matrix = subject.blocks[LAYER].get_submodule(subject.matrix)
    matrix.register_forward_pre_hook(lambda _module, values: inputs.append(values[0]))
    subject.plain(subject.tokens, use_cache=False)
    with neurons_of(subject.model, LAYER + 1) as neurons:
        residual_at(subject.model, subject.tokens, LAYER)
    expected = inputs[0].reshape(*subject.tokens.shape, -1)
    assert len(neurons) == LAYER + 1
    torch.testing.assert_close(neurons[LAYER], expected, **CLOSE)


def test_cross_entropy_is_that_of_the_plain_model_with_the_stream_replaced(subject):
    tokens, kept = subject.tokens, torch.from_numpy(subject.store.read("kept", range(8)))
    replacements = {
        "untouched": lambda residual: residual,
        "reconstruction": subject.steered.reconstruct,
        "zero_ablated": torch.zeros_like,
    }
    table = measure_losses(subject.steered, subject.store, range(8), 128)
    for name, replace in replacements.items():
        with subject.hooked(lambda x, f=replace: torch.where(kept[..., None], f(x), x)):
            logits = subject.plain(tokens, use_cache=False).logits[:, :-1]
        targets = tokens[:, 1:].where(tokens[:, 1:] != 0, -100)
        expected = cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert table.loc["all", name] == pytest.approx(expected.item(), rel=1e-4)


def test_attribution_takes_the_gradient_of_the_plain_model(subject):
    tokens, streams = subject.tokens[:1], []

    def record(residual):
        streams.append(residual.detach().requires_grad_())
        return streams[0]

    with subject.hooked(record):
        logits = subject.plain(tokens, use_cache=False).logits[0, -1]
    (expected,) = torch.autograd.grad(logits[3] - logits[4], streams[0])
    gradient = attribute(subject.steered, tokens, (3, 4)).gradient
    torch.testing.assert_close(gradient, expected[0], **CLOSE)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("kind", REFUSED)
def test_other_architectures_are_refused_by_the_first_script(kind, tmp_path, save):
    says, options = REFUSED[kind]
    config = tiny_config(kind, **(options or {}))
    ended = save(tmp_path, config if options is None else random_model(config), check=False)
    assert re.search(says, ended.message)
    assert not list((tmp_path / "activations").glob("activations*"))


def test_experts_of_four_bits_are_unpacked(tmp_path, save):
    """As MXFP4 has them: two to a byte, and an exponent for each 32."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([numbers, -numbers])
    save(tmp_path, random_model(tiny_config("gpt_oss", **EXPERTS)))
    weights, expected = load_file(tmp_path / "model" / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("experts.down_proj", "gate_up_proj"))]:
        experts, width, height = weights.pop(name).shape
        packed = torch.randint(256, (experts, height, width // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(120, 125, packed.shape[:3], dtype=torch.uint8)
        pairs = torch.stack([numbers[(packed & 15).int()], numbers[(packed >> 4).int()]], dim=-1)
        values = pairs.flatten(-2) * 2.0 ** (exponents.float() - 127)[..., None]
        expected[name] = values.flatten(-2).transpose(1, 2)
        weights |= {f"{name}_blocks": packed, f"{name}_scales": exponents}
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "model" / "config.json"
    packed = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": packed}))
    model = load_language_model(str(tmp_path / "model"), LAYER, "float32").model
    assert len(expected) == 2 * N_LAYERS
    for name, values in expected.items():
        torch.testing.assert_close(model.state_dict()[name], values)


def test_experts_of_another_shape_are_refused(tmp_path, save):
    save(tmp_path, random_model(tiny_config("mixtral", **EXPERTS)))
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    first = next(name for name in weights if "experts" in name)
    save_file(weights | {first: torch.ones(3, 3)}, path, {"format": "pt"})
    with pytest.raises(InputError, match="Cannot load the model"):
        load_language_model(str(tmp_path / "model"), LAYER)


def test_a_mixture_of_experts_goes_through_all_four_scripts(tmp_path, save, run_here):
    """Both studies that compare with neurons say why they do not, and the others are there."""
    save(tmp_path, random_model(tiny_config("mixtral", **EXPERTS)), n_tokens=8_192)
    folders = {name: tmp_path / name for name in ("activations", "autoencoder", "analysis")}
    places = [[f"--{name}-dir", folder] for name, folder in folders.items()]
    run_here(
        "train_autoencoder", "--n-latents", 64, "--k", 4, "--batch-size", 64, "--n-passes", 0.5,
        "--backend", "torch", *places[0], *places[1],
    )  # fmt: skip
    ended = run_here(
        "analyze_features", "--n-loss-tokens", 256, "--n-neuron-tokens", 2_048, "--no-map-features",
        "--studies", "neurons", "explanations", "outputs", *places[0], *places[1], *places[2],
    )  # fmt: skip
    says = "Neurons are left out: block 0 of .* is a mixture of experts"
    assert len(re.findall(says, ended.stdout)) == 2
    summary = Catalogue(folders["analysis"]).summary
    assert "neurons" not in summary and "outputs" in summary
    assert summary["explanations"]["n_features"] > 5 and not summary["explanations"]["groups"]
    ended = run_here(
        "influence_llm", "--feature", 3, "--strength", 2, "--max-new-tokens", 5,
        "--influence-dir", tmp_path / "influence", *places[1], *places[2],
    )  # fmt: skip
    assert "feature 3 at 2 × its maximum" in ended.stdout


def test_the_readme_names_all_of_them():
    readme = (ROOT / "README.md").read_text()
    assert f"{len(ARCHITECTURES)} architectures" in readme
    assert all(f"`{kind}`" in readme for kind in (*ARCHITECTURES, *REFUSED))
