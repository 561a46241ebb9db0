"""Where tensors of ours lie in a family's files: every layout, region by region, against the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.mapping import HFTensor, layout_of
from modellink.config.schema import ModelConfig
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES

HEADS, GROUPS, SIZE, HIDDEN = 6, 2, 4, 12
SHAPES = {"q": (HEADS * SIZE, HIDDEN), "k": (GROUPS * SIZE, HIDDEN), "v": (GROUPS * SIZE, HIDDEN)}


class Stored:
    """A stored tensor that counts the values that were read of it."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.read = value, 0

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        piece = self.value[region]
        self.read += piece.numel()
        return piece


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def by_group(parts: dict[str, Tensor]) -> Tensor:
    """Query heads of the group, its key, its value; then the next group."""
    q, k, v = (part.view(GROUPS, -1, HIDDEN) for part in parts.values())
    return torch.cat([torch.cat((q[i], k[i], v[i])) for i in range(GROUPS)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [None, 3])
def test_rows_by_turns(transposed: bool, experts: int | None) -> None:
    """Gate and up, row by row: read in one range, of which every second row is taken."""
    stack = () if experts is None else (experts,)
    parts = filled({"gate": (*stack, 5, 3), "up": (*stack, 5, 3)})
    dim = len(stack)
    tensor = HFTensor("gu", {name: tuple(v.shape) for name, v in parts.items()}, dim, groups=5, transposed=transposed)
    ((_, whole),) = tensor.assemble(parts)
    rows = whole.mT if transposed else whole
    assert torch.equal(rows[..., 0::2, :], parts["gate"]) and torch.equal(rows[..., 1::2, :], parts["up"])
    assert tensor.shape == tuple(whole.shape) and whole.is_contiguous()
    every = (slice(0, 2),) * dim
    for part, value in parts.items():
        for low in range(5):
            for high in range(low, 6):
                source = Stored(whole)
                piece = tensor.view([source], part)[*every, slice(low, high), slice(1, 3)]
                assert torch.equal(piece, value[*every, low:high, 1:3])
                assert source.read <= 2 * piece.numel()


@pytest.mark.parametrize("kind", ["one after the other", "by group", "transposed"])
def test_fused_rows(kind: str) -> None:
    groups, transposed = (GROUPS if kind == "by group" else 1), kind == "transposed"
    tensor = HFTensor("qkv.weight", SHAPES, dim=0, groups=groups, transposed=transposed)
    parts = filled(SHAPES)
    expected = by_group(parts) if groups > 1 else torch.cat(list(parts.values()))
    expected = expected.T if transposed else expected
    assert tensor.shape == tuple(expected.shape)
    ((name, whole),) = tensor.assemble(parts)
    assert name == "qkv.weight" and torch.equal(whole, expected) and whole.is_contiguous()
    for part, value in parts.items():
        for low in range(value.shape[0]):
            for high in range(low + 1, value.shape[0] + 1):
                source = Stored(whole)
                piece = tensor.view([source], part)[slice(low, high), slice(3, 9)]
                assert torch.equal(piece, value[low:high, 3:9])
                assert source.read == piece.numel()
        assert torch.equal(tensor.view([whole], part)[slice(None), slice(None)], value)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_file_tensor_per_expert(transposed: bool) -> None:
    """[E, F, D] of ours, gate and up of each expert in one tensor of the files."""
    parts = filled({"gate": (5, 4, 3), "up": (5, 4, 3)})
    tensor = HFTensor("e.{}.w", {name: (4, 3) for name in parts}, dim=0, transposed=transposed, experts=5)
    files = dict(tensor.assemble(parts))
    assert list(files) == tensor.names == [f"e.{i}.w" for i in range(5)]
    for i, value in enumerate(files.values()):
        both = torch.cat((parts["gate"][i], parts["up"][i]))
        assert torch.equal(value, both.T if transposed else both) and tuple(value.shape) == tensor.shape
    assert len({value.untyped_storage().data_ptr() for value in files.values()}) == 5
    sources = [Stored(value) for value in files.values()]
    piece = tensor.view(sources, "up")[slice(1, 3), slice(1, 4), slice(0, 2)]
    assert torch.equal(piece, parts["up"][1:3, 1:4, :2])
    assert [source.read for source in sources] == [0, 6, 6, 0, 0]


def test_experts_are_a_matter_of_the_row() -> None:
    shapes = {f"layers.7.mlp.experts.{part}_proj": (3, 8, 4) for part in ("gate", "up")}
    tensor = layout_of(ModelConfig(family="mixtral"), shapes)["layers.7.mlp.experts.up_proj"]
    assert tensor.names == [f"model.layers.7.block_sparse_moe.experts.{i}.w3.weight" for i in range(3)]
    assert tensor.shape == (8, 4)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_row_is_invertible(name: str) -> None:
    """All tensors of a model of the family into its files and back, through regions."""
    family = FAMILIES.get(name)
    config = ModelConfig(
        **{"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 32},
        **{"padded_vocab_size": 32, "ffn_hidden_size": 40, "max_position_embeddings": 16, "family": family.name},
        **{"gated_mlp": True, "normalization": "RMSNorm", "position_embedding": "rope", "tie_word_embeddings": False},
        **{"mlp_bias": False, "attention_output_bias": False, "qkv_bias": False},
    ).resolve()
    config = dataclasses.replace(config, **family.fixed)
    if any(".experts." in ours for ours in family.names):
        config.num_experts = 3
        config.n_shared_experts = 2 * any("shared_experts" in ours for ours in family.names)
        config.first_k_dense_replace = int("layers.{}.mlp.gate_proj" in family.names)
    if config.multi_head_latent_attention:
        config.q_lora_rank, config.kv_lora_rank, config.v_head_dim = 14, 10, 6
        config.qk_nope_head_dim, config.qk_rope_head_dim = 8, 4
    config = config.resolve()
    values = {name: parameter.detach() for name, parameter in Decoder(config).named_parameters()}
    layout = layout_of(config, expected_shapes(config))
    files = {name: value for tensor in layout.values() for name, value in tensor.assemble(values)}
    assert sum(value.numel() for value in files.values()) == sum(value.numel() for value in values.values())
    for canonical, value in values.items():
        view = layout[canonical].view([files[name] for name in layout[canonical].names], canonical)
        assert torch.equal(view[tuple(slice(0, size) for size in value.shape)], value)
