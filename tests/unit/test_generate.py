"""Decoding against `transformers`, against itself without a cache and without a batch, and against closed forms."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from modellink.cli.main import main
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.infer.beam import beam_search
from modellink.infer.chat import Chat, converse
from modellink.infer.engine import DecodeOptions, DecodeState, decode
from modellink.infer.model import GPTModel
from modellink.infer.sampling import draw, filter_logits
from modellink.infer.text import TextStream, decode_text
from modellink.models.decoder import Decoder
from modellink.models.families import FAMILIES

SIZES = dict(
    num_hidden_layers=2,
    hidden_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=80,
    vocab_size=67,
    max_position_embeddings=128,
    initializer_range=0.4,  # large enough that the likeliest tokens differ from place to place
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"sliding_window": 9, "head_dim": 12, "tie_word_embeddings": False},
    ),
}


def make_pair(kind: str, seed: int = 0) -> tuple[Any, Decoder]:
    """A tiny random model twice: as `transformers` has it, and ours with the same weights, fp32."""
    config_class, model_class, extra = KINDS[kind]
    torch.manual_seed(seed)
    theirs = model_class(config_class(**SIZES, **extra, attn_implementation="eager")).float().eval()
    config: ModelConfig = FAMILIES.get(kind).read(theirs.config.to_dict(), "config")
    config.padded_vocab_size = config.vocab_size
    ours = Decoder(config).eval()
    state = {name.removeprefix("model."): value for name, value in theirs.state_dict().items()}
    renamed = {
        name.replace("post_attention_layernorm", "attention_output_norm")
        .replace("pre_feedforward_layernorm", "post_attention_layernorm")
        .replace("post_feedforward_layernorm", "mlp_output_norm")
        if kind == "gemma2"
        else name: value
        for name, value in state.items()
    }
    ours.load_state_dict(renamed)
    return theirs, ours


def run(decoder: Decoder, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for step in decode(decoder, prompts, DecodeOptions(**options)):
        for row, token in zip(step.rows, step.tokens, strict=True):
            answers[row].append(token)
    return answers


PROMPTS = [[1, 5, 9, 33], [1, 7], [1, 60, 3, 3, 12, 45, 8, 21, 30, 11, 17, 4], [9, 9, 9]]


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Decoder]:
    return make_pair(request.param)


def hf_answer(theirs: Any, prompt: Sequence[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return theirs.generate(ids, attention_mask=mask, **options)[0, len(prompt) :].tolist()


def test_greedy_equals_transformers(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    for prompt in PROMPTS:
        wanted = hf_answer(theirs, prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert run(ours, [prompt], max_new_tokens=40) == [wanted]
    assert len(set(wanted)) > 5, "a reference that repeats one token proves nothing"


def test_batch_equals_single_prompts_and_cache_equals_none(pair: tuple[Any, Decoder]) -> None:
    _, ours = pair
    singles = [run(ours, [prompt], max_new_tokens=40)[0] for prompt in PROMPTS]
    assert run(ours, PROMPTS, max_new_tokens=40) == singles
    assert run(ours, PROMPTS, max_new_tokens=40, use_kv_cache=False) == singles


def test_cached_logits_equal_those_of_the_whole_window(pair: tuple[Any, Decoder]) -> None:
    _, ours = pair
    cached, whole = (DecodeState(ours, PROMPTS, cache) for cache in (True, False))
    for _ in range(30):
        left, right = cached.next_logits(), whole.next_logits()
        assert (left - right).abs().max() <= 1e-5 * max(1.0, float(right.abs().max()))
        cached.append(right.argmax(-1))
        whole.append(right.argmax(-1))


def test_rows_end_at_stop_tokens_and_leave_the_batch(pair: tuple[Any, Decoder]) -> None:
    _, ours = pair
    free = run(ours, PROMPTS, max_new_tokens=30)
    stop = free[1][6]
    wanted = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert run(ours, PROMPTS, max_new_tokens=30, stop_ids=frozenset({stop})) == wanted
    assert len({len(row) for row in wanted}) > 1


def test_sampled_rows_do_not_depend_on_rows_that_left() -> None:
    _, ours = make_pair("llama")
    options = dict(max_new_tokens=25, do_sample=True, seed=7, top_k=0, temperature=8.0)
    free = run(ours, PROMPTS, **options)
    stop = frozenset({free[0][3]})
    stopped = run(ours, PROMPTS, stop_ids=stop, **options)
    for whole, cut in zip(free, stopped, strict=True):
        assert whole[: len(cut)] == cut
    assert len(stopped[0]) == 4
    assert run(ours, PROMPTS, **options) == free
    assert run(ours, PROMPTS, **{**options, "seed": 8}) != free


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_equals_transformers(pair: tuple[Any, Decoder], beams: int, penalty: float) -> None:
    theirs, ours = pair
    for prompt in PROMPTS:
        for eos in (2, [4, 31]):  # two stop tokens make finished beams likelier
            wanted = hf_beams(theirs, prompt, beams, penalty, eos)
            stops = frozenset(eos if isinstance(eos, list) else [eos])
            options = DecodeOptions(
                max_new_tokens=12, num_beams=beams, num_return_sequences=beams, length_penalty=penalty, stop_ids=stops
            )
            found = beam_search(ours, prompt, options)
            assert [h.tokens for h in found] == [tokens for tokens, _ in wanted]
            for hypothesis, (_, score) in zip(found, wanted, strict=True):
                assert math.isclose(hypothesis.score, score, rel_tol=1e-4, abs_tol=1e-5)


def hf_beams(theirs: Any, prompt: list[int], beams: int, penalty: float, eos: Any) -> list[tuple[list[int], float]]:
    result = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=12,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=penalty,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    stops = eos if isinstance(eos, list) else [eos]
    rows = []
    for row, score in zip(result.sequences[:, len(prompt) :].tolist(), result.sequences_scores.tolist(), strict=True):
        end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
        rows.append((row[: end + 1], score))
    return rows


def test_beam_sampling_is_seeded_and_stays_inside_the_filter() -> None:
    _, ours = make_pair("llama")
    options = dict(max_new_tokens=10, num_beams=3, do_sample=True, top_k=3, temperature=8.0)
    first = beam_search(ours, PROMPTS[0], DecodeOptions(**options, seed=1))[0]
    assert beam_search(ours, PROMPTS[0], DecodeOptions(**options, seed=1))[0] == first
    others = {tuple(beam_search(ours, PROMPTS[0], DecodeOptions(**options, seed=s))[0].tokens) for s in range(2, 8)}
    assert len(others) > 1
    tokens = [*PROMPTS[0], *first.tokens]
    logits = ours(torch.tensor([tokens]))[0]
    for place in range(len(PROMPTS[0]), len(tokens)):
        assert tokens[place] in logits[place - 1].topk(3).indices.tolist()


def closed_form(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Filtered softmax by plain arithmetic: divide, keep k, keep the nucleus with the token that crosses p."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or len(weights)]
    total = sum(weights[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if 0 < top_p < 1 and reached >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.9, 6, 0.8), (1.0, 1, 1.0)]
)
def test_sampling_follows_the_filtered_softmax(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 2
    wanted = closed_form(logits.tolist(), temperature, top_k, top_p)
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(5))
    drawn = draw(filter_logits(logits.expand(count, -1), temperature, top_k, top_p), uniform)
    seen = torch.bincount(drawn, minlength=len(wanted)).tolist()
    assert [n for n, p in zip(seen, wanted, strict=True) if p == 0.0] == [0] * wanted.count(0.0)
    degrees = len(wanted) - wanted.count(0.0) - 1
    chi_square = sum((n - count * p) ** 2 / (count * p) for n, p in zip(seen, wanted, strict=True) if p > 0)
    assert chi_square <= degrees + 4 * math.sqrt(2 * degrees) + 1e-9  # four standard deviations of the chi-square law


def test_draw_never_returns_a_token_without_probability() -> None:
    logits = torch.full((3, 8), float("-inf"))
    logits[:, 4] = 0.0
    assert draw(logits, torch.tensor([0.0, 0.5, 1.0 - 2**-24])).tolist() == [4, 4, 4]


def test_filters_agree_with_transformers() -> None:
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 3
    wanted: Tensor = TemperatureLogitsWarper(0.8)(None, logits)
    wanted = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(10)(None, wanted))
    torch.testing.assert_close(filter_logits(logits, 0.8, 10, 0.7), wanted)


# --- GPTModel, text, errors


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer: every character outside ASCII takes several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def text_model(tokenizer: Any) -> GPTModel:
    torch.manual_seed(1)
    config = FAMILIES.get("llama").read(transformers.LlamaConfig(**{**SIZES, "vocab_size": 259}).to_dict(), "config")
    config.padded_vocab_size = 320
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return GPTModel(decoder, tokenizer)


def test_logits_have_the_true_vocabulary(text_model: GPTModel) -> None:
    logits = text_model(torch.tensor([[1, 5, 6], [1, 7, 8]]))
    assert logits.shape == (2, 3, 259)
    assert logits.dtype == torch.float32


def test_one_prompt_gives_one_answer_and_a_list_a_list(text_model: GPTModel) -> None:
    one = text_model.generate("hello", max_new_tokens=12)
    both = text_model.generate(["hello", "what is it"], max_new_tokens=12)
    assert isinstance(one, str)
    assert both[0] == one and len(both) == 2
    ids = text_model.tokenizer("hello")["input_ids"]
    as_ids = text_model.generate(ids, max_new_tokens=12, detokenize=False)
    assert decode_text(text_model.tokenizer, as_ids) == one
    assert text_model.generate(torch.tensor([ids]), max_new_tokens=12, detokenize=False) == [as_ids]
    assert text_model.generate("hello", max_new_tokens=12, include_input=True) == "hello" + one
    assert text_model.generate("hello", max_length=len(ids) + 12) == one


def test_stream_grows_to_the_whole_answer(text_model: GPTModel) -> None:
    options = dict(max_new_tokens=60, do_sample=True, temperature=3.0, top_k=0, seed=4)
    grown = list(text_model.generate(["ab", "x"], stream=True, **options))
    assert grown[-1] == text_model.generate(["ab", "x"], **options)
    for earlier, later in itertools.pairwise(grown[:-1]):
        assert all(b.startswith(a) for a, b in zip(earlier, later, strict=True))
    single = list(text_model.generate("ab", stream=True, **options))
    assert all(isinstance(text, str) for text in single)


def test_streamed_text_never_shows_half_a_character(tokenizer: Any) -> None:
    text = "naïve 漢字 🙂 fin"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)
    stream = TextStream(tokenizer)
    shown = []
    for token in ids:
        stream.push(token)
        shown.append(stream.text)
    assert stream.finish() == shown[-1] == text
    assert not any("\ufffd" in piece for piece in shown)
    assert all(text.startswith(piece) for piece in shown)


def test_stream_equals_decoding_at_once_for_sentencepiece(shared: Any) -> None:
    llama = transformers.AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    text = "Hello  world,\n\n  naïve 漢字🙂 <tag>x</tag> don't"
    ids = llama(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(llama)
    for token in ids:
        stream.push(token)
    assert stream.text == decode_text(llama, ids) == stream.finish()


def test_stop_strings_span_tokens_and_are_never_shown(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["END"])
    shown = []
    for token in tokenizer("an Emu ENDs here")["input_ids"]:
        shown.append(stream.text)
        if stream.push(token):
            break
    assert stream.finish() == "an Emu "
    assert not any(piece.rstrip().endswith(("E", "EN")) for piece in shown)


def test_stop_string_ends_generation(text_model: GPTModel) -> None:
    whole = text_model.generate("hello", max_new_tokens=40)
    stop = whole[5:8]
    cut = text_model.generate("hello", max_new_tokens=40, stop=[stop])
    assert cut == whole[: whole.find(stop)]


def test_probabilities_are_the_softmax_of_every_position(text_model: GPTModel) -> None:
    ids, rows = text_model.generate([1, 9, 8], max_new_tokens=5, detokenize=False, return_output_log_probs=True)
    logits = text_model(torch.tensor([[1, 9, 8, *ids]]))[0, 2:-1]
    torch.testing.assert_close(rows, logits.softmax(-1), atol=1e-6, rtol=1e-5)
    texts, scores = text_model.generate(
        "hi", max_new_tokens=5, num_beams=2, num_return_sequences=2, return_output_log_probs=True
    )
    assert len(texts) == len(scores) == 2
    assert 0 < float(scores[1]) <= float(scores[0]) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(prompt="x", temperature=-1.0, do_sample=True), "temperature"),
        (dict(prompt="x", top_p=1.5), "top_p"),
        (dict(prompt=[999]), "999"),
        (dict(prompt=[]), "prompt"),
        (dict(prompt="x", num_beams=2, num_return_sequences=3), "num_beams"),
        (dict(prompt="x", num_beams=2, stream=True), "beam"),
        (dict(prompt="a long prompt", max_length=3), "max_length"),
        (dict(prompt="x", template="qwenn"), "qwen"),
        (dict(prompt="x", template="llama2", hf_chat_template=True), "either"),
        (dict(prompt=[{"role": "user", "content": "x"}]), "chat template"),
    ],
)
def test_bad_requests_say_how_to_fix_them(text_model: GPTModel, arguments: dict[str, Any], words: str) -> None:
    prompt = arguments.pop("prompt")
    with pytest.raises(ModelLinkError, match=words):
        text_model.generate(prompt, **arguments)


@pytest.mark.parametrize("name", ["llama2_gqa", "qwen2"])
def test_published_greedy_tokens(shared: Any, name: str) -> None:
    import numpy as np

    folder = shared / "megatron" / "hf" / name
    model = GPTModel.from_pretrained(folder, dtype="float32", device="cpu")
    with np.load(folder / "ref.npz") as reference:
        ids = torch.from_numpy(reference["input_ids"])
        with torch.no_grad():
            assert (model(ids) - torch.from_numpy(reference["logits"])).abs().max() < 1e-4
        wanted = reference["greedy"].tolist()
    assert model.generate(ids, max_new_tokens=8, eos_token_id=[]) == wanted


@pytest.mark.parametrize("make", ["missing", "empty", "file", "dtype"])
def test_folders_without_a_model_are_named(tmp_path: Any, make: str) -> None:
    path = tmp_path / "model"
    if make == "empty":
        path.mkdir()
    if make == "file":
        path.write_text("")
    with pytest.raises(ModelLinkError, match="float33" if make == "dtype" else "model"):
        GPTModel.from_pretrained(path, dtype="float33" if make == "dtype" else "float32")


# --- chat and the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """A Hugging Face folder of a tiny model with a tokenizer."""
    path = tmp_path_factory.mktemp("hf")
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 259, "max_position_embeddings": 2048})
    transformers.LlamaForCausalLM(config).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_folder_gives_the_answers_of_transformers(folder: Any, tokenizer: Any) -> None:
    model = GPTModel.from_pretrained(folder, dtype="float32", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("tell me")["input_ids"]
    wanted = tokenizer.decode(hf_answer(theirs, ids, max_new_tokens=20, do_sample=False), skip_special_tokens=True)
    assert model.generate("tell me", max_new_tokens=20) == wanted
    half = GPTModel.from_pretrained(folder, device="cpu")
    assert half(torch.tensor([ids])).dtype == torch.bfloat16


class Recorder:
    """Stands in for a model: remembers prompts, answers with their number."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []

    def generate(self, prompt: Any, **options: Any) -> Any:
        self.prompts.append(prompt)
        return iter(["answer", f"answer {len(self.prompts)}"])


