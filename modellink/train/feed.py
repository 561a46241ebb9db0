"""What a run reads: its tokenizer, its three datasets, its loaders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from modellink.config.load import set_tokenizer_size
from modellink.config.resolved import ResolvedConfig
from modellink.config.schema import Config
from modellink.data.blend import build_datasets
from modellink.data.gpt import GPTOptions
from modellink.data.instruction import build_instruction_datasets
from modellink.data.instruction import collate as collate_instructions
from modellink.data.loader import BatchLoader, collate_tokens
from modellink.data.templates import fit_tokenizer, get_template
from modellink.data.tokenizer import HFTokenizer, Tokenizer, build_tokenizer
from modellink.errors import ModelLinkError
from modellink.parallel.topology import Topology
from modellink.train.batch_size import BatchSizeSchedule


@dataclass(frozen=True)
class RunLength:
    """Iterations of a run and the samples that training, validation and test take."""

    iterations: int
    train_samples: int
    valid_samples: int
    test_samples: int


def run_length(config: Config, batches: BatchSizeSchedule) -> RunLength:
    """How many samples each split must have; evaluation runs `eval_iters` batches each time (spec d.9)."""
    train = config.train
    if train.train_samples is not None:
        iterations = batches.iterations_for(train.train_samples)
        samples = train.train_samples
    else:
        iterations = train.train_iters or 0
        samples = batches.samples_for(iterations)
    evaluations = iterations // train.eval_interval + 1
    per_evaluation = train.eval_iters * batches.global_batch_size
    return RunLength(iterations, samples, evaluations * per_evaluation, per_evaluation)


def open_tokenizer(resolved: ResolvedConfig) -> Tokenizer | None:
    """The run's tokenizer, None when none was named; tells the configuration its size."""
    options = resolved.config.tokenizer
    named = (options.tokenizer_name_or_path, options.tokenizer_model, options.vocab_file)
    if not any(named) and options.tokenizer_type != "NullTokenizer":
        return None
    # NullTokenizer's end of document is the last id of the vocabulary
    words = resolved.config.model.vocab_size
    tokenizer = build_tokenizer(
        options.tokenizer_type,
        options.tokenizer_name_or_path,
        use_fast=options.tokenizer_fast,
        kwargs=options.tokenizer_kwargs,
        padding_side=options.tokenizer_padding_side,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        tokenizer_model=options.tokenizer_model,
        vocab_size=words - 1 if words else None,
    )
    prompt_type = resolved.config.data.prompt_type
    if prompt_type and isinstance(tokenizer, HFTokenizer):
        # the data were encoded with the tokens that the template adds
        tokenizer = tokenizer.replaced_by(fit_tokenizer(get_template(prompt_type), tokenizer.hf))
    set_tokenizer_size(resolved, tokenizer.vocab_size + options.vocab_extra_ids)
    return tokenizer


class Feed:
    """Datasets and loaders of a run on this data rank."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        tokenizer: Tokenizer | None,
        length: RunLength,
        consumed_samples: int = 0,
        consumed_valid_samples: int = 0,
    ) -> None:
        self.config, self.topology, self.tokenizer = config, topology, tokenizer
        train, valid, test = self._datasets(length)
        if train is None and not config.train.skip_train:
            raise ModelLinkError("there is no training data: --split gives training no documents.")
        self.train = self._loader(train, consumed_samples)
        self.valid = self._loader(valid, consumed_valid_samples)
        self.test = self._loader(test, 0)

    def _datasets(self, length: RunLength) -> Any:
        data, train = self.config.data, self.config.train
        counts = (length.train_samples, length.valid_samples, length.test_samples)
        if train.stage == "sft" or data.instruction_data:
            if not data.data_path or len(data.data_path) != 1:
                raise ModelLinkError("instruction data needs --data-path with exactly one prefix.")
            return build_instruction_datasets(
                data.data_path[0],
                data.split,
                data.seq_length,
                train.seed,
                counts,
                full_shuffle=data.full_shuffle,
                no_shuffle=data.no_shuffle,
            )
        options = GPTOptions(
            sequence_length=data.seq_length,
            seed=train.seed,
            eod_mask_loss=data.eod_mask_loss,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            eod=self.tokenizer.eod if self.tokenizer is not None else None,
            cache_path=data.data_cache_path,
            tokenizer=self.config.tokenizer.tokenizer_name_or_path or "",
        )
        return build_datasets(
            counts,
            options,
            data_path=data.data_path,
            train_data_path=data.train_data_path,
            valid_data_path=data.valid_data_path,
            test_data_path=data.test_data_path,
            split=data.split,
            mock=data.mock_data,
        )

    def _loader(self, dataset: Any, consumed: int) -> BatchLoader | None:
        if dataset is None or len(dataset) == 0:
            return None
        data = self.config.data
        collate: Any = collate_tokens
        if self.config.train.stage == "sft" or data.instruction_data:
            pad = self.tokenizer.pad if self.tokenizer is not None and self.tokenizer.pad is not None else 0
            collate = partial(
                collate_instructions,
                sequence_length=data.seq_length,
                pad_id=pad,
                variable=data.variable_seq_lengths,
                pad_to_multiple_of=data.pad_to_multiple_of,
                separate=self._end_of_document() if data.reset_position_ids or data.reset_attention_mask else None,
                restart=data.reset_position_ids,
            )
        return BatchLoader(
            dataset,
            self.config.train.micro_batch_size,
            self.topology.dp_rank,
            self.topology.dp,
            consumed,
            num_workers=min(1, data.num_workers),
            kind=data.dataloader_type,
            collate=collate,
        )

    def _end_of_document(self) -> int:
        eod = self.tokenizer.eod if self.tokenizer is not None else None
        if eod is None:
            raise ModelLinkError(
                "--reset-position-ids and --reset-attention-mask need the id that ends a conversation: give the "
                "tokenizer that the data was preprocessed with."
            )
        return eod

    def close(self) -> None:
        """Stop the threads that read ahead."""
        for loader in (self.train, self.valid, self.test):
            if loader is not None:
                loader.close()
