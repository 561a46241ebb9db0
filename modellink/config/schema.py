"""Every option of training and inference, declared once: name, type, default, meaning.

A field here *is* the option: `flags.py` derives the command-line flag (``--`` + name with dashes unless the Megatron
dialect spells it otherwise), `load.py` the YAML key, `--help` its text. Sections are plain dataclasses; code receives
the section it needs and nothing reads a global. A default of None means "derived": the rule stands in the help text
and in `resolve_*` below.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from modellink.config.option import option
from modellink.config.use_schema import EvaluateConfig, GenerateConfig, SourceConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "option",
]


@dataclass
class ModelConfig:
    """Shape and arithmetic of one decoder. Field by field this is all that tells one family from another."""

    family: str = option("llama", help="family whose Hugging Face spelling is used for weights in and out")
    num_layers: int | None = option(None, help="number of decoder layers")
    hidden_size: int | None = option(None, help="width of the residual stream (D)")
    num_attention_heads: int | None = option(None, help="query heads (H)")
    num_key_value_heads: int | None = option(None, help="key/value heads (G); default: as many as query heads")
    head_dim: int | None = option(None, help="size of one head (K); default: hidden size / heads")
    ffn_hidden_size: int | None = option(
        None,
        help="MLP width (F) of each of gate and up; default: 4 x hidden, or int(8 x hidden / 3 / 64) x 64 when gated",
    )
    vocab_size: int | None = option(None, help="rows of the embedding before padding; default: the tokenizer's size")
    padded_vocab_size: int | None = option(None, help="force the padded vocabulary (V); wins over the tokenizer")
    vocab_multiple: int = option(128, help="pad the vocabulary to a multiple of this times the tensor-parallel size")
    max_position_embeddings: int | None = option(None, help="longest position; must be >= the sequence length")

    normalization: str = option("LayerNorm", choices=("LayerNorm", "RMSNorm"), help="kind of every norm")
    norm_epsilon: float = option(1e-5, help="epsilon of every norm")
    norm_offset: bool = option(False, help="norm weights are stored minus one: multiply by (1 + w)")
    norm_weight_in_fp32: bool = option(
        False, help="multiply by the norm weight before casting back (Gemma) rather than after"
    )
    sandwich_norm: bool = option(
        False, help="also normalise the output of attention and MLP before the residual add (Gemma2)"
    )
    pre_norm: bool = option(
        True, help="norm before attention and MLP; without it only branch outputs are normalised (OLMo-2)"
    )
    qk_norm: bool = option(False, help="norm on every query and key head before the rotation (Qwen3)")
    qk_norm_all_heads: bool = option(False, help="that norm runs over all heads together (OLMo-2)")
    embedding_norm: bool = option(False, help="norm after the embedding (Bloom)")

    activation: str = option(
        "gelu_tanh",
        choices=("gelu", "gelu_tanh", "silu", "relu", "squared_relu"),
        help="non-linearity of the MLP; Megatron's fused default is the tanh form of gelu",
    )
    gated_mlp: bool = option(False, help="down(act(gate(x)) * up(x)) instead of down(act(up(x)))")

    qkv_bias: bool = option(True, help="bias on the query, key and value projections")
    attention_output_bias: bool = option(True, help="bias on the attention output projection")
    mlp_bias: bool = option(True, help="bias on the MLP projections")
    lm_head_bias: bool = option(False, help="bias on the output matrix")
    normalize_lm_head: bool = option(
        False, help="divide every row of the output matrix by its length before use (Baichuan2)"
    )
    tie_word_embeddings: bool = option(True, help="the output matrix is the embedding matrix")

    position_embedding: str = option(
        "learned_absolute", choices=("learned_absolute", "rope", "alibi", "none"), help="how positions enter"
    )
    rope_theta: float = option(10000.0, help="base of the rotary frequencies")
    rope_theta_window: float | None = option(
        None, help="base on layers with a sliding window, unscaled; default: rotated as the others (Gemma-3: 10000)"
    )
    rope_fraction: float = option(1.0, help="rotated fraction of each head")
    rope_interleaved: bool = option(False, help="rotate neighbouring pairs instead of the two halves")
    rope_scaling: str | None = option(
        None,
        choices=("linear", "dynamic", "dynamic_doubling", "llama3", "yarn"),
        help="rule that stretches the rotary frequencies; dynamic_doubling: in steps of powers of two, not in training "
        "(Qwen 1)",
    )
    rope_scaling_factor: float = option(1.0, help="stretch of the scaling rule")
    rope_low_freq_factor: float = option(
        1.0, help="llama3 rule: below window/low the frequency is divided by the factor"
    )
    rope_high_freq_factor: float = option(4.0, help="llama3 rule: above window/high the frequency is kept")
    rope_original_max_position: int | None = option(None, help="trained window of the scaling rules")
    rope_beta_fast: float = option(32.0, help="yarn ramp: rotations above which a dimension is kept")
    rope_beta_slow: float = option(1.0, help="yarn ramp: rotations below which a dimension is interpolated")
    rope_mscale: float = option(1.0, help="yarn attention scale")
    rope_mscale_all_dim: float = option(0.0, help="yarn attention scale that the softmax scale takes over")
    rope_attention_factor: float | None = option(None, help="yarn: explicit factor on cos and sin; default from mscale")
    rope_truncate: bool = option(True, help="yarn: round the ramp's ends to whole dimensions")

    sliding_window: int | None = option(None, help="keys a query sees, itself included; default: all")
    window_layers: str = option(
        "all", help='layers the window holds on: "all", "even" (0, 2, 4, ...), or a comma list of 0/1, one per layer'
    )
    query_scale: float | None = option(None, help="softmax scale is this to the power -1/2; default: the head size")
    query_log_window: int | None = option(
        None,
        help="multiply queries at positions p beyond this window by log(p) / log(window), not in training (Qwen 1)",
    )
    attention_logit_softcap: float | None = option(None, help="cap attention scores: cap * tanh(score / cap)")
    attention_sinks: bool = option(False, help="a learned logit per head that takes its share of the softmax (gpt-oss)")
    output_logit_softcap: float | None = option(None, help="cap logits: cap * tanh(logit / cap)")
    query_key_layer_scaling: bool = option(
        False, help="divide scores by the layer number before the softmax and multiply back in fp32 (fp16 safety)"
    )
    embedding_multiplier: float = option(1.0, help="multiply embeddings by this")
    embedding_times_sqrt_hidden: bool = option(
        False, help="multiply embeddings by sqrt(hidden), rounded to the compute dtype (Gemma)"
    )
    residual_multiplier: float = option(1.0, help="multiply each branch by this before the residual add (MiniCPM)")
    hidden_divisor: float = option(1.0, help="divide the last hidden state by this before the output matrix (MiniCPM)")
    logits_multiplier: float = option(1.0, help="multiply logits by this (Grok)")

    num_experts: int | None = option(None, help="experts of a mixture-of-experts layer (E); default: none, all dense")
    moe_ffn_hidden_size: int | None = option(None, help="MLP width of one expert; default: the MLP width of the model")
    first_k_dense_replace: int = option(0, help="the first layers keep a dense MLP: this many")
    moe_layer_freq: int = option(1, help="after them, layer i has experts where i is a multiple of this")
    n_shared_experts: int = option(0, help="experts that every token meets, as one MLP of that many expert widths")
    shared_expert_gate: bool = option(False, help="multiply the shared experts by the sigmoid of a learned gate")
    shared_expert_gate_dimension: int = option(1, help="outputs of that gate: 1, or the hidden size")
    router_topk: int = option(2, help="experts a token goes to (k)")
    router_scoring: str = option(
        "softmax_selected",
        choices=("softmax_selected", "softmax", "sigmoid"),
        help="weights of the chosen experts: softmax over their logits (Mixtral), over all logits before choosing "
        "(Qwen, DeepSeek-V2), or a sigmoid each (DeepSeek-V3)",
    )
    norm_topk_prob: bool = option(False, help="divide the weights of the chosen experts by their sum")
    routed_scaling_factor: float = option(
        1.0, help="multiply the weights of the chosen experts by this, unless divided by their sum (sigmoid: always)"
    )
    router_groups: int | None = option(
        None, help="groups of neighbouring experts that a token chooses among; default: as many as it chooses"
    )
    topk_group: int = option(1, help="groups that a token chooses: those of the best experts")
    router_bias: bool = option(False, help="bias on the router (gpt-oss)")
    router_correction_bias: bool = option(
        False, help="choose experts by score plus a bias that follows their load, not a gradient (DeepSeek-V3)"
    )
    router_input_jitter: float = option(0.0, help="in training multiply the router's input by 1 - this .. 1 + this")
    aux_loss_coeff: float = option(0.0, help="weight of the expert balance loss")
    device_aux_loss_coeff: float = option(0.0, help="weight of the balance loss over groups of experts")
    comm_aux_loss_coeff: float = option(0.0, help="weight of the balance loss over tokens that groups receive")
    z_loss_coeff: float = option(0.0, help="weight of the loss that keeps router logits small")
    sequence_aux_loss: bool = option(False, help="balance within every sequence rather than over the micro-batch")
    expert_capacity_factor: float | None = option(
        None, help="an expert takes at most this times its even share of tokens; default: all that come"
    )
    pad_experts_to_capacity: bool = option(False, help="pad every expert's tokens to its capacity")
    token_drop_policy: str = option(
        "probs", choices=("probs", "position"), help="over capacity, keep the tokens of largest weight, or the first"
    )
    moe_grouped_gemm: bool = option(True, help="run all experts in one grouped matrix product where a kernel exists")
    swiglu_limit: float | None = option(
        None, help="clamp both halves of an expert's gated MLP to this and gate with x sigmoid(1.702 x) (gpt-oss)"
    )

    multi_head_latent_attention: bool = option(
        False, help="keys and values grow out of a small latent (DeepSeek); --qk-layernorm normalises the latents"
    )
    q_lora_rank: int | None = option(None, help="size of the query latent; default: queries come straight")
    kv_lora_rank: int | None = option(None, help="size of the key/value latent")
    qk_nope_head_dim: int | None = option(None, help="channels of a query or key head without rotation")
    qk_rope_head_dim: int | None = option(None, help="rotated channels of a query or key head")
    v_head_dim: int | None = option(None, help="channels of a value head")
    latent_rope_interleaved: bool = option(
        True, help="their rotated channels turn in neighbouring pairs, not in halves"
    )
    latent_norm_epsilon: float = option(1e-6, help="epsilon of the norms on the latents")

    attention_dropout: float = option(0.1, help="dropout on attention probabilities")
    hidden_dropout: float = option(0.1, help="dropout on each branch before the residual add")
    fp32_residual: bool = option(False, help="keep the residual stream in fp32")
    init_std: float = option(
        0.02, help="standard deviation of the initial weights; residual outputs use std / sqrt(2 L)"
    )

    def resolve(self) -> ModelConfig:
        """Return a copy whose derived sizes are filled in. Needs layers, hidden size, heads; raises nothing else.

        Checks live in `validate.py`; this only computes.
        """
        new = dataclasses.replace(self)
        if new.num_key_value_heads is None:
            new.num_key_value_heads = new.num_attention_heads
        if new.multi_head_latent_attention and new.qk_nope_head_dim and new.qk_rope_head_dim:
            new.head_dim = new.qk_nope_head_dim + new.qk_rope_head_dim
        if new.head_dim is None and new.hidden_size and new.num_attention_heads:
            new.head_dim = new.hidden_size // new.num_attention_heads
        if new.ffn_hidden_size is None and new.hidden_size:
            new.ffn_hidden_size = int(8 * new.hidden_size / 3 / 64) * 64 if new.gated_mlp else 4 * new.hidden_size
        if new.num_experts:
            new.moe_ffn_hidden_size = new.moe_ffn_hidden_size or new.ffn_hidden_size
            new.router_groups = new.router_groups or new.topk_group
        return new

    def layer_has_experts(self, layer: int) -> bool:
        """Whether `layer` (counted from 0 over the whole model) has experts in place of one MLP."""
        return bool(self.num_experts) and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def layer_has_window(self, layer: int) -> bool:
        """Whether `layer` (counted from 0 over the whole model) attends through the sliding window."""
        if self.sliding_window is None:
            return False
        if self.window_layers == "all":
            return True
        if self.window_layers == "even":
            return layer % 2 == 0
        return self.window_layers.split(",")[layer].strip() == "1"


@dataclass
class ParallelConfig:
    """How the model is laid out over devices. Data parallel is what remains: world / (tensor x pipeline x context)."""

    tensor_parallel: int = option(1, help="devices that share each matrix")
    pipeline_parallel: int = option(1, help="stages the layers are cut into")
    context_parallel: int = option(1, help="devices that share one sequence")
    context_parallel_algo: str = option(
        "ulysses_cp_algo",
        choices=("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo", "allgather_cp_algo"),
        help="how they share it: exchange heads, pass keys round a ring, both, or gather all keys",
    )
    ulysses_degree_in_cp: int | None = option(None, help="hybrid: neighbours that exchange heads; the rest are rings")
    use_cp_send_recv_overlap: bool = option(False, help="ring: keys travel while the last ones are in use")
    cp_attention_mask_type: str = option(
        "causal", choices=("causal", "full"), help="full: every position sees all of the sequence"
    )
    expert_parallel: int = option(1, help="devices that share the experts of a layer")
    moe_token_dispatcher_type: str = option(
        "alltoall",
        choices=("alltoall", "allgather"),
        help="how tokens reach experts elsewhere: only those routed there, or all to everybody",
    )
    moe_permutation_async_comm: bool = option(
        False, help="tokens travel in two parts while others are sorted and computed, and shared experts meanwhile"
    )
    sequence_parallel: bool = option(
        False, help="shard activations between blocks along the sequence over the tensor group"
    )
    async_tensor_parallel: bool = option(
        False, help="with sequence parallelism: gathers and scatters travel in pieces while others are multiplied"
    )
    pipeline_schedule: str | None = option(
        None,
        choices=("gpipe", "1f1b", "interleaved", "aiao", "zero_bubble", "zbv", "dualpipev"),
        help="order of forward and backward passes in a pipeline; default: 1f1b, interleaved with chunks",
    )
    optimized_pipeline: bool = option(False, help="1f1b with the micro-batch sizes of --manual-mbs")
    manual_mbs: str | None = option(
        None, help="rows of each micro-batch: comma separated, example-config-1 or example-config-2"
    )
    layers_per_virtual_stage: int | None = option(None, help="layers of one model chunk: interleaved pipeline")
    layers_per_stage: list[int] | None = option(None, help="uneven pipeline: layers of each stage, comma separated")
    distributed_optimizer: bool = option(
        False, help="shard masters and optimizer states over data ranks, gather weights once a step (ZeRO-1)"
    )
    zero_stage: int | None = option(
        None,
        choices=(0, 1, 2, 3),
        help="0 replicate, 1 shard states, 2 and gradients, 3 and weights; default from the flags",
    )
    data_parallel_replicas: int = option(
        1, help="hybrid sharding: groups of data ranks that each hold a full sharded copy"
    )
    overlap_grad_reduce: bool = option(
        True, help="sum the gradients of a layer while backward goes on below it; shards always are"
    )
    overlap_param_gather: bool = option(
        False, help="ZeRO: ask for the next layer's weights before a layer computes, on any device"
    )
    distributed_timeout_minutes: int = option(45, help="a collective that waits longer is an error")
    recompute_granularity: str | None = option(
        None,
        choices=("full", "selective", "operators"),
        help="drop and rebuild activations: whole layers, some modules of each (the attention core), or all but the "
        "results of products, attention and communication",
    )
    recompute_modules: list[str] | None = option(
        None,
        help="selective: what of core_attn, layernorm, mla_up_proj, mlp_act, moe_act, mlp, moe; default core_attn",
    )
    recompute_method: str | None = option(
        None,
        choices=("uniform", "block"),
        help="full recomputation: groups of layers, or the first layers of each stage",
    )
    recompute_num_layers: int | None = option(
        None, help="layers per group (uniform) or recomputed layers per stage (block)"
    )
    swap_attention: bool = option(
        False, help="move what the modules of --swap-modules save for backward to host memory, and fetch it in time"
    )
    swap_modules: str = option(
        "input_layernorm,self_attention,post_attention_layernorm",
        help="modules of a layer, comma separated: also mlp, attention_output_norm, mlp_output_norm",
    )
    output_layer_slice_num: int = option(
        1, help="slices in which output matrix and loss are computed, so that logits of one slice exist at a time"
    )
    recompute_layers_per_pp_rank: bool = option(
        False, help="block: count over all virtual stages of a pipeline rank, which take turns"
    )
    recompute_layers_per_stage: list[int] | None = option(
        None, help="full: recomputed layers of each pipeline stage, comma separated"
    )
    recompute_layers: list[str] | None = option(
        None, help="what each layer recomputes, by number: 0-3:layer 4-7:core_attn+mlp_act; the others nothing"
    )
    recompute_activation_function: bool = option(
        False, help="recompute the activation functions of MLPs and experts, alone or beside block"
    )
    recompute_activation_function_num_layers: int | None = option(
        None, help="in this many layers of a stage, after those under full recomputation; default: all"
    )
    distribute_saved_activations: bool = option(
        False, help="each tensor rank keeps its share of the inputs of recomputed layers"
    )
    auto_recompute_device_size: int = option(
        -1, help="MB of device memory that a step may take: what to recompute is measured and chosen; -1: off"
    )
    auto_recompute_profiling_step: int = option(
        10, help="steps that are measured, with everything recomputed, before it is chosen; at least 5"
    )
    compile: bool = option(False, help="torch.compile each layer")

    @property
    def schedule(self) -> str:
        """The pipeline schedule, also where none was named."""
        return self.pipeline_schedule or ("interleaved" if self.layers_per_virtual_stage else "1f1b")


@dataclass
class OptimizerConfig:
    """Optimizer, precision of its state, learning-rate and weight-decay schedules."""

    optimizer: str = option(
        "adam",
        choices=("adam", "adamw8bit", "cadam", "muon", "sgd"),
        help="adam is AdamW (decoupled weight decay), adamw8bit the same with 8-bit moments, cadam steps by the sign "
        "of an fp16 momentum, muon orthogonalises the updates of layers' matrices; docs/optimizers.md compares them",
    )
    lr: float | None = option(None, help="peak learning rate")
    min_lr: float = option(0.0, help="floor of the learning rate, also after decay")
    lr_decay_style: str = option(
        "linear", choices=("constant", "linear", "cosine", "inverse-square-root"), help="shape of the decay"
    )
    lr_decay_iters: int | None = option(None, help="iterations of the decay; default: the whole run")
    lr_decay_samples: int | None = option(None, help="the same in samples")
    lr_warmup_iters: int = option(0, help="iterations of linear warm-up")
    lr_warmup_samples: int = option(0, help="the same in samples")
    lr_warmup_fraction: float | None = option(None, help="the same as a share of the decay")
    lr_warmup_init: float = option(0.0, help="learning rate at the start of warm-up")
    decoupled_lr: float | None = option(None, help="learning rate of embedding and output matrix")
    decoupled_min_lr: float | None = option(None, help="its floor")
    override_schedule: bool = option(False, help="take the schedule from the flags, not from the checkpoint")
    use_checkpoint_schedule: bool = option(False, help="take the schedule from the checkpoint, not from the flags")
    adam_beta1: float = option(0.9, help="decay of the first moment, also cadam's")
    adam_beta2: float = option(0.999, help="decay of the second moment")
    adam_eps: float = option(1e-8, help="added to the root of the second moment")
    sgd_momentum: float = option(0.9, help="momentum of SGD")
    muon_momentum: float = option(0.95, help="momentum of Muon")
    muon_num_ns_steps: int = option(5, help="Newton-Schulz steps of Muon")
    muon_extra_scale_factor: float = option(
        0.2, help="Muon's update is this times the root of a matrix's longer side; 0.2 is as large as AdamW's"
    )
    weight_decay: float = option(0.01, help="decoupled weight decay; biases and one-dimensional parameters have none")
    start_weight_decay: float | None = option(None, help="first value of a weight-decay schedule")
    end_weight_decay: float | None = option(None, help="last value of a weight-decay schedule")
    weight_decay_incr_style: str = option("constant", choices=("constant", "linear", "cosine"), help="its shape")
    clip_grad: float = option(1.0, help="clip gradients to this global norm; 0 does not clip")
    bf16: bool = option(False, help="compute in bfloat16")
    fp16: bool = option(False, help="compute in float16 with loss scaling")
    split_master: bool = option(
        False,
        help="store the fp32 master as the bf16 weight plus a 16-bit remainder: same bits, 4 bytes less a parameter",
    )
    cpu_optimizer: bool = option(
        False, help="keep masters and moments in host memory and update there; gradients and weights travel each step"
    )
    fp32_grad_accumulation: bool = option(False, help="accumulate and reduce gradients in fp32 (always so with bf16)")
    release_fp32_grad: bool = option(
        False, help="accumulate gradients in the compute dtype after all: 2 bytes less a parameter, and less exact sums"
    )
    router_bias_update_rate: float = option(
        1e-3, help="after each step the router's correction bias of an expert moves by this, against its load"
    )
    loss_scale: float | None = option(None, help="constant fp16 loss scale; default: dynamic")
    initial_loss_scale: float = option(2.0**32, help="first dynamic loss scale")
    min_loss_scale: float = option(1.0, help="smallest dynamic loss scale")
    loss_scale_window: int = option(1000, help="good steps before the scale doubles")
    hysteresis: int = option(2, help="overflows before the scale halves")

    @property
    def dtype(self) -> str:
        """Name of the compute dtype: float32, bfloat16 or float16."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def gradient_dtype(self) -> str:
        """Name of the dtype in which gradients are accumulated and summed over ranks."""
        return self.dtype if self.release_fp32_grad else "float32"


