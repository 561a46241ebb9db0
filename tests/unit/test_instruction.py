"""Instruction data: from rows to files, from files to samples, from samples to batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modellink.config.preprocess_schema import PreprocessConfig
from modellink.data import instruction_handlers
from modellink.data.handlers import HANDLERS
from modellink.data.indexed import IndexedDataset
from modellink.data.instruction import build_instruction_datasets, collate, sample_order
from modellink.data.instruction_handlers import OUTPUTS, fill_bins, read_map_keys
from modellink.data.preprocess import preprocess
from modellink.data.templates import get_template
from modellink.data.tokenizer import HFTokenizer
from modellink.errors import ModelLinkError

ROWS: list[dict[str, Any]] = [
    {"instruction": "Say hi", "input": "", "output": "hi"},
    {"instruction": "Add", "input": "1 2", "output": "three"},
    {"instruction": "Go on", "input": "", "output": "done", "history": [["one", "two"], ["three", "four"]]},
    {"instruction": "Long", "input": "", "output": "word " * 60},
    {"instruction": "List", "input": "", "output": ["only"], "system": "Be brief"},
    {"instruction": "Bad", "input": "", "output": ["a", "b"]},
]
WHERE = "rows.jsonl line {}".format


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer that knows the words of these tests."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = json.dumps(ROWS) + "Human Assistant Below is an ### Instruction Response : user assistant weather sunny"
    words = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = [p for p, _ in raw.pre_tokenizer.pre_tokenize_str(text)]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words + pieces))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


def convert(tmp_path: Path, folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, IndexedDataset]:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    settings = dict(handler_name="AlpacaStyleInstructionHandler", prompt_type="default") | options
    preprocess(
        PreprocessConfig(
            input=str(source), output_prefix=str(tmp_path / "out"), tokenizer_name_or_path=str(folder), **settings
        )
    )
    return {key: IndexedDataset(f"{tmp_path / 'out'}_{key}_document") for key in OUTPUTS}


def read(tokenizer: HFTokenizer, ids: Any) -> str:
    return tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=False)


def test_rows_become_three_files_and_bad_rows_are_named(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = convert(tmp_path, folder, ROWS, map_keys='{"system": "system"}')
    tokenizer = HFTokenizer(str(folder))
    assert {len(file) for file in files.values()} == {5}
    assert "line 6" in caplog.text and "list of 2" in caplog.text
    ids, mask, labels = (files[key] for key in OUTPUTS)
    for i in range(5):
        assert len(ids[i]) == len(mask[i]) == len(labels[i])
        assert set(mask[i].tolist()) == {1}
        learnt = labels[i] >= 0
        assert (labels[i][learnt] == ids[i][learnt]).all() and set(labels[i][~learnt].tolist()) == {-100}
    assert read(tokenizer, ids[0]) == "Human : Say hi Assistant : hi </s>"
    assert read(tokenizer, labels[0]) == "hi </s>"
    assert read(tokenizer, ids[1]).startswith("Human : Add 1 2")
    assert read(tokenizer, ids[4]).startswith("Be brief Human : List")
    assert labels[0].dtype == np.int32


def test_history_comes_first_and_every_answer_is_learnt(tmp_path: Path, folder: Path) -> None:
    files = convert(tmp_path, folder, ROWS[2:3], map_keys='{"history": "history"}')
    tokenizer = HFTokenizer(str(folder))
    wanted = "Human : one Assistant : two </s> Human : three Assistant : four </s> Human : Go on Assistant : done </s>"
    assert read(tokenizer, files[OUTPUTS[0]][0]) == wanted
    assert read(tokenizer, files[OUTPUTS[2]][0]) == "two </s> four </s> done </s>"


def test_sequence_length_drops_long_samples(tmp_path: Path, folder: Path) -> None:
    files = convert(tmp_path, folder, ROWS[:4], seq_length=30)
    lengths = [len(document) for document in files[OUTPUTS[0]]]
    assert len(lengths) == 3
    longest = max(lengths)
    (tmp_path / "again").mkdir()
    assert len(convert(tmp_path / "again", folder, ROWS[:3], seq_length=longest)[OUTPUTS[0]]) == 2


def test_pack_fills_sequences_and_keeps_labels(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = convert(tmp_path / "plain", folder, ROWS[:3])
    packed = convert(tmp_path, folder, ROWS[:3] * 4, seq_length=64, pack=True)
    ids, mask, labels = (packed[key] for key in OUTPUTS)
    assert all(len(file[i]) == 64 for file in packed.values() for i in range(len(file)))
    assert set(np.concatenate(list(mask)).tolist()) == {1}
    learnt = sum(int((plain[OUTPUTS[2]][i] >= 0).sum()) for i in range(3)) * 4
    assert sum(int((row >= 0).sum()) for row in labels) == learnt
    for i in range(len(ids)):
        filled = int(np.flatnonzero(labels[i] >= 0)[-1]) + 1
        assert filled <= 63 and set(ids[i][filled:].tolist()) == {0} and set(labels[i][filled:].tolist()) == {-100}


def test_bins_take_the_largest_that_fits() -> None:
    assert fill_bins([5, 3, 9, 1, 4, 3], 10) == [[2, 3], [0, 4], [1, 5]]
    lengths = np.random.RandomState(0).randint(1, 40, 300).tolist()
    bins = fill_bins(lengths, 63)
    assert sorted(i for members in bins for i in members) == list(range(300))
    assert all(sum(lengths[i] for i in members) <= 63 for members in bins)
    assert len(bins) <= 1.05 * sum(lengths) / 63 + 1


def test_general_handler_writes_the_alpaca_paragraph(tmp_path: Path, folder: Path) -> None:
    files = convert(
        tmp_path, folder, ROWS[1:2], handler_name="GeneralInstructionHandler", prompt_type=None, append_eod=True
    )
    tokenizer = HFTokenizer(str(folder))
    assert read(tokenizer, files[OUTPUTS[2]][0]) == "three </s>"
    assert "### Instruction : Add 1 2 ### Response : three </s>" in read(tokenizer, files[OUTPUTS[0]][0])


def sharegpt(folder: Path, **options: Any) -> Any:
    config = PreprocessConfig(handler_name="SharegptStyleInstructionHandler", prompt_type="default", **options)
    return HANDLERS.get(config.handler_name)(config, HFTokenizer(str(folder)))


def test_sharegpt_conversations_and_openai_names(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = sharegpt(folder)
    row = {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}
    ids, labels = theirs.sample(row, "row")
    keys = {
        "messages": "messages",
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    openai = sharegpt(folder, map_keys=json.dumps(keys))
    same = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    assert openai.sample(same, "row") == (ids, labels)
    bad = [
        {"conversations": row["conversations"][:1]},
        {"conversations": row["conversations"][::-1]},
        {"conversations": [{"from": "humans", "value": "one"}, {"from": "gpt", "value": "two"}]},
        {"conversations": "text"},
    ]
    assert len(theirs.encode([*bad, row], WHERE)[OUTPUTS[0]].lengths) == 1
    assert [f"line {i}" in caplog.text for i in range(5)] == [True, True, True, True, False]
    assert "Did you mean 'human'" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "JSON"), ("[]", "object"), ('{"promt": "x"}', "'prompt'"), ('{"tags": 3}', "tags"),
     ('{"tags": {"role_tg": "x"}}', "role_tag")],
)  # fmt: skip
def test_wrong_map_keys_are_explained(text: str, words: str) -> None:
    defaults = instruction_handlers.SharegptStyleInstructionHandler.defaults | {"prompt": "instruction"}
    with pytest.raises(ModelLinkError, match=words):
        read_map_keys(text, defaults)


def test_order_is_one_permutation_per_epoch() -> None:
    documents = np.arange(10, 17)
    order = sample_order(documents, 20, seed=5)
    generator = np.random.RandomState(5)
    assert order.tolist() == [i for _ in range(3) for i in generator.permutation(documents)]
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == documents.tolist()
    full = sample_order(documents, 20, seed=5, full_shuffle=True)
    assert sorted(full.tolist()) == sorted(order.tolist()) and full.tolist() != order.tolist()
    assert sample_order(documents, 8, seed=5, no_shuffle=True).tolist() == documents.tolist() * 2
    with pytest.raises(ModelLinkError, match="exclude"):
        sample_order(documents, 8, 5, full_shuffle=True, no_shuffle=True)


def test_splits_and_samples(tmp_path: Path, folder: Path) -> None:
    rows = [{"instruction": "one", "input": "", "output": "two " * (i + 1)} for i in range(20)]
    convert(tmp_path, folder, rows)
    train, valid, test = build_instruction_datasets(tmp_path / "out", "80,20,0", 12, num_samples=(40, 3, 5))
    assert train is not None and valid is not None and test is None
    assert (len(train), len(valid)) == (40, 3)
    assert set(train.order.tolist()) == set(range(16)) and set(valid.order.tolist()) == set(range(16, 20))
    files = [IndexedDataset(f"{tmp_path / 'out'}_{key}_document") for key in (OUTPUTS[0], OUTPUTS[2])]
    for i in range(len(train)):
        document = int(train.order[i])
        assert train[i]["tokens"].tolist() == files[0][document][:12].tolist()
        assert train[i]["labels"].tolist() == files[1][document][:12].tolist()
    with pytest.raises(ModelLinkError, match="nowhere"):
        build_instruction_datasets(tmp_path / "nowhere")


def test_collate_pads_and_shifts() -> None:
    rows = [
        {"tokens": np.array([5, 6, 7, 8]), "labels": np.array([-100, -100, 7, 8])},
        {"tokens": np.arange(20, 30), "labels": np.arange(20, 30)},
    ]
    batch = collate(rows, 8, pad_id=1)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 1, 1, 1, 1], list(range(20, 28))]
    assert batch["labels"].tolist() == [[-100, 7, 8] + [-100] * 5, [*range(21, 28), -100]]
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    assert collate(rows[:1], 64, pad_id=1, variable=True)["tokens"].shape == (1, 8)
    assert collate(rows[:1], 6, pad_id=1, variable=True)["tokens"].shape == (1, 6)
    assert collate(rows, 64, pad_id=1, variable=True, pad_to_multiple_of=16)["labels"].shape == (2, 16)


def test_unknown_template_names_are_suggested(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelLinkError, match="'qwen'"):
        convert(tmp_path, folder, ROWS, prompt_type="qwn")
    assert get_template("chatml").separator == ("\n",)


def test_packed_conversations_are_numbered() -> None:
    """Two conversations ending in 9 and padding: each has a number and positions of its own."""
    rows = [{"tokens": np.array([4, 5, 9, 6, 9]), "labels": np.array([-100, 5, 9, 6, 9])}]
    batch = collate(rows, 7, pad_id=0, separate=9, restart=True)
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    alone = collate(rows, 7, pad_id=0, separate=9)
    assert torch.equal(alone["documents"], batch["documents"]) and "position_ids" not in alone
    assert set(collate(rows, 7, pad_id=0)) == {"tokens", "labels"}
