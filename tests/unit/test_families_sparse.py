"""Families with experts, latents, sinks or two rotations against `transformers`: two odd shapes each, both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_peers import VOCAB, YARN, make_peer, ours_from, set_of, stepwise, tokens
from safetensors.torch import load_file, save_file
from torch import nn

from modellink.checkpoint.hf import read_config, save_hf
from modellink.checkpoint.mapping import layout_of
from modellink.errors import ModelLinkError
from modellink.models.families import FAMILIES

SCALES = {"mscale": 0.7, "mscale_all_dim": 0.4}
CLASSES = {
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "glm4_moe": (transformers.Glm4MoeConfig, transformers.Glm4MoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
EAGER = {"experts_implementation": "eager"}  # its grouped products take no odd sizes
LATENT = {"num_key_value_heads": None}
NO_EXTRA = {"num_nextn_predict_layers": 0}
# (family, what is special, options of the peer's configuration class)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "mixtral",
        "three of five, wide heads",
        {"head_dim": 14, "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 28},
    ),
    (
        "mixtral",
        "four of seven, odd width, window, tied",
        {
            **{"num_local_experts": 7, "num_experts_per_tok": 4, "intermediate_size": 37, "num_key_value_heads": 3},
            **{"sliding_window": 9, "tie_word_embeddings": True, "rope_theta": 1e4},
        },
    ),
    (
        "qwen2_moe",
        "first layer dense, yarn",
        {
            **{"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
            **{"shared_expert_intermediate_size": 60, "rope_scaling": YARN},
        },
    ),
    (
        "qwen2_moe",
        "renormalised, no bias, odd width",
        {
            **{"num_experts": 6, "num_experts_per_tok": 5, "moe_intermediate_size": 37, "norm_topk_prob": True},
            **{"shared_expert_intermediate_size": 37, "qkv_bias": False, "num_key_value_heads": 1, "head_dim": 10},
        },
    ),
    (
        "qwen3_moe",
        "renormalised, wide heads",
        {
            **{"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 22, "norm_topk_prob": True},
            **{"head_dim": 14, "rope_theta": 1e6},
        },
    ),
    (
        "qwen3_moe",
        "two dense layers, biases, tied",
        {
            **{"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [0, 1]},
            **{"attention_bias": True, "num_key_value_heads": 3, "head_dim": 10, "tie_word_embeddings": True},
        },
    ),
    (
        "deepseek_v2",
        "groups, query latent, yarn",
        LATENT
        | {
            **{"q_lora_rank": 18, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14},
            **{"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 22, "n_shared_experts": 2},
            **{"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 4.0},
            **{"first_k_dense_replace": 1, "rope_scaling": YARN | SCALES},
        },
    ),
    (
        "deepseek_v2",
        "greedy, direct queries, biases",
        LATENT
        | {
            **{"q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
            **{"n_routed_experts": 5, "num_experts_per_tok": 4, "moe_intermediate_size": 37, "n_shared_experts": 1},
            **{"num_attention_heads": 3, "attention_bias": True, "n_group": 1, "topk_group": 1},
        },
    ),
    (
        "deepseek_v3",
        "groups, query latent",
        LATENT
        | NO_EXTRA
        | {
            **{"q_lora_rank": 18, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14},
            **{"n_routed_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 22, "n_shared_experts": 2},
            **{"n_group": 3, "topk_group": 2, "first_k_dense_replace": 1},
        },
    ),
    (
        "deepseek_v3",
        "direct queries, rotated in halves, yarn",
        LATENT
        | NO_EXTRA
        | {
            **{"q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10},
            **{"n_routed_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 37, "n_shared_experts": 1},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "norm_topk_prob": False},
            **{"rope_interleave": False, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        },
    ),
    (
        "glm4_moe",
        "norms on heads, half rotated",
        {
            **{"n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 12},
            **{"use_qk_norm": True, "attention_bias": True, **NO_EXTRA},
        },
    ),
    (
        "glm4_moe",
        "groups, no norms on heads, wholly rotated",
        {
            **{"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 37, "n_shared_experts": 2},
            **{"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
            **{"partial_rotary_factor": 1.0, "num_key_value_heads": 3, "head_dim": 10, **NO_EXTRA},
        },
    ),
    (
        "gpt_oss",
        "yarn, wide heads",
        {
            **{"head_dim": 14, "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 28},
            **{"sliding_window": 9, "rope_parameters": YARN | {"truncate": False, "rope_theta": 100.0}},
        },
    ),
    (
        "gpt_oss",
        "tight clamp, listed windows, no biases",
        {
            **{"head_dim": 10, "num_local_experts": 6, "num_experts_per_tok": 4, "intermediate_size": 37},
            **{"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
            **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "swiglu_limit": 0.6},
            **{"attention_bias": False, "num_key_value_heads": 3},
        },
    ),
    (
        "gemma3",
        "every third layer sees all",
        {
            **{"head_dim": 14, "query_pre_attn_scalar": 24, "sliding_window": 9, "num_hidden_layers": 5},
            **{"sliding_window_pattern": 3},
        },
    ),
    (
        "gemma3",
        "listed windows, cap, scaled, untied",
        {
            **{"head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 5, "num_key_value_heads": 3},
            **{"layer_types": ["full_attention", "sliding_attention", "full_attention"], "attention_bias": True},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            **{"final_logit_softcapping": 6.0, "tie_word_embeddings": False},
        },
    ),
]
IDS = [f"{family}-{what.replace(' ', '_')}" for family, what, _ in CASES]
EACH = pytest.mark.parametrize(("family", "options"), [(family, options) for family, _, options in CASES], ids=IDS)


def peer_of(family: str, options: dict[str, Any]) -> nn.Module:
    return make_peer(CLASSES[family], options | EAGER)


@EACH
def test_logits_cache_loss_and_gradients(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    peer, batch = peer_of(family, options), tokens()
    peer.save_pretrained(tmp_path / "weights")
    model = ours_from(tmp_path / "weights", padding=5)
    assert model.config.family == family
    output = peer(batch, labels=batch, use_cache=False)
    logits = model(batch)
    assert output.logits.std() > 0.5
    torch.testing.assert_close(logits[..., :VOCAB], output.logits, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(stepwise(model, batch), logits, atol=1e-4, rtol=0)

    model = ours_from(tmp_path / "weights")
    loss = nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert abs(output.loss.item() - loss.item()) < 1e-5
    output.loss.backward()
    loss.backward()
    for parameter in peer.parameters():  # saved like weights, so under the names of the files
        parameter.data = parameter.grad
    peer.save_pretrained(tmp_path / "gradients")
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for tensor in set_of(layout_of(model.config, {name: tuple(grad.shape) for name, grad in gradients.items()})):
        for name, gradient in tensor.assemble(gradients):
            theirs = expected.pop(name)
            scale = theirs.abs().max().item()
            torch.testing.assert_close(gradient, theirs, atol=1e-5 * max(scale, 1.0), rtol=1e-4, msg=name)
    assert all(name.endswith("e_score_correction_bias") for name in expected)
    assert sum(gradient.abs().max().item() > 0 for gradient in gradients.values()) == len(gradients)


@EACH
@torch.no_grad()
def test_folder_comes_back(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Tensors byte for byte, every key of config.json, and a folder in which transformers finds the same model."""
    peer_of(family, options).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = ours_from(tmp_path / "source", padding=5).to(torch.bfloat16)
    save_hf(tmp_path / "target", model.named_parameters(), model.config, tokenizer_from=tmp_path / "source")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "target"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value.to(after[name].dtype)) for name, value in before.items())
    assert read_config(tmp_path / "target") == read_config(tmp_path / "source")
    theirs, ours = (
        CLASSES[family][1].from_pretrained(tmp_path / name, **EAGER).eval() for name in ("source", "target")
    )
    assert_same_meaning(ours.config.to_dict(), theirs.config.to_dict())
    assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


