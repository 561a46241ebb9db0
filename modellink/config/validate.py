"""Rules between options. Each broken rule raises one ModelLinkError: what, the values, and how to fix it with the
flags to use.

Every rule reads the configuration and the world size only, so all ranks raise the same error without talking to each
other.
"""

from __future__ import annotations

import os
from pathlib import Path

from modellink.config.architecture import SIZES
from modellink.config.experts import check_experts
from modellink.config.flags import by_name, flag_of, spell
from modellink.config.pipeline import check_micro_batches, check_schedule, chunks_per_rank
from modellink.config.recompute import check_recompute
from modellink.config.resolved import ResolvedConfig
from modellink.config.swap import check_swap
from modellink.errors import ModelLinkError

POSITIVE = (
    "model.num_layers model.hidden_size model.num_attention_heads model.num_key_value_heads model.head_dim "
    "model.ffn_hidden_size "
    "model.num_experts model.moe_ffn_hidden_size model.expert_capacity_factor model.shared_expert_gate_dimension "
    "model.vocab_size model.padded_vocab_size model.vocab_multiple model.max_position_embeddings model.sliding_window "
    "parallel.tensor_parallel parallel.pipeline_parallel parallel.context_parallel parallel.expert_parallel "
    "parallel.layers_per_virtual_stage parallel.data_parallel_replicas parallel.recompute_num_layers "
    "parallel.distributed_timeout_minutes parallel.output_layer_slice_num train.micro_batch_size "
    "train.global_batch_size train.train_iters train.train_samples "
    "train.log_interval train.eval_interval train.exit_interval train.tensorboard_log_interval data.seq_length "
    "data.pad_to_multiple_of checkpoint.save_interval checkpoint.keep_checkpoints generate.max_new_tokens "
    "generate.num_beams "
    "evaluate.evaluation_batch_size evaluate.max_eval_samples model.norm_epsilon model.rope_theta "
    "parallel.recompute_activation_function_num_layers optimizer.muon_num_ns_steps optimizer.muon_extra_scale_factor"
).split()
NOT_NEGATIVE = (
    "model.n_shared_experts model.first_k_dense_replace model.router_input_jitter model.aux_loss_coeff "
    "train.eval_iters optimizer.lr optimizer.min_lr optimizer.lr_warmup_iters optimizer.lr_warmup_samples "
    "optimizer.weight_decay "
    "optimizer.clip_grad data.num_workers generate.history_turns generate.top_k generate.temperature"
).split()
SHARES = (
    "model.attention_dropout model.hidden_dropout optimizer.adam_beta1 optimizer.adam_beta2 optimizer.muon_momentum"
).split()


def validate(resolved: ResolvedConfig, complete: bool = True) -> None:
    """Raise ModelLinkError for the first broken rule. `complete` also asks for what a run cannot do without."""
    _ranges(resolved)
    if complete:
        _folders(resolved)
    if complete and resolved.program != "train":
        _decoding(resolved)
    _names(resolved)
    _model(resolved)
    _stages(resolved)
    _layout(resolved)
    if resolved.program == "train":
        _batches(resolved)
        _optimizer(resolved)
        if complete:
            _required_to_train(resolved)


def layout_problem(resolved: ResolvedConfig) -> str | None:
    """What is wrong with the layout and its batches, None when nothing is."""
    try:
        for rule in (_stages, _layout, _batches):
            rule(resolved)
    except ModelLinkError as error:
        return str(error)
    return None


def _given(resolved: ResolvedConfig, path: str) -> str:
    """ "--flag value", spelled as the user did or else as preferred."""
    spelling = resolved.origins[path].removeprefix("flag ")
    flag = by_name("train").get(spelling)
    return (
        f"{spelling} {resolved.get(path)}"
        if flag and flag.kind in ("int", "float")
        else spell(path, resolved.get(path))
    )


def _ranges(resolved: ResolvedConfig) -> None:
    for path in POSITIVE:
        value = resolved.get(path)
        if value is not None and value <= 0:
            raise ModelLinkError(f"{flag_of(path)} must be above 0, not {value} ({resolved.origins[path]}).")
    for path in NOT_NEGATIVE:
        value = resolved.get(path)
        if value is not None and value < 0:
            raise ModelLinkError(f"{flag_of(path)} must not be below 0, not {value} ({resolved.origins[path]}).")
    for path in SHARES:
        if not 0 <= resolved.get(path) < 1:
            raise ModelLinkError(f"{flag_of(path)} must be at least 0 and below 1, not {resolved.get(path)}.")


