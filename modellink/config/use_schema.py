"""Options of the programs that use a model (decoding, benchmarks), and where a configuration comes from."""

from __future__ import annotations

from dataclasses import dataclass

from modellink.config.option import option


@dataclass
class GenerateConfig:
    """Decoding."""

    max_new_tokens: int = option(128, help="tokens generated at most")
    max_length: int | None = option(None, help="tokens of prompt and answer together at most")
    do_sample: bool = option(False, help="sample instead of taking the likeliest token")
    temperature: float = option(0.7, help="divides logits before sampling")
    top_k: int = option(50, help="sample among this many likeliest tokens; 0: all")
    top_p: float = option(0.95, help="sample among the likeliest tokens that together reach this probability")
    add_eos_token: list[str] | None = option(None, help="further tokens that end an answer")
    use_kv_cache: bool = option(True, help="keep keys and values of earlier tokens")
    hf_chat_template: bool = option(False, help="format prompts with the tokenizer's own chat template")
    num_beams: int = option(1, help="beams of a beam search; 1: no search")
    length_penalty: float = option(1.0, help="beam search: scores are divided by length to this power")
    stream: bool = option(False, help="show the answer while it is generated")
    history_turns: int = option(3, help="earlier exchanges a chat keeps")
    task: list[str] | None = option(
        None,
        help="demonstrations: greedy, do_sample, beam_search, beam_search_with_sampling, return_output_log_probs, chat",
        programs=("generate", "chat"),
    )
    prompt: list[str] | None = option(None, help="prompts to answer", programs=("generate", "chat"))
    input: str | None = option(
        None, help="file of prompts: .txt with one a line, or .jsonl with the key prompt", programs=("generate",)
    )
    output: str | None = option(
        None, help="file the answers are written to, as .jsonl; default: the terminal", programs=("generate",)
    )


@dataclass
class EvaluateConfig:
    """Benchmarks."""

    task: list[str] | None = option(None, help="benchmarks to run")
    task_data_path: list[str] | None = option(
        None, help="folders or files of the benchmarks, each path containing its name"
    )
    evaluation_batch_size: int = option(1, help="questions answered at once")
    max_eval_samples: int | None = option(None, help="questions per subject at most; default: all")
    chat_template: bool = option(True, help="wrap questions in the tokenizer's chat template when it has one")
    save_dir: str = option("results", help="folder of results.json and samples.jsonl")


@dataclass
class SourceConfig:
    """Where a configuration comes from besides the flags. These options steer its reading and are no part of it."""

    config: str | None = option(
        None, help="YAML file of options; keys are flag names with dashes or underscores; flags win"
    )
    model: str | None = option(
        None,
        help="architecture preset, for example llama2-7b (see `modellink models`)",
        programs=("train", "generate", "chat", "evaluate"),
    )
    debug: bool = option(False, help="show tracebacks", programs=("preprocess", "convert"))
    print_config: bool = option(False, help="print the resolved configuration with the origin of each value and exit")
