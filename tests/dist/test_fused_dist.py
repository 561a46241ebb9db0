"""Families with fused tensors: every layout reads its own pieces of them, and computes what one process does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from spawn import run_distributed
from torch.distributed.tensor import DTensor

from modellink.checkpoint.hf import load_hf, read_config, save_hf
from modellink.config.schema import ModelConfig, ParallelConfig
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology

LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel": 4},
    {"tensor_parallel": 2, "zero_stage": 3},
    {"zero_stage": 3},
    {"pipeline_parallel": 2, "tensor_parallel": 2},
]
SPARSE_LAYOUTS: list[dict[str, Any]] = [
    {"expert_parallel": 4},
    {"expert_parallel": 2, "tensor_parallel": 2, "zero_stage": 1},
    {"expert_parallel": 2, "zero_stage": 3},
    {"expert_parallel": 2, "pipeline_parallel": 2, "zero_stage": 1},
]
# of each kind of fused tensor one family
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 8, "ffn_hidden_size": 80}
SIZES |= {"vocab_size": 203, "max_position_embeddings": 64, "tie_word_embeddings": False, "head_dim": 6}
LLAMA = {key: equivalence.LLAMA[key] for key in ("normalization", "activation", "gated_mlp", "position_embedding")}
LLAMA |= dict.fromkeys(("qkv_bias", "attention_output_bias", "mlp_bias"), False) | {"num_key_value_heads": 4}
FAMILY: dict[str, dict[str, Any]] = {
    "internlm2": LLAMA,
    "chatglm": LLAMA | {"qkv_bias": True},
    "gpt2": {"num_key_value_heads": 8},
    "bloom": {"num_key_value_heads": 8, "ffn_hidden_size": 192},
}
# one tensor an expert, the same with latents and a bias that is not trained, and stacked ones whose columns take turns
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 40, "router_topk": 2, "norm_epsilon": 1e-6}
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": LLAMA | EXPERTS,
    "deepseek_v3": LLAMA
    | EXPERTS
    | {
        "num_key_value_heads": 8, "head_dim": 10, "multi_head_latent_attention": True, "q_lora_rank": 20,
        "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_norm": True,
        "router_scoring": "sigmoid", "router_correction_bias": True, "norm_topk_prob": True, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": LLAMA | EXPERTS | {"sliding_window": 8, "window_layers": "even"},
}  # fmt: skip


def make(folder: Path, family: str) -> None:
    fields = SIZES | (FAMILY | SPARSE)[family] | dict(FAMILIES.get(family).fixed)
    config = dataclasses.replace(ModelConfig(family=family, **fields).resolve(), padded_vocab_size=203)
    torch.manual_seed(0)
    model = Decoder(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    save_hf(folder, model.named_parameters(), config)


def load_everywhere(rank: int, world_size: int, root: str) -> dict[str, int]:
    """Number of parameters compared on this rank, over all layouts, of each family."""
    compared = dict.fromkeys(FAMILY | SPARSE, 0)
    for family in compared:
        folder = Path(root) / family
        config = dataclasses.replace(read_config(folder), padded_vocab_size=256)
        reference = Decoder(config)
        load_hf(reference, folder, progress=False)
        expected = reference.state_dict()
        for layout in LAYOUTS if family in FAMILY else SPARSE_LAYOUTS:
            parallel = ParallelConfig(**layout)
            model = build_model(config, parallel, Topology(parallel), torch.device("cpu"), torch.float32, seed=None)
            for chunk in model.chunks:
                load_hf(chunk, folder, progress=False)
            for name, parameter in model.named_parameters():
                value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                assert torch.equal(value, expected[name]), (family, layout, name)
                compared[family] += 1
    return compared


def test_every_layout_gets_its_own_pieces(tmp_path: Path) -> None:
    for family in FAMILY | SPARSE:
        make(tmp_path / family, family)
    for counts in run_distributed(load_everywhere, 4, str(tmp_path)):
        for family, count in counts.items():
            config = dataclasses.replace(read_config(tmp_path / family), padded_vocab_size=256)
            parameters = len(list(Decoder(config).parameters()))
            assert 3 * parameters < count < 4 * parameters


SWITCHES: dict[str, dict[str, Any]] = {
    "baichuan2-13b": {"position_embedding": "alibi", "normalize_lm_head": True},
    "qwen": {"rope_scaling": "dynamic_doubling", "rope_original_max_position": 5, "query_log_window": 5},
    "olmo2": {"pre_norm": False, "sandwich_norm": True, "qk_norm": True, "qk_norm_all_heads": True},
}
LAYOUT_OF: dict[str, dict[str, Any]] = {
    "baichuan2-13b": {"tensor_parallel": 2, "sequence_parallel": True},
    "qwen": {"tensor_parallel": 2, "sequence_parallel": True},
    "olmo2": {"zero_stage": 3},
}


def train(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    equivalence.MODELS.update({name: equivalence.LLAMA | switches for name, switches in SWITCHES.items()})
    return {name: equivalence.train(name, layout if world_size > 1 else {}) for name, layout in LAYOUT_OF.items()}


def test_switches_under_parallelism() -> None:
    """Loss and gradient norm of three steps, an evaluation, and the final weights: those of one process."""
    (alone,) = run_distributed(train, 1)
    for results in run_distributed(train, 2):
        for name, ours in results.items():
            assert ours["norms"] == pytest.approx(alone[name]["norms"], rel=1e-5)
            assert ours["weights"].keys() == alone[name]["weights"].keys()
            for key, value in ours["weights"].items():
                assert equivalence.relative_error(value, alone[name]["weights"][key], 1e-3) < 1e-5, (name, key)
            if "tensor_parallel" in LAYOUT_OF[name]:
                assert ours["losses"] == pytest.approx(alone[name]["losses"], rel=1e-5)
                assert ours["evaluation"] == pytest.approx(alone[name]["evaluation"], rel=1e-5)