def _names(resolved: ResolvedConfig) -> None:
    """Names that stand for rows of data rather than for code."""
    if resolved.config.data.prompt_type:
        from modellink.data.templates import get_template

        get_template(resolved.config.data.prompt_type)


def _model(resolved: ResolvedConfig) -> None:
    model, data = resolved.config.model, resolved.config.data
    missing = [flag_of(f"model.{name}") for name in SIZES if getattr(model, name) is None]
    if missing:
        folder = resolved.config.checkpoint.load or resolved.config.checkpoint.pretrained_checkpoint
        why = "states no architecture" if folder and Path(folder).is_dir() else "is no folder"
        hint = f" ({folder} {why})" if folder else ""
        raise ModelLinkError(
            f"the architecture is not known{hint}: give {', '.join(missing)}, or --model NAME (see `modellink "
            "models`), "
            "or --load with a Hugging Face folder or a checkpoint."
        )
    assert (
        model.hidden_size
        and model.num_attention_heads
        and model.num_key_value_heads
        and model.head_dim
        and model.num_layers
    )
    check_experts(model)
    derived_head = resolved.origins["model.head_dim"].startswith("derived")
    if derived_head and not model.multi_head_latent_attention and model.hidden_size % model.num_attention_heads:
        raise ModelLinkError(
            f"{_given(resolved, 'model.hidden_size')} is not divisible by "
            f"{_given(resolved, 'model.num_attention_heads')}: "
            f"change one, or give the head size with {flag_of('model.head_dim')}."
        )
    if model.num_attention_heads % model.num_key_value_heads:
        raise ModelLinkError(
            f"{_given(resolved, 'model.num_attention_heads')} query heads do not split over "
            f"{_given(resolved, 'model.num_key_value_heads')} key/value heads: the second must divide the first."
        )
    if model.position_embedding == "learned_absolute" and model.max_position_embeddings is None:
        raise ModelLinkError(
            f"learned positions need {flag_of('model.max_position_embeddings')} N; "
            f"or choose {spell('model.position_embedding', 'rope')}."
        )
    if data.seq_length and model.max_position_embeddings and data.seq_length > model.max_position_embeddings:
        raise ModelLinkError(
            f"{_given(resolved, 'data.seq_length')} is longer than {_given(resolved, 'model.max_position_embeddings')} "
            f"({resolved.origins['model.max_position_embeddings']}): lower the first or raise the second."
        )
    if model.vocab_size and model.padded_vocab_size and model.padded_vocab_size < model.vocab_size:
        raise ModelLinkError(
            f"{_given(resolved, 'model.padded_vocab_size')} is smaller than {_given(resolved, 'model.vocab_size')} "
            f"({resolved.origins['model.vocab_size']}): raise the first."
        )
    if model.position_embedding == "alibi" and model.sliding_window:
        raise ModelLinkError("ALiBi positions and --sliding-window exclude each other: leave one out.")
    if (
        model.rope_scaling in ("llama3", "yarn")
        and model.position_embedding == "rope"
        and not model.rope_original_max_position
    ):
        raise ModelLinkError(
            f"{_given(resolved, 'model.rope_scaling')} needs the window the model was trained on: "
            f"give {flag_of('model.rope_original_max_position')} (8192 for Llama 3.1)."
        )
    layers = model.window_layers
    if layers not in ("all", "even") and (len(layers.split(",")) != model.num_layers or set(layers) - set("01, ")):
        raise ModelLinkError(
            f"--window-layers {layers} must be all, even, or {model.num_layers} comma-separated zeros and ones (one "
            "per layer)."
        )