def talk(lines: list[str], **options: Any) -> tuple[list[Any], str]:
    model: Any = Recorder()
    left = iter(lines)
    shown: list[str] = []

    def read(prompt: str) -> str:
        shown.append(prompt)
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    converse(Chat(model, **options), read, shown.append)
    return model.prompts, "".join(shown)


def test_chat_forgets_the_oldest_exchange() -> None:
    prompts, _ = talk(["a", "b", "c", "d"], history_turns=2, template="qwen")
    assert [m["content"] for m in prompts[3]] == ["b", "answer 2", "c", "answer 3", "d"]
    assert [m["role"] for m in prompts[3]] == ["user", "assistant", "user", "assistant", "user"]
    prompts, _ = talk(["a", "b"], history_turns=0, template="qwen")
    assert [len(p) for p in prompts] == [1, 1]


def test_chat_words(capsys: pytest.CaptureFixture[str]) -> None:
    prompts, shown = talk(["a", "", "   ", "new", "b", "Clear", "c", "quit", "d"])
    assert prompts == ["a", "b", "c"]
    assert shown.count("You >> ") == 8 and shown.count("ModelLink:") == 3
    assert "ModelLink:\nanswer 1\n\n" in shown
    prompts, shown = talk(["a", "b"])
    assert prompts == ["a", "aanswer 1b"] and shown.endswith("You >> \n")


