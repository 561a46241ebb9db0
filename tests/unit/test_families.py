"""Every dense family against its own code: `transformers`, fp32, eager attention, batch 3, sequence 37, heads 6/2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_peers import SIZES, STEPS, VOCAB, YARN, make_peer, ours_from, set_of, stepwise, tokens
from safetensors.torch import load_file, save_file
from torch import nn

from modellink.checkpoint.hf import expected_shapes, load_hf, read_config, save_hf
from modellink.checkpoint.mapping import layout_of, to_hf
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES

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


def peer_of(family: str, options: dict[str, Any]) -> nn.Module:
    return make_peer(CLASSES[family], options, DERIVED.get(family, ()))


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
