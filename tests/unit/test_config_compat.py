"""The reference's snippet runs against a folder that transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modellink import compat
from modellink.errors import ModelLinkError

ARGV = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "48"]
ARGV += ["--max-position-embeddings", "64", "--seq-length", "64", "--normalization", "RMSNorm", "--swiglu"]
ARGV += ["--norm-epsilon", "1e-6", "--disable-bias-linear", "--position-embedding-type", "rope", "--vocab-size", "100"]
ARGV += ["--untie-embeddings-and-output-weights", "--tensor-model-parallel-size", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=100,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_reference_snippet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def model_provider(pre_process: bool = True, post_process: bool = True) -> Any:
        config = compat.core_transformer_config_from_args(compat.get_args())
        return compat.GPTModel(
            config, num_tokentypes=0, parallel_output=False, pre_process=pre_process, post_process=post_process
        )

    defaults = {"no_load_rng": True, "no_load_optim": True}
    compat.initialize_megatron(args_defaults=defaults, argv=[*ARGV, "--load", str(folder)])
    args = compat.get_args()
    assert (args.tensor_model_parallel_size, args.no_load_rng, args.load) == (1, True, str(folder))
    assert args.tokenizer_not_use_fast is False
    with pytest.raises(AttributeError, match="no_such"):
        _ = args.no_such_option
    built = model_provider()
    assert built(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 100)
    model = compat.GPTModel.from_pretrained(model_provider=model_provider, pretrained_model_name_or_path=args.load)
    answer = model.generate([1, 2, 3], max_new_tokens=2, detokenize=False)
    assert len(answer) == 2
    assert next(model.parameters()).dtype == torch.float32  # neither --bf16 nor --fp16


def test_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_session", [])
    with pytest.raises(ModelLinkError, match="before initialize_megatron"):
        compat.get_args()
    with pytest.raises(ModelLinkError, match="extra_args_provider is refused"):
        compat.initialize_megatron(extra_args_provider=lambda parser: parser, argv=[])
    with pytest.raises(ModelLinkError, match="pretrained_model_name_or_path"):
        compat.GPTModel.from_pretrained()
