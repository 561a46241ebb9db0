"""A training run: set up, loop, evaluate, save, stop. Numbers are the engine's; this file decides only when what
happens."""

from __future__ import annotations

import gc
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modellink import device
from modellink.checkpoint.agree import on_first, together
from modellink.checkpoint.export import check_export, export_step
from modellink.checkpoint.hf import is_hf_folder, load_hf, read_extras
from modellink.checkpoint.store import CheckpointStore, is_native_step
from modellink.config.load import dump_config
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import Config
from modellink.data.check import with_known_ids
from modellink.errors import ModelLinkError, RunFailure
from modellink.optim.schedule import ParameterSchedule, schedule_lengths
from modellink.parallel.apply import build_model
from modellink.parallel.memory import check_device
from modellink.parallel.sanity import check_replicas
from modellink.parallel.topology import Topology, initialize_distributed, launched_local_rank
from modellink.train.batch_size import BatchSizeSchedule
from modellink.train.engine import Engine, StepResult
from modellink.train.feed import Feed, RunLength, open_tokenizer, run_length
from modellink.train.metrics import MetricsLogger, flops_of, memory_line
from modellink.train.plots import draw_loss
from modellink.train.resilience import ExitConditions, PeerWatch, SignalHandler, StopReason
from modellink.train.state import Progress, load_state, load_weights, save_state, seed_everything, stored_vocabulary


def build_schedule(config: Config, length: RunLength, batches: BatchSizeSchedule) -> ParameterSchedule:
    """Learning rate and weight decay over the samples of the run."""
    options = config.optimizer
    decay, warmup = schedule_lengths(
        length.train_samples,
        batches.global_batch_size,
        decay_iters=options.lr_decay_iters,
        decay_samples=options.lr_decay_samples,
        warmup_iters=options.lr_warmup_iters,
        warmup_samples=options.lr_warmup_samples,
        warmup_fraction=options.lr_warmup_fraction,
    )
    constant = options.weight_decay
    return ParameterSchedule(
        max_lr=options.lr or 0.0,
        lr_decay_steps=decay,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup,
        lr_warmup_init=options.lr_warmup_init,
        lr_decay_style=options.lr_decay_style,  # type: ignore[arg-type]
        start_wd=constant if options.start_weight_decay is None else options.start_weight_decay,
        end_wd=constant if options.end_weight_decay is None else options.end_weight_decay,
        wd_incr_steps=length.train_samples,
        wd_incr_style=options.weight_decay_incr_style,  # type: ignore[arg-type]
        decoupled_lr=options.decoupled_lr,
        decoupled_min_lr=options.decoupled_min_lr,
        override=options.override_schedule,
        use_checkpoint=options.use_checkpoint_schedule,
    )