@dataclass
class TrainConfig:
    """Length of a run, its batches, what it checks, logs and when it stops."""

    stage: str = option("pretrain", choices=("pretrain", "sft"), help="what the loss is computed on")
    micro_batch_size: int | None = option(None, help="samples one device handles at once")
    global_batch_size: int | None = option(
        None, help="samples per optimizer step; default: micro batch x data parallel"
    )
    rampup_batch_size: list[int] | None = option(None, help="start, increment, samples: grow the batch in equal steps")
    train_iters: int | None = option(None, help="optimizer steps of the run")
    train_samples: int | None = option(None, help="the same in samples")
    seed: int = option(1234, help="seed of initial weights, data order and dropout")
    eval_interval: int = option(1000, help="iterations between evaluations")
    eval_iters: int = option(100, help="batches per evaluation; 0 does not evaluate")
    skip_train: bool = option(False, help="only evaluate")
    check_for_nan: bool = option(True, help="stop when loss or gradient norm is not finite")
    exit_interval: int | None = option(None, help="save and exit at multiples of this iteration")
    exit_duration_in_mins: int | None = option(None, help="save and exit after this time")
    exit_signal_handler: bool = option(True, help="save and exit on SIGTERM or SIGINT")
    log_interval: int = option(100, help="iterations between log lines")
    log_throughput: bool = option(False, help="print TFLOP/s per device in the log line")
    log_params_norm: bool = option(False, help="print the norm of the parameters")
    log_num_zeros_in_grad: bool = option(False, help="print how many gradients are zero")
    tensorboard_dir: str | None = option(None, help="folder of TensorBoard files")
    tensorboard_log_interval: int = option(1, help="iterations between TensorBoard points")
    wandb_project: str = option("", help="Weights & Biases project; empty: off")
    wandb_exp_name: str = option("", help="Weights & Biases run name")
    wandb_save_dir: str = option("", help="folder of Weights & Biases files")
    manual_gc: bool = option(
        False, help="run Python's garbage collector at fixed iterations only, at the same time on all ranks"
    )
    manual_gc_interval: int = option(0, help="iterations between collections; 0: never")
    deterministic: bool = option(False, help="use deterministic kernels only: two runs give the same bits")
    sanity_checks: bool = option(False, help="check at each log interval that replicated parameters agree on all ranks")
    debug: bool = option(False, help="show tracebacks")