def test_chat_command_reads_a_pipe(folder: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    flags = ["--load", str(folder), "--max-new-tokens", "5", "--prompt-type", "default"]
    assert main(["chat", *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.count("You >> ") == 3 and shown.count("ModelLink:") == 2


def test_generate_command(folder: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["generate", "--load", str(folder), "--max-new-tokens", "6"]
    assert main([*flags, "--prompt", "hello"]) == 0
    model = GPTModel.from_pretrained(folder, dtype="float32", device="cpu")
    wanted = model.generate("hello", max_new_tokens=6)
    assert f"ModelLink:\n{wanted}" in capsys.readouterr().out
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ["hello"] * 9 + ["other"]))
    assert main([*flags, "--input", str(source), "--output", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["hello"] * 9 + ["other"]
    assert {row["answer"] for row in rows[:9]} == {wanted}


def test_demo_tasks(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["greedy", "do_sample", "beam_search", "beam_search_with_sampling", "return_output_log_probs"]
    assert main(["generate", "--load", str(folder), "--max-new-tokens", "4", "--task", *tasks]) == 0
    shown = capsys.readouterr().out
    assert shown.count("elapsed:") == 5
    assert shown.count("how are you?") == 1 + 2 + 1 + 1 + 1 + 4
    assert main(["generate", "--load", str(folder), "--task", "gredy"]) == 2
    assert "'greedy'" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"promt": "x"}', "not json", "3"])
def test_bad_prompt_files_are_named(folder: Any, tmp_path: Any, line: str, capsys: Any) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "x"}\n' + line)
    assert main(["generate", "--load", str(folder), "--input", str(source)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_native_checkpoint_gives_the_answers_of_its_source(folder: Any, tmp_path: Any, tokenizer: Any) -> None:
    from modellink.checkpoint.store import CheckpointStore
    from modellink.config.load import dump_config, load_config

    source = GPTModel.from_pretrained(folder, dtype="float32", device="cpu")
    flags = "--mock-data --micro-batch-size 1 --seq-length 64 --train-iters 1 --lr 1e-3".split()
    written = dump_config(load_config(["--load", str(folder), *flags], "train"))
    store = CheckpointStore(tmp_path, local=True)
    for iteration in (3, 7):
        scale = 1.0 if iteration == 7 else 0.5
        tensors = {f"model.{name}": p.detach() * scale for name, p in source.decoder.named_parameters()}
        store.save(iteration, tensors, extra={}, per_rank={}, config_text=written)
    whole = GPTModel.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert whole.generate("tell me", max_new_tokens=10) == source.generate("tell me", max_new_tokens=10)
    step = GPTModel.from_pretrained(tmp_path / "iter_0000003", dtype="float32", device="cpu", tokenizer=folder)
    torch.testing.assert_close(step.decoder.embed_tokens.weight, source.decoder.embed_tokens.weight * 0.5)
