"""Families that transformers lacks, against logits, loss, gradient norm and greedy tokens of their original code."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from modellink.checkpoint.hf import load_hf, read_config, save_hf
from modellink.models.cache import KVCache
from modellink.models.decoder import Decoder
from modellink.models.moe import MoE

FOLDERS = {
    **{"aquila": "aquila", "aquila2_gqa": "aquila", "internlm1": "internlm"},
    **{"internlm2": "internlm2", "internlm2_dynntk": "internlm2"},
    **{"qwen1": "qwen", "qwen1_beyond_seqlen": "qwen"},
    **{"baichuan1_7b": "baichuan", "baichuan1_13b": "baichuan", "baichuan1_13b_6heads": "baichuan"},
    **{"baichuan2_7b": "baichuan", "baichuan2_13b": "baichuan"},
    **{"chatglm3": "chatglm", "glm4_9b": "chatglm", "minicpm": "minicpm"},
    **{"deepseek_v2_original": "deepseek_v2", "minicpm_moe": "minicpm", "grok1_port": "grok"},
}
# outside training their original code runs the routed experts without gradients
CUT_GRADIENTS = ("deepseek_v2_original", "minicpm_moe")


def load(folder: Path, padding: int = 0) -> Decoder:
    config = read_config(folder)
    config = dataclasses.replace(config, padded_vocab_size=(config.vocab_size or 0) + padding)
    model = Decoder(config).eval()
    load_hf(model, folder, progress=False)
    return model


def cut_expert_gradients(model: Decoder) -> None:
    for block in (module for module in model.modules() if isinstance(module, MoE)):
        block.gate.register_forward_hook(lambda _, x, out: out._replace(weights_Tk=out.weights_Tk.detach()))
        block.experts.register_forward_hook(lambda _, x, out: out.detach())


def test_every_folder_is_under_test(shared: Path) -> None:
    assert {path.name for path in (shared / "parity").iterdir() if path.is_dir()} == set(FOLDERS)


@torch.no_grad()
def test_grok_as_published_in_jax(shared: Path) -> None:
    """The first publication of Grok-1's code, in another framework, on the weights of the port."""
    reference = np.load(shared / "parity" / "grok1_jax_ref.npz")
    logits = load(shared / "parity" / "grok1_port")(torch.from_numpy(reference["input_ids"]))
    torch.testing.assert_close(logits, torch.from_numpy(reference["logits"]), atol=2e-4, rtol=0)


# the other port's names of what the folder calls otherwise
OTHER_GROK = {
    **{"transformer.in_out_embed": "model.embed_tokens", "transformer.rms_norm.weight": "model.norm.scale"},
    **{"transformer.decoder_layer": "model.layers", "multi_head_attention.linear": "attn.o_proj"},
    **{f"multi_head_attention.{part}": f"attn.{part[0]}_proj" for part in ("query", "key", "value")},
    **{"router.weight": "moe_block.gate.weight", ".moe.": ".moe_block.experts."},
    **{"rms_norm_1.weight": "post_attn_norm.scale", "rms_norm_2.weight": "pre_moe_norm.scale"},
    **{"rms_norm_3.weight": "post_moe_norm.scale", "rms_norm.weight": "pre_attn_norm.scale"},
}


@torch.no_grad()
def test_grok_as_another_port_spells_it(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "grok1_port"
    settings = json.loads((source / "config.json").read_text()) | {"architectures": ["Grok1ModelForCausalLM"]}
    for name in ("hidden_act", "auto_map"):
        settings.pop(name)
    settings["num_experts"] = settings.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    state = {}
    for name, value in load_file(source / "model.safetensors").items():
        for ours, theirs in OTHER_GROK.items():
            name = name.replace(ours, theirs)
        state[name] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, reference = load(tmp_path), np.load(source / "ref.npz")
    assert model.config.family == "grok1"
    logits = model(torch.from_numpy(reference["input_ids"]))
    torch.testing.assert_close(logits, torch.from_numpy(reference["logits"]), atol=2e-4, rtol=0)


def greedy(model: Decoder, tokens_BS: Tensor, count: int) -> Tensor:
    """The `count` likeliest next tokens, one by one with a cache, as the original code generates."""
    cache, found = KVCache(model.config.num_layers or 0), []
    for _ in range(count):
        tokens_BS = model(tokens_BS, cache=cache, last_only=True).argmax(-1)
        found.append(tokens_BS)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", FOLDERS)
def test_original_code_agrees(name: str, shared: Path) -> None:
    folder = shared / "parity" / name
    reference = np.load(folder / "ref.npz")
    tokens = torch.from_numpy(reference["input_ids"])
    model = load(folder)
    assert model.config.family == FOLDERS[name]
    if model.config.normalize_lm_head:
        # outside training the original stores the normalised rows, and the reference gradient is that of those
        normalised = torch.nn.Linear(*model.lm_head.weight.shape[::-1], bias=False)
        normalised.weight.data = F.normalize(model.lm_head.weight.data)
        assert not torch.allclose(normalised.weight, model.lm_head.weight, atol=1e-2)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), torch.from_numpy(reference["logits"]), atol=2e-4, rtol=0)
        model.lm_head = normalised
    if name in CUT_GRADIENTS:
        cut_expert_gradients(model)
    logits = model(tokens)
    torch.testing.assert_close(logits.detach(), torch.from_numpy(reference["logits"]), atol=2e-4, rtol=0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - float(reference["loss"])) < 1e-5
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert (name in CUT_GRADIENTS) == any(gradient is None for gradient in gradients)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    assert norm.item() == pytest.approx(float(reference["grad_norm"]), rel=1e-4)
    expected = torch.from_numpy(reference["greedy"])
    with torch.no_grad():
        assert torch.equal(greedy(model, tokens, 8), expected)


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_comes_back(name: str, shared: Path, tmp_path: Path) -> None:
    """Through a model with a padded vocabulary and out again: the same tensors, and every key of config.json."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(shared / "parity" / name, source, copy_function=shutil.copyfile)
    model = load(source, padding=7)
    save_hf(target, model.named_parameters(), model.config, tokenizer_from=source)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    lost = {key for key in before if key not in after and not key.endswith("inv_freq")}
    assert not lost and after.keys() <= before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert read_config(target) == read_config(source)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    written_afresh = {"transformers_version", "architectures"} | (
        {"model_type"} if not theirs.get("model_type") else set()
    )
    assert {key: ours.get(key) for key in theirs if key not in written_afresh} == {
        key: value for key, value in theirs.items() if key not in written_afresh
    }