@dataclass
class DataConfig:
    """Where samples come from and how they are cut."""

    data_path: list[str] | None = option(None, help="prefix of .bin/.idx, or weight prefix weight prefix ...")
    train_data_path: list[str] | None = option(None, help="prefixes for training alone")
    valid_data_path: list[str] | None = option(None, help="prefixes for validation alone")
    test_data_path: list[str] | None = option(None, help="prefixes for test alone")
    split: str = option("969, 30, 1", help="shares of train, validation and test documents")
    data_cache_path: str | None = option(None, help="folder of index caches; default: beside the data")
    mock_data: bool = option(False, help="train on synthetic tokens")
    seq_length: int | None = option(None, help="tokens per sample")
    num_workers: int = option(2, help="batches prepared ahead by a background thread; 0: none")
    dataloader_type: str = option("single", choices=("single", "cyclic"), help="one pass in order, or shuffled epochs")
    reset_attention_mask: bool = option(
        False, help="documents of a sample do not see each other (a new one begins after each end-of-document token)"
    )
    reset_position_ids: bool = option(False, help="restart positions after each end-of-document token")
    eod_mask_loss: bool = option(False, help="no loss on end-of-document tokens")
    prompt_type: str | None = option(None, help="chat template of instruction data")
    instruction_data: bool = option(False, help="data path is a prefix of instruction files")
    variable_seq_lengths: bool = option(False, help="pad each batch to its longest sample only")
    pad_to_multiple_of: int = option(8, help="with variable lengths: round the padded length up to this")
    full_shuffle: bool = option(False, help="shuffle instruction data across epochs, not within each")
    no_shuffle: bool = option(False, help="keep instruction data in file order")


