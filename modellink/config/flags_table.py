"""The flag table as data: Megatron's spellings of our fields, flags that set fields, flags without effect or refused.

Every dataclass field has a flag of its own name without a row here. A name may carry the kind of its value, as in
"--scale-depth:float" (no kind: a switch; "any": whatever follows is ignored). `!--x` is a spelling that says no.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modellink.errors import ModelLinkError

VALUE = object()  # stands for the value given with the flag
SILENT = "read by the launcher"  # accepted without a warning
NOT_BUILT = "not built yet"

PROGRAMS = {
    "train": "Train a decoder: pre-training or supervised fine-tuning.",
    "generate": "Generate text: demonstrations, prompts from the command line or from a file.",
    "chat": "Chat with a model in the terminal.",
    "evaluate": "Score a model on benchmarks.",
    "preprocess": "Turn raw data into .bin/.idx files, or merge such files.",
    "convert": "Convert weights between formats.",
}

# Field -> further spellings of its flag. The first is the one that messages use.
SPELLINGS: dict[str, str] = {
    "model.num_key_value_heads": "--num-key-value-heads --kv-head-num",
    "model.head_dim": "--kv-channels",
    "model.padded_vocab_size": "--padded-vocab-size --pad-vocab-size-to",
    "model.vocab_multiple": "--make-vocab-size-divisible-by",
    "model.norm_offset": "--add-rmsnorm-offset",
    "model.sandwich_norm": "--post-norm",
    "model.qk_norm": "--qk-layernorm",
    "model.embedding_norm": "--embed-layernorm",
    "model.qkv_bias": "--add-qkv-bias",
    "model.attention_output_bias": "--add-dense-bias",
    "model.tie_word_embeddings": "!--untie-embeddings-and-output-weights",
    "model.position_embedding": "--position-embedding-type",
    "model.rope_theta": "--rotary-base",
    "model.rope_fraction": "--rotary-percent",
    "model.rope_interleaved": "--rotary-interleaved",
    "model.rope_scaling": "--rope-scaling-type",
    "model.rope_scaling_factor": "--rope-scaling-factor",
    "model.rope_low_freq_factor": "--low-freq-factor",
    "model.rope_high_freq_factor": "--high-freq-factor",
    "model.rope_original_max_position": "--original-max-position-embeddings "
    "--rope-scaling-original-max-position-embeddings",
    "model.rope_beta_fast": "--rope-scaling-beta-fast",
    "model.rope_beta_slow": "--rope-scaling-beta-slow",
    "model.rope_mscale": "--rope-scaling-mscale",
    "model.rope_mscale_all_dim": "--rope-scaling-mscale-all-dim",
    "model.query_scale": "--query-pre-attn-scalar",
    "model.attention_logit_softcap": "--attn-logit-softcapping",
    "model.output_logit_softcap": "--output-logit-softcapping",
    "model.query_key_layer_scaling": "--apply-query-key-layer-scaling",
    "model.embedding_multiplier": "--scale-emb --embedding-multiplier-scale",
    "model.embedding_times_sqrt_hidden": "--input-embeds-norm",
    "model.logits_multiplier": "--output-multiplier-scale",
    "model.fp32_residual": "--fp32-residual-connection",
    "model.init_std": "--init-method-std",
    "model.moe_ffn_hidden_size": "--moe-intermediate-size",
    "model.router_topk": "--moe-router-topk",
    "model.shared_expert_gate_dimension": "--shared-expert-gate-output-dimension",
    "model.router_input_jitter": "--moe-input-jitter-eps",
    "model.aux_loss_coeff": "--moe-aux-loss-coeff",
    "model.device_aux_loss_coeff": "--moe-device-level-aux-loss-coeff",
    "model.comm_aux_loss_coeff": "--moe-comm-aux-loss-coeff",
    "model.z_loss_coeff": "--moe-z-loss-coeff",
    "model.sequence_aux_loss": "--seq-aux",
    "model.expert_capacity_factor": "--moe-expert-capacity-factor",
    "model.pad_experts_to_capacity": "--moe-pad-expert-input-to-capacity",
    "model.token_drop_policy": "--moe-token-drop-policy",
    "parallel.tensor_parallel": "--tensor-model-parallel-size",
    "parallel.pipeline_parallel": "--pipeline-model-parallel-size",
    "parallel.context_parallel": "--context-parallel-size",
    "parallel.expert_parallel": "--expert-model-parallel-size",
    "parallel.layers_per_virtual_stage": "--num-layers-per-virtual-pipeline-stage",
    "parallel.layers_per_stage": "--num-layer-list --manual-layers",
    "parallel.async_tensor_parallel": "--use-mc2 --tp-comm-overlap",
    "parallel.distributed_optimizer": "--use-distributed-optimizer",
    "parallel.recompute_num_layers": "--recompute-num-layers --checkpoint-num-layers",
    "parallel.recompute_layers_per_pp_rank": "--enable-recompute-layers-per-pp-rank",
    "parallel.recompute_layers_per_stage": "--recomputation-layer-num",
    "optimizer.router_bias_update_rate": "--moe-router-bias-update-rate",
    "optimizer.override_schedule": "--override-opt_param-scheduler",
    "optimizer.use_checkpoint_schedule": "--use-checkpoint-opt_param-scheduler",
    "optimizer.split_master": "--reuse-fp32-param",
    "optimizer.fp32_grad_accumulation": "--accumulate-allreduce-grads-in-fp32",
    "optimizer.release_fp32_grad": "--release-fp32-grad --grad-reduce-in-bf16",
    "train.check_for_nan": "!--no-check-for-nan-in-loss-and-grad",
    "train.deterministic": "--use-deter-comp --deterministic-mode",
    "data.seq_length": "--seq-length --encoder-seq-length",
    "data.full_shuffle": "--full-shuffle-instruction-dataset",
    "tokenizer.tokenizer_fast": "!--tokenizer-not-use-fast",
    "checkpoint.pretrained_checkpoint": "--pretrained-checkpoint --hf-path",
    "checkpoint.save_optimizer": "!--no-save-optim",
    "checkpoint.load_optimizer": "!--no-load-optim",
    "convert.tensor_parallel": "--target-tensor-parallel-size",
    "convert.pipeline_parallel": "--target-pipeline-parallel-size",
    "convert.expert_parallel": "--target-expert-parallel-size",
    "convert.layers_per_stage": "--num-layer-list",
    "convert.layers_per_virtual_stage": "--num-layers-per-virtual-pipeline-stage",
    "convert.vocab_multiple": "--make-vocab-size-divisible-by",
    "convert.qkv_bias": "--add-qkv-bias",
    "convert.attention_output_bias": "--add-dense-bias",
    "convert.embedding_norm": "--embed-layernorm",
    "convert.sandwich_norm": "--post-norm",
}

# Field -> another spelling of a value -> ours.
VALUE_ALIASES: dict[str, dict[str, str]] = {
    "optimizer.optimizer": {"fused_adam": "adam", "adamw": "adam", "adamw_8bit": "adamw8bit"}
}

# Field -> value -> why it is refused.
REFUSED_VALUES: dict[str, dict[Any, str]] = {
    "train.stage": {
        "dpo": f"preference training is {NOT_BUILT}; use pretrain or sft",
        "rm": f"reward-model training is {NOT_BUILT}; use pretrain or sft",
    },
    "checkpoint.save_format": {
        "mcore": f"writing Megatron-Core checkpoints is {NOT_BUILT}; use native or hf",
        "legacy": f"writing Megatron-Legacy checkpoints is {NOT_BUILT}; use native or hf",
    },
}


def _hidden_over(value: float, look: Callable[[str], Any]) -> float:
    hidden = look("model.hidden_size")
    return 1.0 if hidden is None else hidden / value


def _over_sqrt_layers(value: float, look: Callable[[str], Any]) -> float:
    layers = look("model.num_layers")
    return 1.0 if layers is None else value / layers**0.5


_ROUTERS = {"aux_loss": "softmax_selected", "none": "softmax_selected"}
_ROUTERS |= {"softmax_topk": "softmax", "group_limited_greedy": "softmax"}


def _router(value: str, look: Callable[[str], Any]) -> str:
    if value not in _ROUTERS:
        raise ModelLinkError(
            f"--moe-router-load-balancing-type {value} is refused: give {', '.join(_ROUTERS)}; --router-scoring and "
            "--router-groups say the same more exactly."
        )
    return _ROUTERS[value]


def _groups(value: str, look: Callable[[str], Any]) -> int | None:
    """The reference has as many groups of experts as expert-parallel ranks."""
    limited: int | None = look("parallel.expert_parallel") if value == "group_limited_greedy" else None
    return limited if limited and limited > 1 else None


_POLICIES = {"full": "full", "block": "full", "custom": "operators"}


def _policy(value: str, look: Callable[[str], Any]) -> str:
    if value not in _POLICIES:
        raise ModelLinkError(f"--checkpoint-policy {value} is unknown: give {', '.join(_POLICIES)}.")
    return _POLICIES[value]


def _policy_layers(value: int, look: Callable[[str], Any]) -> int | None:
    block = look("parallel.recompute_method") == "block"
    layers: int | None = value if block else look("parallel.recompute_num_layers")
    return layers


def _remote(value: str, look: Callable[[str], Any]) -> bool:
    if value not in ("cpu", "none", "None"):
        raise ModelLinkError(f"--remote-device {value} is refused: optimizer states live on the device or with cpu.")
    return value == "cpu"


def _fold(value: str, look: Callable[[str], Any]) -> str | None:
    if value.lower() not in ("aiao", "fifo", "none"):
        raise ModelLinkError(f"--fold-mode {value} is unknown: give aiao or fifo; --pipeline-schedule has more.")
    return {"aiao": "aiao", "fifo": "interleaved"}.get(value.lower())


# (flag, fields it sets, help, options). Options: late=True wins over native flags; needs=FLAG has no effect without it.
ALIASES: dict[str, list[tuple[Any, ...]]] = {
    "run": [
        (
            "--group-query-attention",
            {"model.num_key_value_heads": 1},
            "grouped heads; sizes from --num-query-groups, default 1",
        ),
        (
            "--num-query-groups:int",
            {"model.num_key_value_heads": VALUE},
            "key/value heads, with --group-query-attention",
            {"needs": "--group-query-attention"},
        ),
        ("--use-rotary-position-embeddings", {"model.position_embedding": "rope"}, "--position-embedding-type rope"),
        (
            "--rotary-seq-len-interpolation-factor:float",
            {"model.rope_scaling": "linear", "model.rope_scaling_factor": VALUE},
            "linear interpolation of positions by this factor",
        ),
        (
            "--use-glm-rope",
            {"model.position_embedding": "rope", "model.rope_fraction": 0.5, "model.rope_interleaved": True},
            "rotate neighbouring pairs in the first half of each head (ChatGLM)",
            {"late": True},
        ),
        (
            "--disable-bias-linear",
            {"model.qkv_bias": False, "model.attention_output_bias": False, "model.mlp_bias": False},
            "no bias in any linear layer; --add-qkv-bias and --add-dense-bias bring theirs back",
        ),
        ("--no-bias-gelu-fusion", {"model.activation": "gelu"}, "exact (erf) gelu instead of the tanh form"),
        # only Gemma2's launch lines give it, alone, and that model's MLP is gated
        ("--gelu-tanh", {"model.gated_mlp": True, "model.activation": "gelu_tanh"}, "gated tanh gelu MLP"),
        ("--openai-gelu", {"model.activation": "gelu_tanh"}, "tanh gelu"),
        ("--squared-relu", {"model.activation": "squared_relu"}, "squared relu"),
        ("--swiglu", {"model.gated_mlp": True, "model.activation": "silu"}, "gated silu MLP"),
        (
            "--geglu",
            {
                "model.gated_mlp": True,
                "model.activation": lambda value, look: "gelu_tanh" if look("flag --gelu-tanh") else "gelu",
            },
            "gated gelu MLP: exact (erf), or tanh with --gelu-tanh",
        ),
        ("--apply-layernorm-1p", {"model.norm_offset": True}, "LayerNorm weights are stored minus one"),
        (
            "--dim-model-base:float",
            {"model.hidden_divisor": _hidden_over},
            "divide the last hidden state by hidden size / this",
        ),
        *(
            (
                f"{flag}:str",
                {"parallel.pipeline_schedule": _fold},
                "aiao: --pipeline-schedule aiao; fifo: interleaved; none: no effect",
            )
            for flag in ("--fold-mode", "--foldx-mode")
        ),
        (
            "--scale-depth:float",
            {"model.residual_multiplier": _over_sqrt_layers},
            "multiply branches by this / sqrt(layers)",
        ),
        (
            "--interleave-sliding-window:int",
            {"model.sliding_window": VALUE, "model.window_layers": "even"},
            "sliding window on layers 0, 2, 4, ...",
        ),
        (
            "--moe-router-load-balancing-type:str",
            {"model.router_scoring": _router, "model.router_groups": _groups},
            "aux_loss, none: softmax over the chosen logits; softmax_topk: over all; group_limited_greedy: over all, "
            "among the best --topk-group of --router-groups (default: as many as expert-parallel ranks)",
        ),
        ("--input-jitter", {"model.router_input_jitter": 0.0}, "no jitter on the router's input"),
        (
            "--recompute-activations",
            {"parallel.recompute_granularity": "selective"},
            "--recompute-granularity selective",
        ),
        (
            "--checkpoint-activations",
            {
                "parallel.recompute_granularity": "full",
                "parallel.recompute_method": "uniform",
                "parallel.recompute_num_layers": 1,
            },
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
        ("--remote-device:str", {"optimizer.cpu_optimizer": _remote}, "cpu: --cpu-optimizer; none: nothing"),
        (
            "--checkpoint-policy:str",
            {
                "parallel.recompute_granularity": _policy,
                "parallel.recompute_method": lambda name, look: {"full": "uniform", "block": "block"}.get(name),
                "parallel.recompute_num_layers": lambda name, look: {"full": 1, "block": 25}.get(name),
            },
            "full: every layer; block: the first --checkpoint_block_layer layers; custom: all but the results of "
            "products, attention and communication (--recompute-granularity operators)",
        ),
        (
            "--checkpoint_block_layer:int",
            {"parallel.recompute_num_layers": _policy_layers},
            "--recompute-num-layers of --checkpoint-policy block (25)",
            {"needs": "--checkpoint-policy"},
        ),
        (
            "--is-instruction-dataset",
            {"train.stage": "sft", "data.instruction_data": True},
            "--stage sft: the data are instructions",
        ),
    ],
}

_FUSED = "fused kernels are chosen by the device and give the same numbers"
_FP32 = "this part is always computed in fp32"
_COMM = "the engine schedules communication, and overlaps it with computation wherever it can"
_ONE_DECODER = "there is one decoder for all models"
_GELU = "not an option of a decoder language model"
_LORA = "it only shapes --lora-target-modules, not built yet"
_DPO = "it only tunes --stage dpo, which is not built yet"
_PROFILE = "it only shapes --profile, which is not built yet"

# Program group -> (why there is no effect, flags).
ACCEPTED: dict[str, list[tuple[str, str]]] = {
    "run": [
        (SILENT, "--local-rank:int --local_rank:int"),
        (
            _FUSED,
            "--use-flash-attn --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb "
            "--no-masked-softmax-fusion "
            "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm "
            "--no-gradient-accumulation-fusion --shape-order:str --sparse-mode:int --pre-tockens:int "
            "--next-tockens:int "
            "--jit-compile --triangle-attn --triangle-block-size:int --skip-bias-add "
            "--use-fused-ring-attention-update --apply-rope-fusion --cross-entropy-loss-fusion",
        ),
        (
            "gate and up stay two products of one input: one operation was no faster and no smaller "
            "(benchmarks/mlp_fusion.py)",
            "--mlp-layer-fusion",
        ),
        (
            _FP32,
            "--attention-softmax-in-fp32 --no-attention-softmax-in-fp32 --input-layernorm-in-fp32 "
            "--fp16-lm-cross-entropy",
        ),
        (
            _ONE_DECODER,
            "--use-mcore-models --use-legacy-models --transformer-impl:str --no-post-layer-norm --onnx-safe",
        ),
        (
            _COMM,
            "--no-delay-grad-reduce --delay-grad-reduce --delay-param-gather --no-overlap-p2p-communication "
            "--no-async-tensor-model-parallel-allreduce --tp-comm-overlap-cfg:str "
            "--disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad "
            "--disable-tp-comm-bulk-dgrad "
            "--disable-tp-comm-bulk-wgrad --disable-tp-comm-split-ag --disable-tp-comm-split-rs "
            "--no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p --nccl-communicator-config-path:str "
            "--zero-allgather-bucket-size:any --zero-reduce-bucket-size:any --ddp-bucket-size:any "
            "--no-clone-scatter-output-in-embedding",
        ),
        ("the device decides: NCCL on CUDA, HCCL on Ascend, gloo on CPU", "--distributed-backend:str"),
        (
            "it only words the questions of benchmarks that are not built yet",
            "--instruction-template:str --eval-language:str",
        ),
        (
            "memory is managed by PyTorch's allocator",
            "--empty-unused-memory-level:int --no-contiguous-buffers-in-local-ddp --use-cpu-initialization "
            "--standalone-embedding-stage",
        ),
        ("weights are initialised the same way on every layout", "--no-initialization --data-parallel-random-init"),
        (
            "causal masks are built inside attention",
            "--square-alibi-mask --fill-neg-inf --no-create-attention-mask-in-dataloader --masked-softmax-fusion",
        ),
        (
            "rotary and ALiBi positions have no table (--position-embedding-type none drops positions)",
            "--no-position-embedding",
        ),
        (
            "data files are memory-mapped, and index caches are written once",
            "--no-mmap-bin-files --no-shared-storage --no-data-sharding",
        ),
        (
            "checkpoints are distributed and describe themselves",
            "--use-dist-ckpt --dist-ckpt-format:str --auto-detect-ckpt-format --load-checkpoint-loosely "
            "--ckpt-fully-parallel-save "
            "--use-mp-args-from-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args",
        ),
        ("the collector is never run during evaluation", "--no-manual-gc-eval"),
        (
            "the log has its own timers and writes every figure",
            "--timing-log-level:int --timing-log-option:str --no-barrier-with-level-1-timing "
            "--log-timers-to-tensorboard "
            "--log-batch-size-to-tensorboard --no-log-learnig-rate-to-tensorboard "
            "--no-log-learning-rate-to-tensorboard "
            "--no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard "
            "--log-world-size-to-tensorboard --tensorboard-queue-size:int --log-progress --log-straggler --test-mode "
            "--enable-one-logger --one-logger-project:str --one-logger-entity:str --one-logger-run-name:str "
            "--enable-one-logger-async --adlr-autoresume --adlr-autoresume-interval:int",
        ),
        (
            "the reference reads it nowhere in its Megatron-Core models",
            "--expert-interval:int --moe-train-capacity-factor:float --noisy-gate-policy:str "
            "--enable-token-rearrange-opt --moe-token-dropping --moe-per-layer-logging",
        ),
        ("key/value heads are repeated where ranks outnumber them", "--kv-head-repeat-before-uly-alltoall"),
        (
            _LORA,
            "--lora-r:int --lora-alpha:int --lora-register-forward-hook:strs --lora-fusion --lora-modules-to-save:strs",
        ),
        (
            _DPO,
            "--dpo-beta:float --dpo-loss-type:str --dpo-label-smoothing:float --pref-ftx:float --ref-model:str "
            "--dpo-ftx:any",
        ),
        (
            _PROFILE,
            "--profile-step-start:int --profile-step-end:int --profile-ranks:ints --profile-level:str "
            "--profile-with-cpu "
            "--profile-with-stack --profile-with-memory --profile-record-shapes --profile-save-path:str",
        ),
        ("it only tunes --enable-high-availability, which is not built yet", "--enable-optimizer-state-local-copy"),
        ("--num-layer-list alone decides", "--use-manual-layer-allocation"),
        ("ZeRO is built in: --zero-stage and --use-distributed-optimizer decide", "--deepspeed"),
        ("--pipeline-model-parallel-size decides", "--no-pipeline-parallel"),
        (
            "it only tunes --fp8-format, which is not built yet",
            "--fp8-margin:int --fp8-interval:int --no-fp8-wgrad --fp8-amax-history-len:int --fp8-amax-compute-algo:str",
        ),
        (
            _GELU,
            "--mask-prob:float --short-seq-prob:float --decoder-seq-length:int --encoder-num-layers:int "
            "--decoder-num-layers:int "
            "--retriever-seq-length:int --sample-rate:float --bert-no-binary-head --bert-load:str "
            "--ict-head-size:int --ict-load:str "
            "--biencoder-projection-dim:int --biencoder-shared-query-context-model --titles-data-path:str "
            "--query-in-block-prob:float "
            "--use-one-sent-docs --evidence-data-path:str --retriever-report-topk-accuracies:ints "
            "--retriever-score-scaling "
            "--block-data-path:str --embedding-path:str --indexer-batch-size:int --indexer-log-interval:int "
            "--num-classes:int "
            "--img-h:int --img-w:int --num-channels:int --patch-dim:int --classes-fraction:float "
            "--data-per-class-fraction:float "
            "--head-lr-mult:float --vision-pretraining --vision-pretraining-type:str --vision-backbone-type:str "
            "--swin-backbone-type:str --mask-type:str --mask-factor:float --iter-per-epoch:int "
            "--dino-local-img-size:int "
            "--dino-local-crops-number:int --dino-head-hidden-size:int --dino-bottleneck-size:int "
            "--dino-freeze-last-layer:float "
            "--dino-norm-last-layer --dino-warmup-teacher-temp:float --dino-teacher-temp:float "
            "--dino-warmup-teacher-temp-epochs:int --retro-project-dir:str --retro-add-retriever "
            "--retro-cyclic-train-iters:int "
            "--retro-encoder-layers:int --retro-encoder-hidden-dropout:float --retro-encoder-attention-dropout:float "
            "--retro-num-neighbors:int --retro-num-retrieved-chunks:int --retro-attention-gate:float "
            "--no-retro-verify-neighbor-count",
        ),
    ],
    "preprocess": [
        ("files are written memory-mapped in the one .bin/.idx format", "--dataset-impl:str"),
        ("ids do not depend on the padded vocabulary", "--make-vocab-size-divisible-by:int --pad-vocab-size-to:int"),
        ("files are always streamed, and nothing is cached", "--streaming --cache-dir:str"),
        ("it only tunes --split-sentences, which is not built yet", "--keep-newlines"),
    ],
    "convert": [
        ("there is one decoder for every model type", "--model-type:str"),
        ("no Megatron installation is needed", "--megatron-path:str"),
        ("nothing is queued: tensors stream from source to target", "--max-queue-size:int"),
        ("names and shapes are always checked", "--no-checking"),
    ],
}

# Program group -> (why and what to use, flags, values that ask for nothing).
REFUSED: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "run": [
        (
            f"low-rank fine-tuning is {NOT_BUILT}; train all weights with --stage sft",
            "--lora-target-modules:strs --lora-load:str",
            ("",),
        ),
        (f"pairwise data are {NOT_BUILT}; use --stage sft with instruction data", "--is-pairwise-dataset", ()),
        (f"high availability is {NOT_BUILT}; use --save-interval and restart", "--enable-high-availability", ()),
        (f"the profiler is {NOT_BUILT}; use PyTorch's own around the program", "--profile", ()),
        (f"8-bit floating point is {NOT_BUILT}; use --bf16", "--fp8-format:str --fp8-hybrid --fp8-e4m3", ()),
        (
            "a DeepSpeed file is not read: give --zero-stage, --bf16, --clip-grad and the batch sizes as flags",
            "--deepspeed_config:str --deepspeed-config:str",
            (),
        ),
        (f"the max-z loss is {NOT_BUILT}; leave it out", "--z-loss-weight:float", ("0", "0.0")),
        (f"a normalised output matrix is {NOT_BUILT}; leave it out", "--lm-norm-weight", ()),
        ("initial weights are normal: set --init-method-std", "--init-method-xavier-uniform", ()),
        (
            "custom layers cannot be loaded from the command line; every architecture is a set of model options",
            "--spec:any",
            (),
        ),
        (
            "there is no encoder to split off; use --num-layer-list for uneven stages",
            "--pipeline-model-parallel-split-rank:int",
            (),
        ),
        ("Megatron's YAML files are not read: use --config FILE", "--yaml-cfg:str", ()),
        (
            "it belongs to the launcher: write it before the program, as in `torchrun --nproc_per_node 8 "
            "pretrain_gpt.py ...`",
            "--nproc_per_node:any --nnodes:any --node_rank:any --master_addr:any --master_port:any",
            (),
        ),
    ],
    "preprocess": [
        (
            f"splitting into sentences is {NOT_BUILT}; leave it out: decoders train on whole documents",
            "--split-sentences",
            (),
        ),
        (
            f"arguments for data set loaders are {NOT_BUILT}; give files or a folder as --input",
            "--hf-datasets-params:str",
            (),
        ),
    ],
    "convert": [
        (
            "it belongs to the converters of 2023: use --load-dir, --save-dir and --target-tensor-parallel-size",
            "--input-model-dir:str --output-model-dir:str --type:str --merge-mlp --num_layers:int --deepspeed",
            (),
        ),
        (
            "it belongs to training: use --target-tensor-parallel-size, --target-pipeline-parallel-size or "
            "--target-expert-parallel-size",
            "--tensor-model-parallel-size:int --pipeline-model-parallel-size:int --expert-model-parallel-size:int",
            (),
        ),
    ],
}
