"""Options of `modellink convert` and `convert_ckpt.py`."""

from __future__ import annotations

from dataclasses import dataclass

from modellink.config.schema import option

FAMILIES_HF = (
    "llama2 baichuan baichuan2 mixtral chatglm3 gemma gemma2 bloom qwen internlm2 deepseek2 deepseek2-lite minicpm "
    "minicpm-moe "
    "qwen2-moe"
)


@dataclass
class ConvertConfig:
    """What is converted, into what."""

    load_dir: str | None = option(None, help="folder that is read")
    save_dir: str | None = option(None, help="folder that is written")
    load_model_type: str | None = option(None, help="format read: hf, native, mg; default: what the folder holds")
    save_model_type: str | None = option(None, help="format written: hf, native, mcore, legacy, mg (Megatron)")
    loader: str | None = option(None, help="older spelling of the format read: llama2_hf, megatron")
    saver: str | None = option(None, help="older spelling of the format written: megatron, save_huggingface_llama")
    model_type_hf: str = option("llama2", choices=tuple(FAMILIES_HF.split()), help="family of the Hugging Face folder")
    config_from: str | None = option(
        None,
        help="Hugging Face folder whose config.json says the architecture of Megatron's files; default: one in the "
        "folder read or written, else what the files say",
    )
    tokenizer_model: str | None = option(None, help="tokenizer file, for the size of the vocabulary")
    use_mcore_models: bool = option(False, help="the Megatron side is Megatron-Core, not Megatron-Legacy")
    load_from_legacy: bool = option(False, help="read Megatron-Legacy")
    save_to_legacy: bool = option(False, help="write Megatron-Legacy")
    tensor_parallel: int = option(1, help="tensor-parallel size of the Megatron files written")
    pipeline_parallel: int = option(1, help="pipeline-parallel size of the Megatron files written")
    expert_parallel: int = option(1, help="expert-parallel size of the Megatron files written")
    layers_per_stage: list[int] | None = option(None, help="uneven pipeline: layers of each stage, comma separated")
    layers_per_virtual_stage: int | None = option(None, help="layers of one model chunk of an interleaved pipeline")
    params_dtype: str | None = option(
        None, choices=("fp16", "bf16", "fp32"), help="type of the weights written; default: as they are stored"
    )
    verify: bool = option(
        True, help="read the result back, compare every tensor with what was sent, and the logits of a prompt"
    )
    workers: int | None = option(
        None, help="threads that convert; default: one per core, at most 4; the result does not depend on it"
    )
    vocab_multiple: int = option(1, help="pad the vocabulary to a multiple of this times the tensor-parallel size")
    true_vocab_size: int | None = option(None, help="rows of the embedding that are real")
    vocab_file: str | None = option(None, help="vocabulary file, for its size")
    qkv_bias: bool = option(False, help="query, key and value projections have a bias")
    attention_output_bias: bool = option(False, help="the attention output projection has a bias")
    embedding_norm: bool = option(False, help="there is a norm after the embedding")
    sandwich_norm: bool = option(False, help="attention and MLP outputs are normalised too")
    moe_grouped_gemm: bool = option(False, help="store the experts of a rank as one tensor per projection")
    w_pack: str = option("False", help="True: write query, key and value as one tensor (Baichuan)")
    lora_load: str | None = option(None, help="adapter merged into the weights")
    lora_r: int | None = option(None, help="rank of the adapter")
    lora_alpha: int | None = option(None, help="scale of the adapter")
    lora_target_modules: list[str] | None = option(None, help="modules of the adapter")
