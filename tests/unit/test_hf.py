"""Hugging Face folders: both spellings of config.json, weights in every kind of file, export, and every bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from modellink.checkpoint.hf import (
    family_of,
    is_hf_folder,
    load_hf,
    read_config,
    read_extras,
    save_hf,
)
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = torch.randint(0, 203, (2, 19), generator=torch.Generator().manual_seed(1))
# published config.json files, as they stand on the hub
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-7b": {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096},
        **{"initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 2048, "use_cache": True},
        **{"num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        **{"torch_dtype": "float16", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    },
    "llama-3.1-8b": {
        **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
        **{"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu"},
        **{"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False},
        **{"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8},
        **{"pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False},
        **{"torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256},
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 8192,
        },
    },
    "codellama-34b": {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 8192},
        **{"intermediate_size": 22016, "max_position_embeddings": 16384, "num_attention_heads": 64},
        **{"num_hidden_layers": 48, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
        **{"rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "vocab_size": 32000},
    },
    "mistral-7b": {
        **{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"},
        **{"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "sliding_window": 4096},
        **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        **{"rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000},
    },
    "qwen2-7b with yarn": {
        **{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643},
        **{"eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944},
        **{"max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "rms_norm_eps": 1e-6},
        **{"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0},
        **{"sliding_window": 131072, "use_sliding_window": False, "tie_word_embeddings": False, "vocab_size": 152064},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "qwen3-0.6b": {
        **{"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu"},
        **{"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "model_type": "qwen3"},
        **{"max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8},
        **{"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None},
        **{"tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
    },
    "gemma-2b": {
        **{"architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256, "hidden_act": "gelu"},
        **{"hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma"},
        **{"num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
        **{"rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000, "hidden_activation": None},
    },
    "gemma-2-9b": {
        **{"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid"},
        **{"final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3584},
        **{"hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 14336, "max_position_embeddings": 8192},
        **{"model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8},
        **{"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096},
        **{"sliding_window_size": None, "vocab_size": 256000, "attention_bias": False, "attention_dropout": 0.0},
    },
}
PEERS: dict[str, type] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
}


def write_json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def folder_with(tmp_path: Path, content: dict[str, Any]) -> Path:
    write_json(tmp_path / "config.json", content)
    return tmp_path


def peer(family: str = "llama", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(PEERS[family](**SIZES | options))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def resolved(folder: Path, padded: int | None = None) -> ModelConfig:
    config = read_config(folder)
    return dataclasses.replace(config, padded_vocab_size=padded or config.vocab_size)


def loaded(folder: Path, **options: Any) -> Decoder:
    model = Decoder(resolved(folder)).eval()
    load_hf(model, folder, progress=False, **options)
    return model


def files_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    peer().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


# config.json ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_and_new_spelling_agree(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    old, new, ours = (tmp_path / part for part in ("old", "new", "ours"))
    for folder in (old, new, ours):
        folder.mkdir()
    write_json(old / "config.json", published)
    # transformers translates the one into the other
    theirs = PEERS[published["model_type"]](**published)
    theirs.save_pretrained(new)
    assert "rope_parameters" in json.loads((new / "config.json").read_text())
    config = read_config(old)
    assert read_config(new) == config
    assert config.rope_theta == float(published.get("rope_theta", 10000.0))
    # what we write, transformers reads as what it read before
    written = FAMILIES.get(config.family).write(config)
    write_json(ours / "config.json", written)
    assert read_config(ours) == config
    again = transformers.AutoConfig.from_pretrained(ours).to_dict()
    skipped = {
        "_name_or_path",
        "sliding_window_size",
        "dtype",
        "transformers_version",
        "architectures",
        "max_window_layers",
    }
    skipped |= {"hidden_activation", "bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation", "type"}
    expected = theirs.to_dict()
    expected["rope_parameters"].pop("type", None)
    for key, value in expected.items():
        if key not in skipped:
            assert again.get(key) == value, key


def test_spellings_of_the_reference_folders_agree(shared: Path, tmp_path: Path) -> None:
    for name in ("llama2_gqa", "qwen2"):
        source = shared / "megatron" / "hf" / name
        shutil.copy(source / "config.v5.json", tmp_path / "config.json")
        assert read_config(tmp_path) == read_config(source)


def test_facts_of_published_files(tmp_path: Path) -> None:
    read = {name: read_config(folder_with(tmp_path, content)) for name, content in PUBLISHED.items()}
    assert (read["llama-3.1-8b"].rope_scaling, read["llama-3.1-8b"].rope_original_max_position) == ("llama3", 8192)
    assert read["mistral-7b"].sliding_window == 4096
    assert (read["qwen2-7b with yarn"].rope_scaling_factor, read["qwen2-7b with yarn"].sliding_window) == (4.0, None)
    assert read["qwen2-7b with yarn"].qkv_bias and not read["qwen2-7b with yarn"].attention_output_bias
    assert read["qwen3-0.6b"].qk_norm and read["qwen3-0.6b"].tie_word_embeddings
    assert (read["gemma-2b"].activation, read["gemma-2b"].tie_word_embeddings) == ("gelu_tanh", True)
    assert (read["gemma-2-9b"].window_layers, read["gemma-2-9b"].query_scale) == ("even", 256.0)
    assert read["llama-7b"].num_key_value_heads == 32


def test_per_layer_type_rope_of_one_value(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e4}
    nested = {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    content = {**SIZES, "model_type": "mistral", "sliding_window": None}
    assert read_config(folder_with(tmp_path, content | nested)).rope_theta == 5e4
    nested["rope_parameters"]["full_attention"] = rope | {"rope_theta": 6e4}
    with pytest.raises(ModelLinkError, match="differs between layer types"):
        read_config(folder_with(tmp_path, content | nested))


def test_recognising_folders(llama: Path, tmp_path: Path) -> None:
    assert is_hf_folder(llama) and family_of(llama) == "llama"
    assert not is_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_hf_folder(tmp_path)


def test_reading_a_config_needs_no_torch(llama: Path, root: Path) -> None:
    code = (
        "import sys; from modellink.checkpoint.hf_config import read_config;"
        f"read_config({str(llama)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {**SIZES, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    (LLAMA | {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not a key"),
    (LLAMA | {"rope_thta": 5e5}, "Did you mean 'rope_theta'"),
    (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA | {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' is not implemented"),
    (LLAMA | {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_type = 'longrope' is not implemented"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "needs the key 'factor'"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta = 1"),
    (LLAMA | {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "contradicts"),
    (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "contradicts"),
    (LLAMA | {"rope_scaling": "linear"}, "should be an object"),
    (
        LLAMA | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": "8k"}},
        "= '8k' should be of type int",
    ),
    (
        LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "original_max_position_embeddings": 32},
        "contradicts",
    ),
    (
        SIZES | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "all"},
        "max_window_layers = 'all'",
    ),
    (MISTRAL | {"layer_types": 3}, "layer_types = 3 should be a list"),
    (LLAMA | {"sliding_window": 128}, "sliding_window = 128 is not a key"),
    (LLAMA | {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    (MISTRAL | {"layer_types": ["full_attention", "sliding_attention"]}, "its window holds on all layers"),
    (MISTRAL | {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    (MISTRAL | {"layer_types": ["sliding_attention"]}, "1 entries for 2 layers"),
    (MISTRAL | {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "needs a sliding_window"),
    (LLAMA | {"num_hidden_layers": "two"}, "num_hidden_layers = 'two' should be of type int"),
    (LLAMA | {"rms_norm_eps": None}, "rms_norm_eps = None should be of type float"),
    (LLAMA | {"num_key_value_heads": 4}, "6 query heads are not a multiple of 4"),
    (LLAMA | {"num_hidden_layers": 0}, "must be at least 1"),
    ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "the key 'hidden_size' is missing"),
    (LLAMA | {"architectures": ["LlamaForCausaLM"]}, "Did you mean 'LlamaForCausalLM'"),
    ({"model_type": "mamba"}, "the architecture 'mamba' is not supported"),
    (SIZES | {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu"}, "contradicts"),
    (SIZES | {"model_type": "internlm", "rotary": {"type": "xpos"}}, "rotary"),
]


@pytest.mark.parametrize(("content", "sentence"), BAD_CONFIGS, ids=[sentence for _, sentence in BAD_CONFIGS])
def test_config_that_matters_and_is_not_understood(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLinkError) as caught:
        read_config(folder_with(tmp_path, content))
    assert sentence in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_cosmetic_and_switched_off_keys_pass(tmp_path: Path) -> None:
    extra = {"new_feature": False, "other": None, "resid_pdrop": 0.0, "id2label": {"0": "a"}, "temperature": 0.6}
    assert read_config(folder_with(tmp_path, LLAMA | extra)) == read_config(folder_with(tmp_path, LLAMA))


def test_config_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelLinkError, match="does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelLinkError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelLinkError, match="holds list"):
        read_config(tmp_path)
    with pytest.raises(ModelLinkError, match="is a file"):
        read_config(tmp_path / "config.json")


# weights in -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_weights(llama: Path, tmp_path: Path) -> None:
    expected = loaded(llama).state_dict()
    state = files_state(llama)
    sharded, single, parts, old = (tmp_path / name for name in ("sharded", "single", "parts", "old"))
    peer().save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for folder in (single, parts, old):
        folder.mkdir()
        shutil.copy(llama / "config.json", folder)
    torch.save(state, single / "pytorch_model.bin")
    torch.save(state, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = sorted(state)
    torch.save({name: state[name] for name in names[:7]}, parts / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[7:]}, parts / "pytorch_model-00002-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{1 if i < 7 else 2}-of-00002.bin" for i, name in enumerate(names)}
    write_json(parts / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    for folder in (sharded, single, parts, old):
        for name, value in loaded(folder).state_dict().items():
            assert torch.equal(value, expected[name]), (folder.name, name)


def test_a_stage_takes_its_own_tensors(tmp_path: Path) -> None:
    peer(tie_word_embeddings=True).save_pretrained(tmp_path)
    config, whole = resolved(tmp_path), loaded(tmp_path).state_dict()
    last = Decoder(config, [1], first=False)
    load_hf(last, tmp_path, progress=False)
    for name, value in last.state_dict().items():
        assert torch.equal(value, whole[name]), name
    assert set(last.state_dict()) == {name for name in whole if "layers.1." in name} | {"norm.weight", "lm_head.weight"}


def test_padding_repeats_the_last_row_and_values_are_cast(llama: Path) -> None:
    model = Decoder(resolved(llama, padded=256)).to(torch.bfloat16)
    load_hf(model, llama, progress=False)
    source = files_state(llama)
    for ours, theirs in ((model.embed_tokens, "model.embed_tokens.weight"), (model.lm_head, "lm_head.weight")):
        assert torch.equal(ours.weight[:203], source[theirs].bfloat16())
        assert torch.equal(ours.weight[203:], source[theirs][-1:].bfloat16().expand(53, -1))


def test_output_matrix_of_a_tied_model(tmp_path: Path) -> None:
    peer(tie_word_embeddings=True).save_pretrained(tmp_path)
    state = files_state(tmp_path)
    assert "lm_head.weight" not in state
    expected = loaded(tmp_path)(TOKENS)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(loaded(tmp_path)(TOKENS), expected)
    state["lm_head.weight"][-1, -1] += 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLinkError, match=r"differs from 'model.embed_tokens.weight' although"):
        loaded(tmp_path)


def rewrite(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = files_state(folder)
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def overwrite_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def pickle_of_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("surprise")}, folder / "pytorch_model.bin")


def cut_pickle(folder: Path) -> None:
    torch.save(files_state(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:5000])


def shard_missing(folder: Path) -> None:
    peer().save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../weights.safetensors"}})


def index_promises_too_much(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    names = dict.fromkeys([*files_state(folder), "model.more"], "weights.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})


def index_broken(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


KEY = "model.layers.1.mlp.up_proj.weight"
BAD_WEIGHTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing tensor", rewrite(lambda state: state.pop(KEY)), f"lacks the tensor '{KEY}'"),
    ("missing head", rewrite(lambda state: state.pop("lm_head.weight")), "if tie_word_embeddings were true"),
    ("surplus tensor", rewrite(lambda s: s.update({"model.layers.1.mlp.gate": torch.ones(2)})), "fits nowhere"),
    ("one layer too many", rewrite(lambda s: s.update({KEY.replace("1", "2"): s[KEY].clone()})), "of 2 layers"),
    ("wrong shape", rewrite(lambda s: s.update({KEY: s[KEY].T.contiguous()})), "has shape [48, 80], the model wants"),
    ("quantised", rewrite(lambda state: state.update({KEY: state[KEY].char()})), "is stored as I8"),
    ("NaN", rewrite(lambda state: state[KEY].fill_(float("nan"))), f"tensor '{KEY}' holds NaN"),
    ("cut short", cut, "model.safetensors is damaged or cut short"),
    ("overwritten header", overwrite_header, "model.safetensors is damaged or cut short"),
    ("pickle that runs code", pickle_of_code, "pytorch_model.bin is damaged, or holds more than tensors"),
    ("pickle cut short", cut_pickle, "pytorch_model.bin is damaged, or holds more than tensors"),
    ("missing shard", shard_missing, "-00002-of-"),
    ("index leaves the folder", index_outside, "which is not a file of this folder"),
    ("index promises too much", index_promises_too_much, "lacks the tensor 'model.more' that the index promises"),
    ("broken index", index_broken, "is not a weight index"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
]


@pytest.mark.parametrize(("name", "damage", "sentence"), BAD_WEIGHTS, ids=[name for name, _, _ in BAD_WEIGHTS])
def test_bad_weights_are_refused_by_name(name: str, damage: Callable[[Path], None], sentence: str, llama: Path) -> None:
    damage(llama)
    with pytest.raises(ModelLinkError) as caught:
        loaded(llama, check_finite=name == "NaN")
    assert sentence in str(caught.value)
    assert str(llama) in str(caught.value)


def test_nothing_is_loaded_from_a_folder_that_does_not_fit(llama: Path) -> None:
    rewrite(lambda state: state.pop("model.norm.weight"))(llama)
    model = Decoder(resolved(llama))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelLinkError):
        load_hf(model, llama, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_vocabulary_that_does_not_fit(llama: Path) -> None:
    with pytest.raises(ModelLinkError, match=r"203 rows, more than the model's vocabulary of 192"):
        load_hf(Decoder(dataclasses.replace(resolved(llama), vocab_size=192, padded_vocab_size=192)), llama)
    path = llama / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 203', '"vocab_size": 250'))
    with pytest.raises(ModelLinkError, match="203 rows, fewer than the vocabulary of 250"):
        load_hf(Decoder(dataclasses.replace(resolved(llama), padded_vocab_size=256)), llama)


def test_added_tokens_take_rows_that_pad_the_vocabulary(llama: Path) -> None:
    model = Decoder(dataclasses.replace(resolved(llama), vocab_size=205, padded_vocab_size=256))
    load_hf(model, llama)
    assert torch.equal(model.embed_tokens.weight[203], model.embed_tokens.weight[202])


def test_rotary_tables_of_old_files_are_ignored(llama: Path) -> None:
    expected = loaded(llama)(TOKENS)
    rewrite(lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(llama)
    assert torch.equal(loaded(llama)(TOKENS), expected)


# weights out ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PEERS)
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 60_000])
def test_round_trip_is_byte_identical(family: str, shard_bytes: int, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    theirs = peer(family)
    theirs.to(torch.bfloat16).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    model = Decoder(resolved(source, padded=256)).to(torch.bfloat16)
    load_hf(model, source, progress=False)
    tensors = model.named_parameters()
    save_hf(target, tensors, model.config, tokenizer_from=source, max_shard_bytes=shard_bytes)
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard_bytes == 60_000)
    before, after = files_state(source), files_state(target)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name].view(torch.int16), value.view(torch.int16)), name
    assert (target / "tokenizer.json").exists()
    assert read_config(target) == read_config(source)
    written = json.loads((target / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and written["eos_token_id"] == 2
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2
    again = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    assert again.dtype == torch.bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)


def test_fp32_masters_of_a_bf16_folder_come_back_bit_by_bit(tmp_path: Path) -> None:
    peer().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = loaded(tmp_path / "source")
    assert model.norm.weight.dtype == torch.float32
    save_hf(tmp_path / "out", model.named_parameters(), model.config, dtype=torch.bfloat16)
    before, after = files_state(tmp_path / "source"), files_state(tmp_path / "out")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_extras_survive_a_format_that_knows_only_the_config(llama: Path, tmp_path: Path) -> None:
    extras = read_extras(llama)
    assert extras["eos_token_id"] == 2 and "rope_theta" not in extras and "dtype" not in extras
    model = loaded(llama)
    save_hf(tmp_path / "out", model.named_parameters(), model.config, extras=extras)
    assert read_extras(tmp_path / "out").items() >= extras.items()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def test_only_own_folders_are_replaced_and_failures_leave_no_trace(llama: Path, tmp_path: Path) -> None:
    model, out = loaded(llama), tmp_path / "out"
    out.mkdir()
    save_hf(out, model.named_parameters(), model.config)
    model.norm.weight.data.zero_()
    save_hf(out, model.named_parameters(), model.config)
    assert not files_state(out)["model.norm.weight"].any()
    before = sorted(path.name for path in tmp_path.iterdir())
    broken = [
        (dict(model.named_parameters()).items() - {("norm.weight", model.norm.weight)}, "1 tensors never came"),
        ([("norm.weight", torch.ones(3))], "its shape is [3]"),
        ([("layers.7.mlp.up_proj.weight", torch.ones(3))], "cannot export 'layers.7.mlp.up_proj.weight'"),
    ]
    for tensors, sentence in broken:
        with pytest.raises(ModelLinkError) as caught:
            save_hf(out, tensors, model.config)
        assert sentence in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not files_state(out)["model.norm.weight"].any()
    with pytest.raises(ModelLinkError, match="was not written by ModelLink"):
        save_hf(llama, model.named_parameters(), model.config)


def test_a_model_that_the_family_cannot_express(llama: Path, tmp_path: Path) -> None:
    config = resolved(llama)
    for change, sentence in (
        ({"qkv_bias": True}, "families that can: qwen2"),
        ({"sliding_window": 16}, "families that can: mistral"),
        ({"position_embedding": "alibi"}, "no family here can"),
        ({"rope_scaling": "linear", "rope_scaling_factor": 2.0, "qk_norm": True}, "families that can: qwen3"),
    ):
        with pytest.raises(ModelLinkError, match="family 'llama' cannot express") as caught:
            save_hf(tmp_path / "out", [], dataclasses.replace(config, **change))
        assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()