@dataclass
class TokenizerConfig:
    """Which tokenizer turns text into ids."""

    tokenizer_type: str = option(
        "PretrainedFromHF",
        choices=(
            "PretrainedFromHF",
            "Llama2Tokenizer",
            "GPTSentencePieceTokenizer",
            "GPT2BPETokenizer",
            "NullTokenizer",
        ),
        help="kind of tokenizer",
    )
    tokenizer_name_or_path: str | None = option(None, help="Hugging Face tokenizer folder")
    tokenizer_model: str | None = option(None, help="SentencePiece model file")
    vocab_file: str | None = option(None, help="BPE vocabulary (vocab.json)")
    merge_file: str | None = option(None, help="BPE merges (merges.txt)")
    vocab_extra_ids: int = option(0, help="extra ids appended to the vocabulary")
    tokenizer_fast: bool = option(True, help="use the fast (Rust) tokenizer")
    tokenizer_padding_side: str = option("right", choices=("left", "right"), help="side that is padded")
    tokenizer_kwargs: list[str] | None = option(None, help="key value key value ...: passed to the tokenizer")


@dataclass
class CheckpointConfig:
    """What is loaded at the start, what is saved, when and how."""

    save: str | None = option(None, help="folder of checkpoints, metrics and plots")
    save_interval: int | None = option(None, help="iterations between checkpoints")
    load: str | None = option(None, help="checkpoint or Hugging Face folder to start from")
    pretrained_checkpoint: str | None = option(
        None, help="folder of weights to start from when --load holds no checkpoint"
    )
    ckpt_step: int | None = option(None, help="load this iteration instead of the newest complete one")
    finetune: bool = option(False, help="take only the weights: iteration 0, fresh optimizer")
    save_optimizer: bool = option(True, help="save optimizer states")
    save_rng: bool = option(True, help="save random-number states")
    load_optimizer: bool = option(True, help="load optimizer states")
    load_rng: bool = option(True, help="load random-number states")
    use_checkpoint_args: bool = option(False, help="take the architecture from the checkpoint")
    exit_on_missing_checkpoint: bool = option(
        False, help="fail when --load holds no checkpoint instead of starting fresh"
    )
    async_save: bool = option(False, help="write checkpoints in the background")
    keep_checkpoints: int | None = option(None, help="keep only the newest N checkpoints; default: all")
    save_format: str = option(
        "native",
        choices=("native", "hf"),
        help="hf: also write the final weights into --save as a Hugging Face folder, with config.json and tokenizer",
    )


@dataclass
class Config:
    """One run: every section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
