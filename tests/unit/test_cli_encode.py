"""`nvembed encode` in one process, by the command line."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow.parquet
import pytest

from nvembed_mcore import progress
from nvembed_mcore.checkpoint.hf_load import load_exported
from nvembed_mcore.cli import main
from nvembed_mcore.data.prompts import query_prompt
from tests.helpers.exports import LIMIT, PROMPT

TEXTS = [f"text of {'many ' * (number % 5)}words, number {number}" for number in range(9)]


@pytest.fixture(scope="module")
def folder(cases, tmp_path_factory):
    """Texts in two forms, as lines and as a BEIR folder."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "texts.txt").write_text("".join(text + "\n" for text in TEXTS))
    for name, texts in (("corpus", TEXTS), ("queries", TEXTS[:4])):
        rows = (json.dumps({"_id": f"{name[0]}{number}", "text": text}) for number, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def inputs_of_beir(folder):
    """The same as a test set: each query's own text is what it looks for."""
    (folder / "qrels").mkdir()
    rows = [f"q{number}\tc{number}\t1" for number in range(4)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def export(cases):
    return cases["latent"].folder


@pytest.fixture(scope="module")
def expected(export):
    model = load_exported(export)
    return lambda texts, prompt="": model.encode(texts, prompt, max_length=LIMIT).numpy()


def run(capsys, *arguments) -> str:
    assert main(["encode", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_lines_to_one_file(capsys, export, folder, expected, tmp_path):
    said = run(capsys, export, folder / "texts.txt", tmp_path / "out.npy", "--shard-size", 4)
    pattern = r"9 texts, 32 dimensions: (.*)\n9 texts, \d+ tokens in [\d.]+ s: [\d,]+ tokens/s, 0\.0% padding\n"
    assert re.fullmatch(pattern, said)[1] == str(tmp_path / "out.npy")
    assert np.abs(np.load(tmp_path / "out.npy") - expected(TEXTS)).max() < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_queries_of_a_beir_folder(capsys, export, folder, expected, tmp_path):
    run(capsys, export, folder, tmp_path / "out", "--queries", "--format", "parquet", "--dtype", "float16")
    table = pyarrow.parquet.read_table(tmp_path / "out" / "shard-00000.parquet")
    assert table["id"].to_pylist() == ["q0", "q1", "q2", "q3"]
    assert np.abs(np.stack(table["embedding"].to_numpy()) - expected(TEXTS[:4], PROMPT)).max() < 1e-3


def test_an_instruction_of_the_user(capsys, export, folder, expected, tmp_path):
    options = ["--queries", "--instruction", "Find it", "--tokens-per-pack", 30]
    run(capsys, export, folder / "texts.txt", tmp_path / "out.npy", *options)
    assert np.abs(np.load(tmp_path / "out.npy") - expected(TEXTS, query_prompt("Find it"))).max() < 1e-5


def test_a_model_of_sentence_transformers(capsys, export, folder, expected, tmp_path):
    options = ["--trust-remote-code", "--queries", "--query-prompt", PROMPT, "--instruction", "not this"]
    said = run(capsys, f"st:{export}", folder / "texts.txt", tmp_path / "out.npy", *options)
    assert np.abs(np.load(tmp_path / "out.npy") - expected(TEXTS, PROMPT)).max() < 1e-5
    assert "% padding" in said and " 0.0% padding" not in said


def test_what_is_there_is_said(capsys, export, folder, tmp_path):
    run(capsys, export, folder / "texts.txt", tmp_path / "out", "--shard-size", 4)
    said = run(capsys, export, folder / "texts.txt", tmp_path / "out", "--shard-size", 4)
    assert said == f"9 texts, 32 dimensions: {tmp_path / 'out'} (9 were there before)\n"


def test_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch, export, folder, tmp_path):
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    assert main(["encode", str(export), str(folder / "texts.txt"), str(tmp_path / "out"), "--shard-size", "4"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().err.splitlines() if " tokens/s" in line]
    assert [line[0] for line in lines] == [f"embed texts: {done}/9 texts" for done in (4, 8, 9)]
    assert [line[2].startswith("ETA 0:00:") for line in lines[:2]] == [True, True] and len(lines[2]) == 2


def test_fp8_is_no_other_half_of_a_corpus(capsys, export, folder, tmp_path):
    """Shards of one precision are not completed in another."""
    run(capsys, export, folder / "texts.txt", tmp_path / "out", "--shard-size", 4)
    (tmp_path / "out" / "shard-00001.npy").unlink()
    arguments = ["encode", export, folder / "texts.txt", tmp_path / "out", "--shard-size", 4, "--fp8", "blockwise"]
    assert main([*map(str, arguments)]) != 0
    said = capsys.readouterr().err
    assert "holds other embeddings" in said and "embedder.fp8: None -> 'blockwise'" in said


def test_evaluate_in_fp8(capsys, export, inputs_of_beir, tmp_path):
    """As the trainer computes the export; nearly the figures of the export itself."""
    found = []
    for more in ([], ["--fp8", "blockwise"]):
        words = ["evaluate", export, inputs_of_beir, "--max-length", LIMIT, "--json", tmp_path / "out.json", *more]
        assert main([*map(str, words)]) == 0
        found.append(json.loads((tmp_path / "out.json").read_text()))
    assert found[0].keys() == found[1].keys()
    assert found[1]["recall_at_100"] == found[0]["recall_at_100"] == 1.0


def test_evaluate_in_fp8_chooses_no_device(capsys):
    assert main(["evaluate", "export", "beir", "--fp8", "blockwise", "--device", "cuda:1"]) == 78
    assert "--device cuda:1 is for --fp8 off, and --fp8 is blockwise" in capsys.readouterr().err