def _layout(resolved: ResolvedConfig) -> None:
    config = resolved.config
    model, parallel, tensor = config.model, config.parallel, config.parallel.tensor_parallel
    _experts(resolved)
    _context(resolved)
    for path, word in (
        ("model.num_attention_heads", "query heads"),
        ("model.num_key_value_heads", "key/value heads"),
        ("model.ffn_hidden_size", "MLP columns"),
        ("model.moe_ffn_hidden_size", "columns of an expert"),
        ("model.padded_vocab_size", "vocabulary rows"),
    ):
        size = resolved.get(path)
        if size and size % tensor:
            raise ModelLinkError(
                f"{size} {word} do not split over {_given(resolved, 'parallel.tensor_parallel')}: choose a "
                "tensor-parallel size "
                f"that divides {size}, or change {flag_of(path)}."
            )
    if tensor > 1 and model.qk_norm and model.qk_norm_all_heads:
        raise ModelLinkError(
            f"{_given(resolved, 'parallel.tensor_parallel')} splits the heads, over all of which this family (OLMo-2) "
            "takes one norm: use pipeline stages, or --zero-stage 3, which shards the weights too."
        )
    model_parallel = tensor * parallel.pipeline_parallel * parallel.context_parallel
    if resolved.world_size % model_parallel:
        raise ModelLinkError(
            f"{resolved.world_size} process(es) cannot hold {_given(resolved, 'parallel.tensor_parallel')} x "
            f"{_given(resolved, 'parallel.pipeline_parallel')}: start a multiple of {model_parallel} processes "
            f"(torchrun --nproc_per_node {model_parallel}) or lower these sizes."
        )
    if resolved.data_parallel % parallel.data_parallel_replicas:
        raise ModelLinkError(
            f"{_given(resolved, 'parallel.data_parallel_replicas')} does not divide the data-parallel size "
            f"{resolved.data_parallel}."
        )
    if parallel.sequence_parallel and config.data.seq_length and config.data.seq_length % tensor:
        raise ModelLinkError(
            f"--sequence-parallel cuts the sequence over tensor ranks, but {_given(resolved, 'data.seq_length')} is "
            "not divisible by "
            f"{_given(resolved, 'parallel.tensor_parallel')}: change one or leave out --sequence-parallel."
        )
    if parallel.async_tensor_parallel and not (tensor > 1 and parallel.sequence_parallel):
        resolved.warnings.append(
            f"{_given(resolved, 'parallel.async_tensor_parallel')}: no effect without --sequence-parallel over "
            "2 or more tensor ranks: nothing is gathered or scattered that products could overlap with"
        )
    if parallel.compile and tensor > 1:
        raise ModelLinkError(
            f"--compile and {_given(resolved, 'parallel.tensor_parallel')} exclude each other: torch.compile loses the "
            "layout of tensors that pass between compiled layers; leave one out, --zero-stage 3 shards weights too."
        )
    if parallel.distributed_optimizer and parallel.zero_stage == 0:
        sharded = flag_of("parallel.distributed_optimizer")
        raise ModelLinkError(f"--zero-stage 0 contradicts {sharded}, which is stage 1: leave one out.")
    _overlap(resolved)
    check_recompute(resolved)
    check_swap(resolved)
    assert model.num_layers


def _overlap(resolved: ResolvedConfig) -> None:
    """Overlap of data-parallel communication that the sharding allows."""
    parallel = resolved.config.parallel
    stage = parallel.zero_stage or int(parallel.distributed_optimizer)
    if stage and not parallel.overlap_grad_reduce:
        raise ModelLinkError(
            f"--no-overlap-grad-reduce needs --zero-stage 0, not {stage}: shards of gradients are always made during "
            "backward, so that whole ones do not pile up; leave it out."
        )
    if parallel.overlap_param_gather and not stage:
        raise ModelLinkError(
            f"--overlap-param-gather gathers sharded weights: give {flag_of('parallel.distributed_optimizer')} (or "
            "--zero-stage 1, 2, 3) as well, or leave it out."
        )


