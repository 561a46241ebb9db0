"""Every option of `modellink preprocess`, declared once; see `schema.py` for how options become flags and YAML keys."""

from __future__ import annotations

from dataclasses import dataclass

from modellink.config.schema import option


@dataclass
class PreprocessConfig:
    """Raw data to .bin/.idx files, or such files into one (`merge_group_keys`)."""

    input: str = option(
        "",
        help="raw data: a parquet, arrow, csv, json, jsonl or txt file, several joined by commas, or a folder, of "
        "which the files with the most frequent of these extensions are read; with --merge-group-keys a folder of "
        "pairs",
    )
    output_prefix: str = option("", help="files written are PREFIX_KEY_document.bin and .idx, one pair per key")
    handler_name: str = option("", help="what a row becomes; empty is GeneralPretrainHandler")
    json_keys: list[str] = option(["text"], help="columns to tokenize for pre-training, each to files of its own")

    tokenizer_type: str = option(
        "PretrainedFromHF",
        help="kind of tokenizer",
        choices=("PretrainedFromHF", "Llama2Tokenizer", "GPT2BPETokenizer", "NullTokenizer"),
    )
    tokenizer_name_or_path: str | None = option(None, help="folder of a Hugging Face tokenizer")
    tokenizer_not_use_fast: bool = option(False, help="use the Python tokenizer where there is a Rust one (slower)")
    tokenizer_kwargs: list[str] | None = option(None, help="further arguments of AutoTokenizer: key value key value")
    vocab_file: str | None = option(None, help="vocab.json of GPT2BPETokenizer")
    merge_file: str | None = option(None, help="merges.txt of GPT2BPETokenizer")
    tokenizer_model: str | None = option(None, help="tokenizer.model of Llama2Tokenizer")
    vocab_size: int | None = option(None, help="number of ids of NullTokenizer")
    append_eod: bool = option(False, help="end every document with the end-of-document id")

    prompt_type: str | None = option(None, help="chat template of the instruction and preference handlers")
    map_keys: str | None = option(None, help="JSON text that maps the handler's column names to those of the data")
    seq_length: int | None = option(None, help="instruction data: drop longer samples; with --pack the length of a bin")
    pack: bool = option(False, help="instruction data: put several samples into one sequence of --seq-length")
    dataset_dir: str | None = option(None, help="folder with dataset_info.json, for LlamaFactoryInstructionHandler")
    max_samples: int | None = option(None, help="rows to take from each data set, for LlamaFactoryInstructionHandler")
    interleave_probs: str | None = option(None, help="probability of each data set when mixing, comma separated")
    mix_strategy: str = option(
        "concat", help="how data sets are mixed", choices=("concat", "interleave_under", "interleave_over")
    )
    seed: int = option(1234, help="of random choices while mixing")

    workers: int = option(1, help="processes that tokenize; the output does not depend on it")
    n_subs: int = option(1, help="parts converted at the same time: raises --workers to this number when larger")
    merge_group_keys: list[str] | None = option(
        None,
        help="merge instead: for each key, all .bin/.idx pairs in --input whose name holds it, in the order of names",
    )
    overwrite_cache: bool = option(False, help="start over even where an interrupted run could be continued")
    log_interval: int = option(100, help="documents between two updates of the progress bar")
    cache_dir: str = option(
        "~/tmp", help="without effect: data is streamed; an interrupted run is kept beside its output"
    )
    streaming: bool = option(False, help="without effect: data is always streamed")
    hf_datasets_params: str | None = option(None, help="refused: rows are read as they are; name the files in --input")
    split_sentences: bool = option(False, help="refused: sentence-wise files serve BERT-style training")
    keep_newlines: bool = option(False, help="refused: belongs to --split-sentences")