class Trainer:
    """One run on this rank, from a resolved configuration."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        self.resolved, self.config = resolved, resolved.config
        config = self.config
        self.device = initialize_distributed(config.parallel)
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        # errors of one rank travel over a host group, so that all ranks stop with the same sentence
        self.host_group = dist.new_group(backend=device.host_backend()) if dist.is_initialized() else None
        self.topology = Topology(config.parallel)
        self.batches = BatchSizeSchedule(
            config.train.global_batch_size,
            config.train.micro_batch_size,
            self.topology.dp,
            tuple(config.train.rampup_batch_size) if config.train.rampup_batch_size else None,  # type: ignore[arg-type]
        )
        self.length = run_length(config, self.batches)
        self.schedule = build_schedule(config, self.length, self.batches)
        self.tokenizer = together(self.host_group, lambda: open_tokenizer(resolved))
        self.source, self.store_in = self._find_source()
        self._take_stored_vocabulary()
        self.hf_extras = self._hf_extras()
        self.progress = Progress()
        self.memory_reported = False
        self.engine = self._build_engine()
        self._load()
        self.schedule.apply(self.engine.optimizer.param_groups)
        self.feed = self._open_feed()
        self.store_out = together(self.host_group, self._open_store)
        self.saved_iteration = self.progress.iteration if self.source is not None else -1

    # --- set-up ----------------------------------------------------------------------------------------------------

    def _find_source(self) -> tuple[Path | None, CheckpointStore | None]:
        """Where weights come from: (folder, its store when it is a native one); (None, None) for a fresh start."""
        options = self.config.checkpoint
        for given in (options.load, options.pretrained_checkpoint):
            if given is None:
                continue
            folder = Path(given)
            store = CheckpointStore(folder)
            # a run's folder may hold its export too: the steps are what a run continues from
            if options.ckpt_step is not None or (folder.is_dir() and store.latest() is not None):
                return folder, store
            if is_hf_folder(folder):
                return folder, None
            if any(is_native_step(path) for path in folder.glob("iter_*")):
                store.resolve()  # steps, but none of them whole: raises, naming each
            if options.exit_on_missing_checkpoint or not (given == options.save or given == options.load):
                raise ModelLinkError(
                    f"no checkpoint in {folder}: give a folder with complete steps or a Hugging Face folder."
                )
            if folder.is_dir() and given != options.save:
                self._print(f"modellink: warning: {folder} holds no checkpoint: starting from random weights.")
        return None, None

    def _take_stored_vocabulary(self) -> None:
        """Keep the number of embedding rows that the checkpoint has, whatever layout padded them."""
        if self.store_in is None:
            return
        model, parallel = self.config.model, self.config.parallel
        rows = stored_vocabulary(self.store_in.resolve(self.config.checkpoint.ckpt_step, verify=False))
        if rows is None or rows == model.padded_vocab_size:
            return
        if rows % parallel.tensor_parallel or (model.vocab_size or 0) > rows:
            raise ModelLinkError(
                f"the checkpoint in {self.source} has {rows} vocabulary rows, which neither hold {model.vocab_size} "
                f"ids nor divide by tensor parallel {parallel.tensor_parallel}: choose a size that divides {rows}."
            )
        self.resolved.set("model.padded_vocab_size", rows, f"checkpoint {self.source}")

    def _build_engine(self) -> Engine:
        config = self.config
        if config.model.padded_vocab_size is None:
            raise ModelLinkError(
                "the vocabulary size is unknown: give --tokenizer-name-or-path, --padded-vocab-size or --vocab-size."
            )
        together(self.host_group, lambda: check_device(self.resolved))
        dtype, gradient_dtype = (
            getattr(torch, config.optimizer.dtype),
            getattr(torch, config.optimizer.gradient_dtype),
        )
        seed = config.train.seed if self.source is None else None
        model = build_model(config.model, config.parallel, self.topology, self.device, dtype, seed, gradient_dtype)
        if self.source is not None and self.store_in is None:
            folder = self.source

            def load_weights_here() -> None:
                for chunk in model.chunks:
                    load_hf(chunk, folder, progress=self.topology.is_main)

            together(self.host_group, load_weights_here)
        seed_everything(
            config.train.seed
            + 100 * self.topology.coordinate("pp")
            + 10_007 * self.topology.dp_rank
            + 1_000_003 * self.topology.coordinate("cp")
        )
        return Engine(model, config)

    def _load(self) -> None:
        if self.store_in is None:
            return
        options = self.config.checkpoint
        if options.finetune or str(self.source) != options.load:
            load_weights(self.store_in, self.engine, options.ckpt_step)
            return
        self.progress = load_state(self.store_in, self.engine, self.schedule, options.ckpt_step, options)

    def _open_feed(self) -> Feed:
        """Open the data; one rank of each machine goes first and writes the index caches that the others then read."""

        def open_here() -> Feed:
            done = self.progress
            return Feed(
                self.config,
                self.topology,
                self.tokenizer,
                self.length,
                done.consumed_samples,
                done.consumed_valid_samples,
            )

        first = together(self.host_group, lambda: with_known_ids(open_here()) if launched_local_rank() == 0 else None)
        return together(self.host_group, lambda: first or open_here())

    def _open_store(self) -> CheckpointStore | None:
        options = self.config.checkpoint
        if not options.save:
            return None
        if options.save_format == "hf":
            check_export(Path(options.save), self.config.model)
        return CheckpointStore(options.save, keep=options.keep_checkpoints, async_save=options.async_save)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end or until something asks to stop; returns the exit code."""
        with ExitStack() as stack:
            signals = stack.enter_context(SignalHandler()) if self.config.train.exit_signal_handler else None
            self.logger = stack.enter_context(self._logger())
            stack.callback(self.feed.close)
            exits = ExitConditions(
                exit_interval=self.config.train.exit_interval,
                exit_duration_in_mins=self.config.train.exit_duration_in_mins,
                signals=signals,
                device=self.device,
            )
            self._announce()
            reason = None if self.config.train.skip_train else self._loop(exits)
            if reason is not None:
                self._print(f"stopping: {reason.text}.")
            self._save()
            if reason is None:
                self._final_evaluations()
            if self.store_out is not None:
                self.store_out.wait()
            if reason is None or not reason.exit_code:
                self._export()
            return reason.exit_code if reason is not None else 0

    def _loop(self, exits: ExitConditions) -> StopReason | None:
        train, progress = self.config.train, self.progress
        watch = None
        if dist.is_initialized():
            watch = PeerWatch(dist.distributed_c10d._get_default_store(), self.topology.rank, self.topology.world_size)
        if train.manual_gc:
            gc.disable()
            gc.collect()
        self.engine.model.train()
        while progress.iteration < self.length.iterations:
            with ExitStack() as guard:
                if watch is not None:
                    guard.enter_context(watch.iteration(progress.iteration + 1))
                self._iteration()
                if train.eval_iters and self.feed.valid is not None and progress.iteration % train.eval_interval == 0:
                    self._evaluate(self.feed.valid, "")
                interval = self.config.checkpoint.save_interval
                if interval and progress.iteration % interval == 0:
                    self._save()
                reason = exits.check(progress.iteration)
            if reason is not None:
                return reason
        return None

    def _iteration(self) -> None:
        train, progress = self.config.train, self.progress
        began = time.perf_counter()
        size = self.batches.at(progress.consumed_samples)
        batch = self._to_device(self.feed.train.next_batch(size))
        rate = self.schedule.learning_rate(self.schedule.num_steps)
        scale = self.engine.scaler.scale if self.engine.scaler is not None else 1.0
        result = self.engine.step(batch, train.micro_batch_size)
        loss = result.loss.item()  # one synchronisation; it also makes the timing below honest
        progress.iteration += 1
        progress.consumed_samples += size
        tokens = size * batch["tokens"].shape[1]  # batches of instructions may be shorter than the sequence length
        progress.tokens += tokens
        if result.skipped:
            progress.skipped_iterations += 1
        else:
            self.schedule.step(size, self.engine.optimizer.param_groups)
        if train.check_for_nan and not result.skipped:
            self._check_finite(loss, result)
        if train.manual_gc and train.manual_gc_interval and progress.iteration % train.manual_gc_interval == 0:
            gc.collect()
        self._log(loss, result, rate, scale, size, tokens, time.perf_counter() - began)
        if progress.iteration % train.log_interval == 0:
            self._inspect()

    def _inspect(self) -> None:
        """What is looked at once per log interval: memory after the first one, replicas when asked to."""
        if not self.memory_reported and self.topology.dp_rank == 0:
            memory = device.memory_stats()
            sizes = (memory.allocated, memory.peak_allocated, memory.reserved, memory.peak_reserved)
            print(memory_line(self.topology.rank, self.progress.iteration, *sizes), flush=True)
        self.memory_reported = True
        if self.config.train.sanity_checks:
            together(self.host_group, lambda: check_replicas(self.engine.model))

    def _check_finite(self, loss: float, result: StepResult) -> None:
        norm = result.grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailure(
                f"iteration {self.progress.iteration}: loss {loss} and gradient norm {norm} are not both finite; lower "
                f"--lr, look at the data of samples {self.progress.consumed_samples} and before, or pass "
                "--no-check-for-nan-in-loss-and-grad to go on regardless."
            )

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    # --- evaluation, saving, reporting -----------------------------------------------------------------------------

    def _evaluate(self, loader: Any, where: str) -> None:
        """Mean loss over `eval_iters` global batches; a loader that runs dry ends the evaluation early."""
        self.engine.model.train(False)
        size = self.batches.global_batch_size
        loss, tokens = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for _ in range(self.config.train.eval_iters):
            batch = self._to_device(loader.next_batch(size))
            total, count = self.engine.evaluate(batch, self.config.train.micro_batch_size)
            loss, tokens = loss + total, tokens + count
            if loader is self.feed.valid:
                self.progress.consumed_valid_samples += size
        self.engine.model.train()
        self.logger.log_validation(self.progress.iteration, (loss / tokens).item(), where)

    def _final_evaluations(self) -> None:
        if self.config.train.eval_iters:
            for loader, where in ((self.feed.valid, "on validation set"), (self.feed.test, "on test set")):
                if loader is not None:
                    self._evaluate(loader, where)

    def _save(self) -> None:
        if self.store_out is None or self.saved_iteration == self.progress.iteration:
            return
        text = dump_config(self.resolved)
        options = self.config.checkpoint
        save_state(self.store_out, self.engine, self.schedule, self.progress, options, text, self.hf_extras)
        self.saved_iteration = self.progress.iteration
        self._print(f"saved checkpoint at iteration {self.progress.iteration} to {options.save}")
        if self._is_logging_rank:
            metrics = Path(options.save or ".") / "metrics.jsonl"
            draw_loss(metrics, metrics.with_name("loss.png"), sequence_length=self.config.data.seq_length)

    def _hf_extras(self) -> dict[str, Any]:
        """What an export's config.json says beyond the architecture: the source's keys, else the tokenizer's ids."""
        if self.store_in is not None:
            stored = self.store_in.read_extra(self.config.checkpoint.ckpt_step).get("hf_extras")
            if stored:
                return dict(stored)
        elif self.source is not None:
            return together(self.host_group, lambda: read_extras(self.source or "."))
        if self.tokenizer is None:
            return {}
        ids = {"bos_token_id": self.tokenizer.bos, "eos_token_id": self.tokenizer.eod}
        return {**ids, "pad_token_id": self.tokenizer.pad}

    def _export(self) -> None:
        options, store = self.config.checkpoint, self.store_out
        if options.save_format != "hf" or store is None:
            return
        folder, dtype = Path(options.save or "."), getattr(torch, self.config.optimizer.dtype)
        step = store.resolve(self.progress.iteration, verify=False)
        on_first(self.host_group, lambda: export_step(step, folder, dtype))
        self._print(f"wrote the final weights to {folder} as a Hugging Face folder")

    @property
    def _is_logging_rank(self) -> bool:
        """The last rank reports, as in the reference: it holds the last pipeline stage."""
        return self.topology.rank == self.topology.world_size - 1

    def _print(self, text: str) -> None:
        if self._is_logging_rank:
            print(text, flush=True)

    def _logger(self) -> MetricsLogger:
        train = self.config.train
        return MetricsLogger(
            self.config.checkpoint.save,
            total_iterations=self.length.iterations,
            log_interval=train.log_interval,
            start_iteration=self.progress.iteration,
            is_logging_rank=self._is_logging_rank,
            log_throughput=train.log_throughput,
            tensorboard_dir=train.tensorboard_dir,
            wandb_project=train.wandb_project or None,
            wandb_name=train.wandb_exp_name or None,
            wandb_dir=train.wandb_save_dir or None,
            board_interval=train.tensorboard_log_interval,
        )

    def _announce(self) -> None:
        self._print(f"layout: {self.topology.describe()} on {self.topology.world_size} x {device.device_name()}")
        model = self.config.model
        self.flops = flops_of(model, self.config.data.seq_length)
        self.peak_flops = device.peak_flops(getattr(torch, self.config.optimizer.dtype))
        self._print(time.strftime("[before the start of training step] datetime: %Y-%m-%d %H:%M:%S"))

    def _log(
        self, loss: float, result: StepResult, rate: float, scale: float, size: int, tokens: int, seconds: float
    ) -> None:
        tokens_per_second = tokens / seconds / self.topology.world_size
        norm = self.engine.params_norm() if self.config.train.log_params_norm else None
        record = {
            "consumed_samples": self.progress.consumed_samples,
            "lm_loss": loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm.item(),
            "loss_scale": scale,
            "tokens_per_second_per_device": tokens_per_second,
            "tflops_per_device": tokens_per_second * self.flops.full / 1e12,
            "mfu": tokens_per_second * self.flops.full / self.peak_flops,
            "mfu_causal": tokens_per_second * self.flops.causal / self.peak_flops,
            "memory_gib": device.memory_stats().peak_allocated / 2**30,
            "step_ms": seconds * 1e3,
            "global_batch_size": size,
            "skipped": result.skipped,
            "num_zeros": result.zeros,
            "params_norm": norm,
            "losses": {name: value.item() for name, value in result.auxiliary.items()},
        }
        self.logger.log(self.progress.iteration, {key: value for key, value in record.items() if value is not None})


def train(resolved: ResolvedConfig) -> int:
    """Run the training that `resolved` describes on this rank; returns the process's exit code."""
    try:
        return Trainer(resolved).run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
