"""Every family against its own code: `transformers`, fp32, eager attention, batch 3, sequence 37, heads 6/2.

The peer saves a folder, we read it: so config.json in the spelling of transformers 5, the names of the weights and the
arithmetic are all under test at once. Weights are large enough for logits of order one to ten.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modellink.checkpoint.hf import expected_shapes, load_hf, read_config, save_hf
from modellink.checkpoint.mapping import HFTensor, layout_of, to_hf
from modellink.errors import ModelLinkError
from modellink.models.cache import KVCache
from modellink.models.count import count_parameters
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES

BATCH, LENGTH, VOCAB = 3, 37, 203
STEPS = [11, 5, *[1] * 21]  # how decoding feeds the sequence: a prompt, a chunk, single tokens
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ALL_BIAS = {"attention_bias": True, "mlp_bias": True}

# (family, what is special, options of the peer's configuration class)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "plain", {}),
    ("llama", "heads of another size", {"head_dim": 14, "num_key_value_heads": 3}),
    ("llama", "one kv head, tied, biases", {"num_key_value_heads": 1, "tie_word_embeddings": True, **ALL_BIAS}),
    ("llama", "theta and epsilon", {"rope_theta": 5e5, "rms_norm_eps": 1e-3}),
    ("llama", "linear", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    (
        "llama",
        "dynamic beyond the trained length",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    ("llama", "dynamic within the trained length", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama", "llama3", {"rope_scaling": LLAMA3, "rope_theta": 50.0}),
    ("llama", "yarn", {"rope_scaling": YARN}),
    ("llama", "yarn both mscales", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    ("llama", "yarn one mscale", {"rope_scaling": YARN | {"mscale": 0.7}}),
    ("llama", "yarn explicit factor", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    (
        "llama",
        "yarn ramp",
        {"rope_scaling": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}, "rope_theta": 100.0},
    ),
    ("llama", "gated erf gelu", {"hidden_act": "gelu"}),
    ("llama", "gated relu", {"hidden_act": "relu"}),
    ("mistral", "window", {"sliding_window": 9, "head_dim": 12}),
    ("mistral", "no window", {"sliding_window": None, "rope_theta": 1e6}),
    ("qwen2", "plain", {"rope_theta": 1e6}),
    ("qwen2", "tied, yarn", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    ("qwen2", "window on upper layers", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    (
        "qwen2",
        "window on listed layers",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    ("qwen3", "plain", {"head_dim": 16, "rope_theta": 1e6}),
    ("qwen3", "biases, tied", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", "window", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    ("gemma", "plain", {"head_dim": 16}),
    ("gemma", "one kv head, untied", {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("gemma2", "plain", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9}),
    (
        "gemma2",
        "tight caps",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4096,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    ("gemma2", "no caps", {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gpt2", "plain", {"n_inner": 80}),
    ("gpt2", "untied, erf gelu", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    ("bloom", "six heads", {}),
    ("bloom", "untied, three heads", {"tie_word_embeddings": False, "num_attention_heads": 3}),
    ("phi3", "window", {"sliding_window": 9, "rope_theta": 5e4}),
    ("phi3", "partly rotated, tied", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    ("olmo2", "plain", {"rope_theta": 5e5}),
    ("olmo2", "biases, three kv heads", {"attention_bias": True, "num_key_value_heads": 3}),
]
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
}
# sizes that a family derives from others
DERIVED = {
    "gpt2": ("intermediate_size", "num_key_value_heads"),
    "bloom": ("intermediate_size", "num_key_value_heads", "max_position_embeddings"),
}
IDS = [f"{family}-{what.replace(' ', '_')}" for family, what, _ in CASES]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights that make every part visible: matrices of spread 0.2, norm weights and biases far from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = 0.2 if parameter.dim() > 1 else 0.3
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)


def peer_of(family: str, options: dict[str, Any]) -> nn.Module:
    config_class, model_class = CLASSES[family]
    sizes = {name: size for name, size in SIZES.items() if name not in DERIVED.get(family, ())}
    model = model_class(config_class(**sizes | options)).eval()
    randomise(model)
    return model


def ours_from(folder: Path, padding: int = 0) -> Decoder:
    config = read_config(folder)
    config.padded_vocab_size = config.vocab_size + padding
    model = Decoder(config).eval()
    load_hf(model, folder, progress=False)
    return model


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def stepwise(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """Logits of all positions, decoded with a cache: a prompt, a chunk of several tokens, then one token at a time."""
    cache = KVCache(model.config.num_layers, capacity=4)
    return torch.cat([model(part, cache=cache) for part in tokens_BS.split(STEPS, 1)], 1)


@pytest.mark.parametrize(("family", "what", "options"), CASES, ids=IDS)
@torch.no_grad()
def test_logits_and_cache(family: str, what: str, options: dict[str, Any], tmp_path: Path) -> None:
    peer = peer_of(family, options)
    peer.save_pretrained(tmp_path)
    model = ours_from(tmp_path, padding=5)
    assert model.config.family == family
    theirs = peer(tokens(), use_cache=False).logits
    ours = model(tokens())
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours[..., :VOCAB], theirs, atol=1e-4, rtol=0)
    if what != "dynamic beyond the trained length":
        torch.testing.assert_close(stepwise(model, tokens()), ours, atol=1e-4, rtol=0)
        return
    # each new token changes all frequencies and cached keys are those of an earlier length: the peer decides
    cache = transformers.DynamicCache(config=peer.config)
    peer.model.rotary_emb(torch.zeros(1), torch.arange(4)[None])  # the peer remembers the longest sequence it saw
    parts = [peer(part, past_key_values=cache).logits for part in tokens().split(STEPS, 1)]
    torch.testing.assert_close(stepwise(model, tokens())[..., :VOCAB], torch.cat(parts, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", [1, 15, 20, 22, 24, 26, 29, 31, 34, 35, 36], ids=lambda place: IDS[place])
def test_loss_and_gradients(place: int, tmp_path: Path) -> None:
    family, _, options = CASES[place]
    peer = peer_of(family, options)
    peer.save_pretrained(tmp_path)
    model = ours_from(tmp_path)
    batch = tokens()
    theirs = peer(batch, labels=batch, use_cache=False).loss
    ours = nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert abs(theirs.item() - ours.item()) < 1e-5
    theirs.backward()
    ours.backward()
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for tensor in set_of(layout_of(model.config, expected_shapes(model.config))):
        for name, ours in tensor.assemble(gradients):
            gradient = expected.pop(name)
            scale = gradient.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(ours, gradient, atol=1e-5 * max(scale, 1.0), rtol=1e-4, msg=name)
    assert not expected


def set_of(layout: dict[str, HFTensor]) -> list[HFTensor]:
    """Every tensor of the files once."""
    return list({tensor.name: tensor for tensor in layout.values()}.values())


@pytest.mark.parametrize("place", range(29, len(CASES)), ids=lambda place: IDS[place])
def test_fused_families_come_back(place: int, tmp_path: Path) -> None:
    """Tensors byte for byte, and a folder in which transformers finds the same model."""
    family, _, options = CASES[place]
    peer_of(family, options).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = ours_from(tmp_path / "source", padding=5).to(torch.bfloat16)
    save_hf(tmp_path / "target", model.named_parameters(), model.config, tokenizer_from=tmp_path / "source")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "target"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert read_config(tmp_path / "target") == read_config(tmp_path / "source")
    theirs, ours = (CLASSES[family][1].from_pretrained(tmp_path / name).eval() for name in ("source", "target"))
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_files_of_a_model_saved_without_its_head(family: str, tmp_path: Path) -> None:
    peer = peer_of(family, {})
    peer.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("transformer.") for name in names)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [peer.__class__.__name__]}))
    with torch.no_grad():
        torch.testing.assert_close(ours_from(tmp_path)(tokens()), peer(tokens()).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_internlm_and_aquila_are_llama_with_another_spelling(tmp_path: Path) -> None:
    for bias, spelled in (
        (True, {"architectures": ["InternLMForCausalLM"], "bias": True, "rotary": {"base": 10000, "type": "origin"}}),
        (False, {"architectures": ["AquilaForCausalLM"], "model_type": "aquila", "rope_theta": 10000.0}),
    ):
        peer = peer_of("llama", {"num_key_value_heads": 6, "attention_bias": bias})
        folder = tmp_path / str(bias)
        peer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(_plain_sizes() | {"num_key_value_heads": 6} | spelled))
        model = ours_from(folder)
        torch.testing.assert_close(model(tokens()), peer(tokens()).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_internlm_dynamic_rotation_is_llamas(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 1.5}
    peer = peer_of("llama", {"attention_bias": True, "rope_scaling": scaling, "max_position_embeddings": 16})
    peer.save_pretrained(tmp_path)
    rotary = {"base": 10000, "type": "dynamic", "scaling_factor": 1.5}
    spelled = {"architectures": ["InternLMForCausalLM"], "rotary": rotary, "max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(_plain_sizes() | spelled))
    torch.testing.assert_close(ours_from(tmp_path)(tokens()), peer(tokens()).logits, atol=1e-4, rtol=0)


def _plain_sizes() -> dict[str, Any]:
    return {key: value for key, value in SIZES.items() if key != "attn_implementation"} | {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize("family", ["llama", "gemma"])
@torch.no_grad()
def test_norm_rounds_as_the_family_does_in_bfloat16(family: str) -> None:
    peer = peer_of(family, {}).to(torch.bfloat16)
    config = read_like(family)
    ours = Decoder(config).to(torch.bfloat16).norm
    ours.weight.copy_(peer.model.norm.weight)
    x = (torch.randn(64, 48, generator=torch.Generator().manual_seed(2)) * 3).to(torch.bfloat16)
    assert torch.equal(ours(x), peer.model.norm(x))


def read_like(family: str) -> Any:
    content = {key: value for key, value in SIZES.items() if key != "attn_implementation"}
    config = FAMILIES.get(family).read(content, "config.json")
    return dataclasses.replace(config, padded_vocab_size=VOCAB)


def test_gemma2_norms_change_places() -> None:
    gemma2 = FAMILIES.get("gemma2")
    for ours, theirs in (
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("attention_output_norm", "post_attention_layernorm"),
    ):
        assert to_hf(gemma2, f"layers.4.{ours}.weight") == f"model.layers.4.{theirs}.weight"


def test_names_of_models_lead_to_their_family() -> None:
    expected = {"llama3.1": "llama", "yi": "llama", "codellama": "llama", "aquila2": "aquila", "qwen1.5": "qwen2"}
    expected |= {"qwen1": "qwen", "baichuan2": "baichuan", "chatglm3": "chatglm", "glm4": "chatglm", "gpt3": "gpt2"}
    assert {name: FAMILIES.get(name).name for name in expected} == expected


# published config.json files, shortened, and the number of parameters of their model cards
PUBLISHED: list[tuple[str, int, dict[str, Any]]] = [
    (
        "baichuan2-13b",
        13_896_668_160,
        {
            **{"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu"},
            **{"hidden_size": 5120, "intermediate_size": 13696, "num_attention_heads": 40, "num_hidden_layers": 40},
            **{"model_max_length": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 125696},
            **{"_from_model_config": True, "gradient_checkpointing": [False], "tokenizer_class": "BaichuanTokenizer"},
        },
    ),
    (
        "chatglm3-6b",
        6_243_584_000,
        {
            **{"architectures": ["ChatGLMModel"], "model_type": "chatglm", "add_bias_linear": False, "num_layers": 28},
            **{"add_qkv_bias": True, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
            **{"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "hidden_dropout": 0.0},
            **{"bias_dropout_fusion": True, "ffn_hidden_size": 13696, "fp32_residual_connection": False},
            **{"hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-5, "multi_query_attention": True},
            **{"multi_query_group_num": 2, "num_attention_heads": 32, "original_rope": True, "post_layer_norm": True},
            **{"padded_vocab_size": 65024, "rmsnorm": True, "seq_length": 8192, "tie_word_embeddings": False},
            **{"pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0, "classifier_dropout": None},
        },
    ),
    (
        "qwen-7b",
        7_721_324_544,
        {
            **{"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "attn_dropout_prob": 0.0, "bf16": False},
            **{"emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 4096, "kv_channels": 128},
            **{"intermediate_size": 22016, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 32768},
            **{"no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None},
            **{"rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192},
            **{"tie_word_embeddings": False, "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True},
            **{"vocab_size": 151936, "softmax_in_fp32": False, "use_cache_kernel": False},
        },
    ),
    (
        "bloom-7b1",
        7_069_016_064,
        {
            **{"architectures": ["BloomForCausalLM"], "model_type": "bloom", "attention_dropout": 0.0, "n_layer": 30},
            **{"apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "n_inner": None},
            **{"bias_dropout_fusion": True, "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-5, "n_embed": 4096},
            **{"masked_softmax_fusion": True, "num_attention_heads": 32, "offset_alibi": 100, "seq_length": 2048},
            **{"skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "vocab_size": 250880},
        },
    ),
    (
        "gpt2",
        124_439_808,
        {
            **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"},
            **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "n_ctx": 1024},
            **{"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "summary_type": "cls_index"},
            **{"summary_use_proj": True, "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
            **{"vocab_size": 50257, "task_specific_params": {"text-generation": {"do_sample": True}}},
        },
    ),
    (
        "phi-3-mini-4k",
        3_821_079_552,
        {
            **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0},
            **{"hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "resid_pdrop": 0.0},
            **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5},
            **{"original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0},
            **{"sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064, "hidden_act": "silu"},
        },
    ),
    (
        "olmo-2-7b",
        7_298_617_344,
        {
            **{"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False},
            **{"hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "hidden_act": "silu"},
            **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6},
            **{"rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
        },
    ),
    (
        "minicpm-2b",
        2_724_880_896,
        {
            **{"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "hidden_size": 2304},
            **{"intermediate_size": 5760, "max_position_embeddings": 4096, "num_attention_heads": 36},
            **{"num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-5, "rope_scaling": None},
            **{"scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256, "vocab_size": 122753, "hidden_act": "silu"},
        },
    ),
    (
        "internlm2-20b",
        19_861_149_696,
        {
            **{"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, "rope_theta": 1e6},
            **{"hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 32768, "vocab_size": 92544},
            **{"num_attention_heads": 48, "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
            **{"rope_scaling": {"factor": 1.0, "type": "dynamic"}, "tie_word_embeddings": False, "hidden_act": "silu"},
        },
    ),
]


@pytest.mark.parametrize(("name", "parameters", "content"), PUBLISHED, ids=[name for name, _, _ in PUBLISHED])
def test_published_files(name: str, parameters: int, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read_config(tmp_path)
    assert count_parameters(config) == parameters
    written = FAMILIES.get(config.family).write(config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == config


def test_which_baichuan_it_is(tmp_path: Path) -> None:
    content = next(content for name, _, content in PUBLISHED if name == "baichuan2-13b")
    for change, normalised, position in (
        ({}, True, "alibi"),
        ({"vocab_size": 64000}, False, "alibi"),
        ({"vocab_size": 64000, "norm_head": True}, True, "alibi"),
        ({"max_position_embeddings": 4096}, True, "rope"),
        ({"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096}, False, "rope"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        config = read_config(tmp_path)
        assert (config.normalize_lm_head, config.position_embedding) == (normalised, position)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("chatglm3-6b", {"rmsnorm": False}, "rmsnorm = False is not implemented for this family; known: True"),
        ("chatglm3-6b", {"vocab_size": 3}, "contradicts"),
        ("bloom-7b1", {"n_head": 16}, "contradicts"),
        ("gpt2", {"n_ctx": 512}, "contradicts"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("qwen-7b", {"intermediate_size": 11}, "intermediate_size = 11 should be an even number"),
        ("qwen-7b", {"no_bias": False}, "no_bias = False is not implemented"),
        ("minicpm-2b", {"num_experts": 8}, "num_experts = 8 is not a key"),
        ("minicpm-2b", {"scale_emb": "12"}, "scale_emb = '12' should be a number"),
        ("phi-3-mini-4k", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not implemented"),
    ],
)
def test_what_is_not_implemented_is_said(name: str, change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    content = next(content for each, _, content in PUBLISHED if each == name)
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ModelLinkError) as caught:
        read_config(tmp_path)
    assert sentence in str(caught.value)


def test_a_fused_tensor_that_is_missing_or_misshapen(tmp_path: Path) -> None:
    """Named as it is called in the files, before anything is loaded; and an export wants every part of it."""
    peer_of("phi3", {}).save_pretrained(tmp_path)
    file, fused = tmp_path / "model.safetensors", "model.layers.1.self_attn.qkv_proj.weight"
    model, state = ours_from(tmp_path), load_file(file)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for damaged, sentence in (
        ({name: value for name, value in state.items() if name != fused}, f"lacks the tensor '{fused}'"),
        (state | {fused: state[fused][:-8].contiguous()}, f"tensor '{fused}' has shape [72, 48], the model wants [80"),
        (state | {fused.replace("qkv", "q"): state[fused][:48].clone()}, "q_proj.weight' fits nowhere"),
    ):
        save_file({name: value + 1 for name, value in damaged.items()}, file, metadata={"format": "pt"})
        with pytest.raises(ModelLinkError) as caught:
            load_hf(model, tmp_path, progress=False)
        assert sentence in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    parts = [(name, value) for name, value in model.named_parameters() if name != "layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ModelLinkError, match="1 tensors never came, the first is 'layers.1.self_attn.k_proj.weight'"):
        save_hf(tmp_path / "out", parts, model.config)
    assert not (tmp_path / "out").exists()
