"""`nvembed data score` with a cross-encoder, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from nvembed_mcore.cli import main
from nvembed_mcore.data.records import read_records
from nvembed_mcore.parallel.groups import shutdown
from tests.helpers import runs

RECORDS = [
    {"query": "find 1", "pos": ["number 1"], "neg": ["2 is 3", "4"], "instruction": "Find", "pos_ids": ["d"]},
    {"query": "find 2", "pos": ["is 2", "number 5 not 6"], "neg_scores": None},
]


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield
    shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records, and cross-encoders with one label and with two."""
    folder = tmp_path_factory.mktemp("score")
    runs.write_word_tokenizer(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", pad_token="<unk>")  # noqa: S106
    for labels in (1, 2):
        torch.manual_seed(labels)
        size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        config = BertConfig(vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.5, **size)
        BertForSequenceClassification(config).save_pretrained(folder / f"cross{labels}")
        tokenizer.save_pretrained(folder / f"cross{labels}")
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    return folder


def test_a_cross_encoder_gives_its_logits(folder, capsys):
    from sentence_transformers import CrossEncoder

    output = folder / "scored.jsonl"
    command = ["data", "score", folder / "records.jsonl", output, "--teacher", f"ce:{folder / 'cross1'}", "--json"]
    assert main(list(map(str, command))) == 0
    found = json.loads(capsys.readouterr().out)
    model = CrossEncoder(str(folder / "cross1"), device="cpu")
    low, high = float("inf"), -float("inf")
    for record, row in zip(read_records(output), RECORDS, strict=True):
        pairs = [(row["query"], text) for text in [*row["pos"], *row.get("neg", [])]]
        expected = model.predict(pairs, activation_fn=torch.nn.Identity()).tolist()
        assert [*record.pos_scores, *record.neg_scores] == pytest.approx(expected, abs=2e-6)
        assert (record.query, record.instruction) == (row["query"], row.get("instruction"))
        low, high = min(low, *record.pos_scores), max(high, *record.pos_scores)
    assert (found["records_written"], found["scored"], found["pos_scores"]) == (2, 5, [low, high]) and low < high
    assert list(read_records(output))[0].pos_ids == ("d",) and not list(folder.glob("*.work"))


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ("ce:{}/cross2", [], "gives a pair 2 scores; a teacher gives 1"),
        ("ce:{}/cross1", ["--instruction", "Find"], "--instruction is for embedding models"),
        ("ce:{}/tokenizer", [], "sentence-transformers cannot load"),
    ],
)
def test_what_is_no_teacher_is_refused(folder, capsys, teacher, options, message):
    command = ["data", "score", str(folder / "records.jsonl"), str(folder / "never.jsonl")]
    assert main([*command, "--teacher", teacher.format(folder), *options]) != 0
    assert message in capsys.readouterr().err and not (folder / "never.jsonl").exists()


def test_records_are_not_written_over(folder, capsys):
    command = ["data", "score", str(folder / "records.jsonl"), str(folder / "records.jsonl"), "--teacher", "st:none"]
    assert main(command) != 0
    assert "is the file of records to score: give another OUTPUT" in capsys.readouterr().err