def assert_same_meaning(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every key of theirs says the same in ours, but for the folder's name and sizes left to be derived."""
    for name, value in theirs.items():
        found = ours[name]
        if name == "rope_parameters":
            found = {key: found.get(key) for key in value}
        assert found == value or name == "_name_or_path" or (name, value) == ("head_dim", None), name


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_layers_that_predict_further_tokens_are_left_out(family: str, tmp_path: Path) -> None:
    """Published files hold one more layer than the model has; the bias of the router stays as wide as it is stored."""
    options = next(options for name, _, options in CASES if name == family)
    peer = peer_of(family, options | {"num_nextn_predict_layers": 1})
    peer.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    state = load_file(file)
    extra = {
        name.replace(".2.", ".3."): value.clone() for name, value in state.items() if name.startswith("model.layers.2.")
    } | {"model.layers.3.eh_proj.weight": torch.ones(48, 96), "model.layers.3.shared_head.norm.weight": torch.ones(48)}
    save_file(state | extra, file, metadata={"format": "pt"})
    model = ours_from(tmp_path / "source")
    torch.testing.assert_close(model(tokens()), peer(tokens()).logits, atol=1e-4, rtol=0)
    save_hf(tmp_path / "target", model.named_parameters(), model.config, tokenizer_from=tmp_path / "source")
    assert load_file(tmp_path / "target" / "model.safetensors").keys() == state.keys()
    assert json.loads((tmp_path / "target" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    save_file(state | {"model.layers.x.eh_proj.weight": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLinkError, match="'model.layers.x.eh_proj.weight' fits nowhere"):
        ours_from(tmp_path / "source")


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
@torch.no_grad()
def test_the_text_part_of_a_model_that_sees_images(spelling: str, tmp_path: Path) -> None:
    """Read alone, and written as a model of its own."""
    options = next(options for name, _, options in CASES if name == "gemma3")
    text = peer_of("gemma3", options)
    sees = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.config, vision_config=sees | {"image_size": 16, "patch_size": 8}, mm_tokens_per_image=4
    )
    peer = transformers.Gemma3ForConditionalGeneration(config).eval()
    peer.model.language_model.load_state_dict(text.model.state_dict())
    peer.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    state = load_file(file)
    assert any(name.startswith("language_model.model.") for name in state)
    state = {name.replace("language_model.model.", spelling): value for name, value in state.items()}
    save_file(state, file, metadata={"format": "pt"})
    model = ours_from(tmp_path / "source")
    torch.testing.assert_close(model(tokens()), text(tokens()).logits, atol=1e-4, rtol=0)
    save_hf(tmp_path / "target", model.named_parameters(), model.config, tokenizer_from=tmp_path / "source")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    assert isinstance(again, transformers.Gemma3ForCausalLM)
    assert torch.equal(again(tokens()).logits, text(tokens()).logits)


def test_one_router_in_two_spellings() -> None:
    """A softmax over the chosen logits is a softmax over all, divided by the sum of the chosen."""
    mixtral = FAMILIES.get("mixtral")
    config = mixtral.read(
        {
            **{"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40},
            **{"vocab_size": 32, "max_position_embeddings": 16, "num_key_value_heads": 2},
        },
        "config.json",
    )
    same = dataclasses.replace(config, router_scoring="softmax", norm_topk_prob=True, ffn_hidden_size=7)
    assert mixtral.lost(same) == ""
    assert mixtral.lost(dataclasses.replace(same, norm_topk_prob=False)) == "router_scoring='softmax'"
    assert mixtral.lost(dataclasses.replace(config, first_k_dense_replace=1)) != ""
    assert mixtral.lost(dataclasses.replace(config, aux_loss_coeff=0.1, expert_capacity_factor=1.5)) == ""
