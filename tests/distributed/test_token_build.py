"""Token stores of several blocks, built by workers where runs build them: under torchrun, and of many pairs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nvembed_mcore.config import ModelConfig, PoolingConfig
from nvembed_mcore.data.files import blocks
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.log import read_metrics
from nvembed_mcore.resume import plain
from tests.helpers import runs
from tools.bench import token_store

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    """Workers import the main module of rank 0; the other rank waits."""
    inputs = runs.write_inputs(tmp_path / "inputs")
    filler = "and more of it " * 500
    with open(inputs / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(1300):
            record = runs.record(i)
            file.write(json.dumps(record | {"pos": [record["pos"][0] + filler]}) + "\n")
    assert len(list(blocks(inputs / "train.jsonl"))) > 2
    config = runs.run_config(inputs, tmp_path / "run", steps=1)
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, path=None),
        model=ModelConfig(config=config.model.config, pooling=PoolingConfig(kind="mean")),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(config)), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "nvembed_mcore", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1300 records" in done.stderr and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    (folder,) = (inputs / "cache").iterdir()
    limits = dict(max_query_tokens=config.data.max_query_tokens, max_document_tokens=config.data.max_document_tokens)
    tokenizer = load_tokenizer(inputs / "tokenizer")
    here = TokenStore.build(config.data.datasets[0], tokenizer, **limits, cache_dir=tmp_path / "here", processes=1)
    assert here.folder.name == folder.name
    assert (here.folder / "data.arrow").read_bytes() == (folder / "data.arrow").read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs(tmp_path):
    """Of no process of the build, from 100 thousand to 300 thousand pairs; the benchmark bounds that of 10 million."""
    peaks = []
    for pairs in (100_000, 300_000):
        room = tmp_path / str(pairs)
        write_mistral_tokenizer(room / "tokenizer")
        token_store.write_pairs(room / "pairs.jsonl", load_tokenizer(room / "tokenizer"), pairs)
        figures, found = token_store.apart(token_store.build, room)
        assert figures["pairs"] == pairs and len(found) >= 3
        peaks.append(found[0])
    assert peaks[1] < peaks[0] + (100 << 20) and peaks[1] < 600 << 20
