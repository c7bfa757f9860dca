"""Lengths of a run's batches: from token stores, data files, histograms and published means."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from nvembed_mcore.config import ConfigError, DataConfig, DatasetConfig, ModelConfig, RunConfig
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.scaling.lengths import sample_lengths

INSTRUCTION = "Find the answer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and 40 records of one or two positives and up to three negatives."""
    path = tmp_path_factory.mktemp("lengths")
    write_mistral_tokenizer(path / "tokenizer")
    rows = [
        {"query": f"word {'why ' * (i % 5)}", "pos": ["yes " * (3 + i)] * (1 + i % 2), "neg": ["no " * 9] * (i % 4)}
        for i in range(40)
    ]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_config(folder, **data) -> RunConfig:
    dataset = DatasetConfig(path=str(folder / "data.jsonl"), instruction=INSTRUCTION, num_negatives=2)
    return RunConfig(
        run_dir="unused",
        steps=20,
        batch_size=8,
        data=DataConfig(
            **{
                "tokenizer": str(folder / "tokenizer"),
                "datasets": [dataset],
                "cache_dir": str(folder / "cache"),
                "max_document_tokens": 30,
            }
            | data
        ),
        model=ModelConfig(config="unused"),
    )


def test_files_are_tokenised_and_stores_give_the_runs_own_batches(folder):
    config = run_config(folder)
    before = sample_lengths(config)
    assert before.source.endswith("data.jsonl: its first 40 records")
    limits = dict(max_query_tokens=512, max_document_tokens=30)
    (dataset,) = config.data.datasets
    store = TokenStore.build(dataset, load_tokenizer(config.data.tokenizer), cache_dir=config.data.cache_dir, **limits)
    after = sample_lengths(config)
    assert "token stores" in after.source
    source = BatchSource(config.data, [store], batch_size=8, seed=config.seed, stage=config.stage)
    batch = source.batch(0)
    texts = len(batch.texts)
    assert after.tokens[0, :texts].tolist() == batch.lengths.tolist() and not after.tokens[0, texts:].any()
    assert after.query[0, 8:texts].tolist() == batch.passage_query.tolist()
    assert after.is_positive[0, 8:texts].tolist() == batch.is_positive.tolist()
    known = set(store.query_lengths().tolist()), set(store.document_lengths().tolist())
    assert set(before.tokens[:, :8].ravel().tolist()) <= known[0]
    assert set(before.tokens[:, 8:].ravel().tolist()) - {0} <= known[1]
    # Other limits are other stores.
    assert "token stores" not in sample_lengths(run_config(folder, max_document_tokens=29)).source


def test_without_data_lengths_are_those_of_ms_marco(tmp_path):
    config = dataclasses.replace(run_config(tmp_path, max_document_tokens=512), batch_size=512)
    found = sample_lengths(config)
    assert "MS MARCO" in found.source
    documents = found.tokens[:, 512:]
    assert documents.shape == (8, 512 * 3) and found.is_positive.sum() == 8 * 512
    assert documents.mean() == pytest.approx(105, rel=0.02)
    assert np.percentile(documents, 95) == pytest.approx(180, rel=0.02)
    prompt = 4 + 7  # three words at 1.3 tokens, and the frame
    assert found.tokens[:, :512].mean() == pytest.approx(10 + prompt, rel=0.05)
    assert np.array_equal(found.tokens, sample_lengths(config).tokens), "the same in every call"
    assert (sample_lengths(config, "longest").tokens == 512).all()


def test_histograms_are_taken_as_they_are(tmp_path):
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps({"query": {"12": 1}, "document": {"20": 3, "600": 1}}), encoding="utf-8")
    found = sample_lengths(dataclasses.replace(run_config(tmp_path), batch_size=400), str(file))
    assert (found.tokens[:, :400] == 12).all(), "with what stands before a query"
    assert set(found.tokens[:, 400:].ravel().tolist()) == {20, 30}, "cut at the limit"
    assert (found.tokens[:, 400:] == 20).mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file of lengths at"),
        ("[]", "'query' must be"),
        ('{"query": {"5": 1}}', "'document' must be"),
        ('{"query": {"0": 1}, "document": {"5": 1}}', "lengths of at least 1"),
        ('{"query": {}, "document": {"5": 1}}', "lengths of at least 1"),
        ('{"query": {"5": -1}, "document": {"5": 1}}', "counts above 0"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, content, message):
    file = tmp_path / "lengths.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        sample_lengths(run_config(tmp_path), str(file))


def test_data_sets_have_the_shares_of_the_blend(folder, tmp_path):
    """A file of 40 records with 1.25 negatives in the mean, and one of 120 without any that is not here."""
    here = run_config(folder).data.datasets[0]
    away = DatasetConfig(path=str(tmp_path / "away.jsonl"), max_records=120, num_negatives=0)
    config = run_config(folder, datasets=[here, away], cache_dir=str(tmp_path))
    found = sample_lengths(dataclasses.replace(config, batch_size=800))
    assert "its first 40 records" in found.source and "MS MARCO" in found.source
    passages = (found.tokens > 0).sum() / (8 * 800) - 1
    assert passages == pytest.approx(1 + 1.25 * 40 / 160, abs=0.03)