def _experts(resolved: ResolvedConfig) -> None:
    """Experts that their ranks can share."""
    config, size = resolved.config, resolved.config.parallel.expert_parallel
    if config.parallel.moe_permutation_async_comm and size == 1:
        resolved.warnings.append(
            f"--moe-permutation-async-comm: no effect without {flag_of('parallel.expert_parallel')}: no token travels"
        )
    if size == 1 or resolved.program != "train":
        return
    given = _given(resolved, "parallel.expert_parallel")
    if not config.model.num_experts:
        raise ModelLinkError(f"{given} splits experts, but the model has none: leave it out or give --num-experts.")
    if config.model.num_experts % size:
        raise ModelLinkError(f"{given} does not divide {config.model.num_experts} experts: choose a divisor of them.")
    ranks = resolved.data_parallel * config.parallel.context_parallel
    if ranks % size:
        raise ModelLinkError(
            f"{given} must divide the {ranks} data- and context-parallel ranks over which experts lie: lower it, or "
            "start more processes."
        )
    if config.parallel.moe_token_dispatcher_type == "allgather" and config.model.expert_capacity_factor is not None:
        raise ModelLinkError(
            "--moe-token-dispatcher-type allgather drops no tokens: leave out --moe-expert-capacity-factor or use "
            "alltoall."
        )


def _context(resolved: ResolvedConfig) -> None:
    """A sequence that its ranks can share."""
    config, parallel, tensor = resolved.config, resolved.config.parallel, resolved.config.parallel.tensor_parallel
    size, algorithm, degree = parallel.context_parallel, parallel.context_parallel_algo, parallel.ulysses_degree_in_cp
    given = _given(resolved, "parallel.context_parallel")
    if algorithm != "hybrid_cp_algo" and degree is not None and size > 1:
        resolved.warnings.append("--ulysses-degree-in-cp: no effect without --context-parallel-algo hybrid_cp_algo")
    if size == 1 or resolved.program != "train":
        return
    if algorithm == "hybrid_cp_algo" and (degree is None or not 1 < degree < size or size % degree):
        raise ModelLinkError(
            f"{given} with --context-parallel-algo hybrid_cp_algo needs --ulysses-degree-in-cp, a divisor of {size} "
            f"above 1 and below {size}, not {degree}."
        )
    exchange = {"ulysses_cp_algo": size, "hybrid_cp_algo": degree or 1}.get(algorithm, 1)
    rings = size // exchange
    pieces = exchange if rings == 1 else 2 * rings * exchange
    lengths = ["data.seq_length", *(["data.pad_to_multiple_of"] if config.data.variable_seq_lengths else [])]
    for path in lengths:
        if (resolved.get(path) or 0) % pieces:
            raise ModelLinkError(
                f"{given} cuts a sequence into {pieces} equal pieces, but {_given(resolved, path)} is not divisible by "
                f"{pieces}: change one."
            )
    heads, groups = (config.model.num_attention_heads or 1) // tensor, (config.model.num_key_value_heads or 1) // tensor
    if heads % exchange or (groups % exchange and exchange % groups):
        raise ModelLinkError(
            f"{given} exchanges heads among {exchange} ranks, which {heads} query and {groups} key/value heads of a "
            "tensor rank do not split over: use --context-parallel-algo megatron_cp_algo."
        )
    if parallel.sequence_parallel and config.data.seq_length and config.data.seq_length // size % tensor:
        raise ModelLinkError(
            f"--sequence-parallel cuts the {config.data.seq_length // size} positions of a context rank over "
            f"{tensor} tensor ranks: make {flag_of('data.seq_length')} a multiple of {size * tensor}."
        )
    if rings > 1 and config.model.attention_dropout:
        raise ModelLinkError(
            f"{given} with --context-parallel-algo {algorithm} brings keys together in parts, which knows no dropout "
            "inside attention: give --attention-dropout 0, or --context-parallel-algo ulysses_cp_algo."
        )


