"""One model through every format: Hugging Face, Megatron-Core, native, native as a run at another layout saves it,
Megatron-Legacy (Megatron-Core at another layout for what Legacy has no place for), and Hugging Face again: the same
bits, and the same logits of `transformers`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import modellink
from modellink.checkpoint.megatron import MegatronFolder
from modellink.checkpoint.store import CheckpointStore
from modellink.config.architecture import read_native
from modellink.config.schema import ParallelConfig
from modellink.parallel.apply import build_model
from modellink.parallel.topology import Topology

sys.path.append(str(Path(__file__).resolve().parents[1] / "dist"))
from spawn import run_distributed

VOCAB = 203  # no layout here divides it
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0},
}
LATENT = {
    **{"kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14, "num_key_value_heads": 6},
    **{"num_experts_per_tok": 3, "moe_intermediate_size": 22, "n_shared_experts": 2, "first_k_dense_replace": 1},
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A model of `transformers`, and where it goes."""

    kind: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    core: dict[str, Any] = dataclasses.field(default_factory=dict)  # the first files of Megatron, beside TP2 PP2
    last: tuple[Any, ...] = ("mcore", 1, 2)  # the last ones: format, TP, PP

    @property
    def config(self) -> Any:
        return getattr(transformers, f"{self.kind}Config")(**SIZES | self.options)

    @property
    def architecture(self) -> Any:
        return getattr(transformers, f"{self.kind}ForCausalLM")


SPLIT = {"expert_parallel": 2}
CHAINS = {
    "llama": Chain("Llama", {"head_dim": 14}, {"layers_per_stage": [1, 4]}, ("legacy", 1, 5)),
    "qwen2": Chain("Qwen2", {}, {"vocab_multiple": 64, "layers_per_stage": [3, 2]}, ("legacy", 2, 1)),
    "gemma2": Chain(
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9, "num_hidden_layers": 4},
        {"layers_per_virtual_stage": 1},
    ),
    "mixtral": Chain(
        "Mixtral",
        {"num_local_experts": 6, "num_experts_per_tok": 3},
        SPLIT | {"layers_per_stage": [2, 3]},
        ("mcore", 2, 5),
    ),
    "qwen2_moe": Chain(
        "Qwen2Moe",
        {
            **{"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
            **{"shared_expert_intermediate_size": 60, "num_hidden_layers": 4},
        },
        SPLIT | {"grouped_experts": True},
    ),
    "deepseek_v2": Chain(
        "DeepseekV2",
        LATENT | GROUPS | {"q_lora_rank": 18, "n_routed_experts": 8},
        SPLIT | {"vocab_multiple": 32, "layers_per_stage": [2, 3]},
        ("mcore", 2, 5),
    ),
    "deepseek_v2_lite": Chain(
        "DeepseekV2",
        LATENT | {"q_lora_rank": None, "n_routed_experts": 6, "num_hidden_layers": 4, "n_group": 1, "topk_group": 1},
        SPLIT | {"grouped_experts": True, "layers_per_virtual_stage": 1},
    ),
}


def make(chain: Chain, folder: Path) -> None:
    """A random model, every weight away from zero and one, in bfloat16 as models are published."""
    torch.manual_seed(1)
    model = chain.architecture(chain.config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)


def sums(folder: Path) -> dict[str, str]:
    """Every tensor's name, type, shape and SHA-256."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return found


@torch.no_grad()
def logits(chain: Chain, folder: Path) -> Tensor:
    model, report = chain.architecture.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, VOCAB, (2, 31), generator=torch.Generator().manual_seed(2))
    return model.eval()(tokens).logits


def relay(rank: int, world_size: int, folders: list[tuple[str, str]]) -> int:
    """Load native checkpoints as a run of two pipeline stages does, and save them from there: tensors on this rank."""
    held = 0
    for source, target in folders:
        described = next(Path(source).glob("*/modellink.yaml"))
        config = read_native(described).resolve()
        parallel = ParallelConfig(pipeline_parallel=2, layers_per_stage=[1, (config.num_layers or 0) - 1])
        model = build_model(config, parallel, Topology(parallel), torch.device("cpu"), torch.bfloat16, seed=None)
        tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        extra = CheckpointStore(source).load(tensors)
        CheckpointStore(target).save(1, tensors, extra=extra, per_rank={}, config_text=described.read_text())
        held += len(tensors)
    return held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every chain up to the native checkpoint of two stages, in a folder of its own."""
    whole = tmp_path_factory.mktemp("chains")
    for name, chain in CHAINS.items():
        own = whole / name
        make(chain, own / "hf")
        modellink.convert(own / "hf", own / "core", "mcore", 2, 2, **chain.core)
        modellink.convert(own / "core", own / "native", "native")
    pairs = [(str(whole / name / "native"), str(whole / name / "relayed")) for name in CHAINS]
    assert all(held > 0 for held in run_distributed(relay, 2, pairs, timeout=200))
    return whole


@pytest.mark.parametrize("name", CHAINS)
def test_through_every_format(name: str, folder: Path) -> None:
    chain, own = CHAINS[name], folder / name
    written = MegatronFolder(own / "core").arguments
    sizes = [written[f"{axis}_model_parallel_size"] for axis in ("tensor", "pipeline", "expert")]
    assert sizes == [2, 2, chain.core.get("expert_parallel", 1)]
    assert written["padded_vocab_size"] == {1: 204, 64: 256, 32: 256}[chain.core.get("vocab_multiple", 1)]
    to, tensor, pipeline = chain.last
    modellink.convert(own / "relayed", own / "last", to, tensor, pipeline)
    modellink.convert(own / "last", own / "back", "hf")
    assert sums(own / "back") == sums(own / "hf")
    assert MegatronFolder(own / "last").dialect == to
    expected = logits(chain, own / "hf")
    assert expected.std() > 0.2
    assert torch.equal(logits(chain, own / "back"), expected)


def test_the_command_line_does_the_same(folder: Path, tmp_path: Path) -> None:
    """The reference's flags for the chain of Qwen2, in processes of their own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(modellink.__file__).parent.parent
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size"]
    hops = [
        ["--load-model-type", "hf", "--save-model-type", "mg", "--use-mcore-models", *sizes, "2"]
        + ["--num-layer-list", "3,2", "--make-vocab-size-divisible-by", "64", "--add-qkv-bias"],
        ["--load-model-type", "mg", "--save-model-type", "native", "--use-mcore-models"],
        ["--load-model-type", "native", "--save-model-type", "mg", *sizes, "1"],
        ["--load-model-type", "mg", "--save-model-type", "hf", "--load-from-legacy", "--model-type-hf", "llama2"],
    ]
    before = folder / "qwen2" / "hf"
    for number, flags in enumerate(hops):
        after = tmp_path / str(number)
        line = [sys.executable, str(root / "convert_ckpt.py"), *flags, "--load-dir", str(before)]
        done = subprocess.run([*line, "--save-dir", str(after)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        before = after
    assert sums(before) == sums(folder / "qwen2" / "hf")
    assert torch.equal(logits(CHAINS["qwen2"], before), logits(CHAINS["qwen2"], folder / "qwen2" / "hf"))