def _stages(resolved: ResolvedConfig) -> None:
    layers, parallel = resolved.config.model.num_layers, resolved.config.parallel
    pipeline, chunk, uneven = parallel.pipeline_parallel, parallel.layers_per_virtual_stage, parallel.layers_per_stage
    assert layers
    check_schedule(resolved)
    stage_flag, chunk_flag = flag_of("parallel.layers_per_stage"), flag_of("parallel.layers_per_virtual_stage")
    if uneven is not None:
        listed = ",".join(map(str, uneven))
        if chunk is not None:
            raise ModelLinkError(f"{stage_flag} and {chunk_flag} exclude each other: leave one out.")
        total = pipeline * chunks_per_rank(layers, parallel)
        if len(uneven) != total or sum(uneven) != layers or min(uneven) < 1:
            raise ModelLinkError(
                f"{stage_flag} {listed} has {len(uneven)} stage(s) with {sum(uneven)} layers, but there are "
                f"{_given(resolved, 'parallel.pipeline_parallel')} and {_given(resolved, 'model.num_layers')}: "
                f"list {total} positive numbers that add up to the layers, one per stage."
            )
        return
    count = pipeline * (chunks_per_rank(layers, parallel) if chunk is None else 1)
    if layers % count:
        raise ModelLinkError(
            f"{layers} layers do not split over the {count} stages of "
            f"{_given(resolved, 'parallel.pipeline_parallel')}: choose a size that divides {layers}, "
            f"or give uneven stages with {stage_flag}."
        )
    if chunk is None:
        return
    if pipeline < 2:
        raise ModelLinkError(f"{chunk_flag} {chunk} needs {flag_of('parallel.pipeline_parallel')} 2 or more.")
    if layers // pipeline % chunk:
        raise ModelLinkError(
            f"{chunk_flag} {chunk} does not divide the {layers // pipeline} layers of a stage "
            f"({layers} layers / {pipeline} stages): choose a divisor of {layers // pipeline}."
        )


def _batches(resolved: ResolvedConfig) -> None:
    train = resolved.config.train
    if train.micro_batch_size and train.global_batch_size:
        at_once = train.micro_batch_size * resolved.data_parallel
        if train.global_batch_size % at_once:
            raise ModelLinkError(
                f"{_given(resolved, 'train.global_batch_size')} is not divisible by "
                f"{_given(resolved, 'train.micro_batch_size')} x "
                f"{resolved.data_parallel} data-parallel ranks: use a multiple of {at_once}."
            )
        check_micro_batches(resolved, train.global_batch_size)
        if train.rampup_batch_size is not None:
            _rampup(resolved, train.rampup_batch_size, train.global_batch_size, at_once)
    if train.train_iters and train.train_samples:
        raise ModelLinkError("--train-iters and --train-samples exclude each other: leave one out.")


def _rampup(resolved: ResolvedConfig, rampup: list[int], target: int, at_once: int) -> None:
    shown = f"--rampup-batch-size {' '.join(map(str, rampup))}"
    if len(rampup) != 3:
        raise ModelLinkError(f"{shown} needs three numbers: first batch size, increment, samples of the ramp.")
    start, increment, _samples = rampup
    if min(rampup) <= 0 or start > target or (target - start) % increment:
        raise ModelLinkError(
            f"{shown} does not reach --global-batch-size {target} in whole positive steps: change the increment."
        )
    if start % at_once or increment % at_once:
        raise ModelLinkError(
            f"{shown}: the first size and the increment must be multiples of {at_once} (micro batch x data parallel)."
        )
    for size in range(start, target, increment):
        check_micro_batches(resolved, size)
    if resolved.config.train.train_samples is None:
        raise ModelLinkError(
            "--rampup-batch-size needs the length of the run in samples: give --train-samples, not --train-iters."
        )


def _optimizer(resolved: ResolvedConfig) -> None:
    optimizer = resolved.config.optimizer
    if optimizer.bf16 and optimizer.fp16:
        raise ModelLinkError("--bf16 and --fp16 exclude each other: leave one out.")
    if optimizer.release_fp32_grad and not resolved.is_default("optimizer.fp32_grad_accumulation"):
        raise ModelLinkError(
            f"--release-fp32-grad contradicts {flag_of('optimizer.fp32_grad_accumulation')}: leave one out."
        )
    if optimizer.split_master and not optimizer.bf16:
        raise ModelLinkError(
            f"{flag_of('optimizer.split_master')} stores masters as bf16 weights and remainders: it needs --bf16."
        )
    if optimizer.lr is not None and optimizer.min_lr > optimizer.lr:
        raise ModelLinkError(f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}: lower it.")
    warmups = [n for n in ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction") if getattr(optimizer, n)]
    if len(warmups) > 1:
        raise ModelLinkError(
            f"{' and '.join(flag_of(f'optimizer.{n}') for n in warmups)} exclude each other: keep one."
        )
    if optimizer.lr_warmup_fraction is not None and not 0 <= optimizer.lr_warmup_fraction <= 1:
        raise ModelLinkError(f"--lr-warmup-fraction must be between 0 and 1, not {optimizer.lr_warmup_fraction}.")
    decay = optimizer.lr_decay_iters or resolved.config.train.train_iters
    if decay and optimizer.lr_warmup_iters > decay:
        raise ModelLinkError(
            f"--lr-warmup-iters {optimizer.lr_warmup_iters} is longer than the decay of {decay} iterations."
        )
    if optimizer.override_schedule and optimizer.use_checkpoint_schedule:
        raise ModelLinkError(
            f"{flag_of('optimizer.override_schedule')} and {flag_of('optimizer.use_checkpoint_schedule')} exclude "
            "each other."
        )
    if optimizer.weight_decay_incr_style != "constant" and None in (
        optimizer.start_weight_decay,
        optimizer.end_weight_decay,
    ):
        raise ModelLinkError(
            f"--weight-decay-incr-style {optimizer.weight_decay_incr_style} needs --start-weight-decay and "
            "--end-weight-decay."
        )


def _required_to_train(resolved: ResolvedConfig) -> None:
    config = resolved.config
    for path in ("data.seq_length", "train.micro_batch_size", "optimizer.lr"):
        if resolved.get(path) is None and not (path == "optimizer.lr" and config.train.skip_train):
            raise ModelLinkError(f"{flag_of(path)} is missing: {_help_of(path)}.")
    if config.train.train_iters is None and config.train.train_samples is None:
        raise ModelLinkError("the length of the run is missing: give --train-iters or --train-samples.")
    options = config.checkpoint
    if (
        options.load not in (None, options.save)
        and not Path(options.load).exists()
        and not options.pretrained_checkpoint
    ):
        resolved.warnings.append(
            f"{_given(resolved, 'checkpoint.load')} does not exist: starting from random weights "
            f"({flag_of('checkpoint.exit_on_missing_checkpoint')} makes this an error)"
        )
    data = config.data
    parts = data.train_data_path or data.valid_data_path or data.test_data_path
    if data.data_path and parts:
        raise ModelLinkError(
            "--data-path excludes --train-data-path, --valid-data-path and --test-data-path: keep one kind."
        )
    if not (data.data_path or parts or data.mock_data):
        raise ModelLinkError(
            "there is nothing to train on: give --data-path PREFIX (of PREFIX.bin and PREFIX.idx) or --mock-data."
        )
    tokenizer = config.tokenizer
    named = tokenizer.tokenizer_name_or_path or tokenizer.tokenizer_model or tokenizer.vocab_file
    if not named and config.model.padded_vocab_size is None:
        raise ModelLinkError("the vocabulary is not known: give --tokenizer-name-or-path FOLDER, or --vocab-size N.")


def _folders(resolved: ResolvedConfig) -> None:
    """Folders to read from are no files; folders to write to can be made."""
    for path in ("checkpoint.load", "checkpoint.pretrained_checkpoint"):
        folder = resolved.get(path)
        if folder is not None and Path(folder).is_file():
            raise ModelLinkError(
                f"{_given(resolved, path)} is a file: give a checkpoint folder or a Hugging Face folder."
            )
    writing = {"train": ("checkpoint.save", "train.tensorboard_dir"), "evaluate": ("evaluate.save_dir",)}
    for path in writing.get(resolved.program, ()):
        folder = resolved.get(path)
        if folder is None:
            continue
        whole = Path(folder).absolute()
        there = next(parent for parent in (whole, *whole.parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "cannot be written to" if there.is_dir() else "is a file"
            raise ModelLinkError(f"{_given(resolved, path)} cannot be used, {there} {why}: give another folder.")


def _decoding(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.data.prompt_type and config.generate.hf_chat_template:
        raise ModelLinkError("--prompt-type and --hf-chat-template exclude each other: leave one out.")
    if not 0 < config.generate.top_p <= 1:
        raise ModelLinkError(f"--top-p must be above 0 and at most 1, not {config.generate.top_p}.")
    if not (config.checkpoint.load or config.checkpoint.pretrained_checkpoint):
        raise ModelLinkError("there are no weights to use: give --load with a checkpoint or a Hugging Face folder.")


def _help_of(path: str) -> str:
    return by_name("train")[flag_of(path)].help
