"""Secrets are in no file, message or picture that a run, an export or a report makes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import sys
import time
from pathlib import Path

import pytest
import yaml

from nvembed_mcore import log, redact
from nvembed_mcore.cli import main
from nvembed_mcore.data.records import write_records
from nvembed_mcore.mining.run import Mining, mine
from nvembed_mcore.parallel.groups import shutdown
from nvembed_mcore.resume import plain
from tests.helpers import runs, tracking
from tests.helpers.mining import WordEmbedder, make_data, write_json_lines

SECRETS = {
    "HF_TOKEN": "hf_CANARYenvironment0000000000",
    "WANDB_API_KEY": "CANARY0123456789abcdef0123456789abcdef0123",
    "AWS_SECRET_ACCESS_KEY": "CANARY/aws+0123456789",
}


@pytest.fixture
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at https://user:CANARY@host/x?a=1", "at https://[redacted]@host/x?a=1"),
        ("/home/https:/user:CANARY@host/x", "/home/https:/[redacted]@host/x"),
        ("s3://CANARY@bucket", "s3://[redacted]@bucket"),
        ("https://host/x?X-Amz-Signature=CANARY&b=2", "https://host/x?X-Amz-Signature=[redacted]&b=2"),
        ("password=CANARY, other=1", "password=[redacted], other=1"),
        ("MY_API_KEY=CANARY x", "MY_API_KEY=[redacted] x"),
        ("Authorization: Bearer CANARY", "Authorization: Bearer [redacted]"),
        ("hf_CANARYabcdefghijklmnop", "[redacted]"),
        ("(sk-proj-CANARYabcdefghijklmnop0123)", "([redacted])"),
        ("ghp_CANARYabcdefghijklmnop0123", "[redacted]"),
        ("AKIACANARYCANARYCANA", "[redacted]"),
        (f"failed with {SECRETS['AWS_SECRET_ACCESS_KEY']}!", "failed with [redacted]!"),
    ],
)
def test_texts(environment, text, expected):
    assert redact.text(text) == expected
    assert redact.text(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Instruct: Given a question about passwords, retrieve passages\nQuery: ",
        "data.tokenizer=runs/tokenizer max_query_tokens=512 bos_token=<s>",
        "git@host:owner/name and name@example.org",
        "/data/task-2024-some-long-name/sk-learn-documentation-of-everything",
        "0123456789abcdef0123456789abcdef01234567",  # a commit, like a key of W&B outside of the environment
        "https://host/a/b@0123",
        "hf:owner/name:config:train",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact.text(text) == text


def test_what_stands_around_a_secret_stays_whole():
    """Files are JSON and HTML behind it too."""
    values = {"a": 'password=CANARY"b', "b": ["https://u:CANARY@h", "Authorization: Basic CANARY"], "c": "token"}
    hidden = redact.text(json.dumps(values))
    assert "CANARY" not in hidden and json.loads(hidden)["a"] == 'password=[redacted]"b'
    assert redact.text("<td>api_key=CANARY</td><td>x</td>") == "<td>api_key=[redacted]</td><td>x</td>"


@pytest.mark.parametrize("piece", ["_", "a.", "a-", "sk-", "https://", "api_key", "?", "a:/"])
def test_no_text_takes_long(piece):
    start = time.process_time()
    redact.text(piece * 5000)
    assert time.process_time() - start < 1


def test_trees(tmp_path):
    tree = {"data": {"tokenizer": "t", "max_query_tokens": 4}, "api_key": "CANARY", "retain_tokens": 3, "none": None}
    tree |= {"list": [{"db_password": "CANARY"}, "https://u:CANARY@h"], "tokens_per_microbatch": 5, "bos_token": "<s>"}
    hidden = redact.tree(tree)
    assert "CANARY" not in json.dumps(hidden)
    assert {key: hidden[key] for key in tree if key not in ("api_key", "list")} == {
        key: tree[key] for key in tree if key not in ("api_key", "list")
    }
    assert redact.tree(hidden) == hidden
    config = plain(runs.run_config(tmp_path, tmp_path))
    assert redact.tree(config) == config  # our own fields are none


def test_messages_and_tracebacks(environment, tmp_path, capsys):
    log.setup_logging(0, tmp_path)
    try:
        raise ValueError(f"no access with {SECRETS['WANDB_API_KEY']}")
    except ValueError:
        logging.getLogger("nvembed_mcore.some").exception("cannot read %s", "https://user:CANARY@host")
    log.close_logging()
    written, shown = (tmp_path / "rank-0.log").read_text(), capsys.readouterr().err
    for text in (written, shown):
        assert "CANARY" not in text and "cannot read https://[redacted]@host" in text
        assert "ValueError: no access with [redacted]" in text


def test_an_error_that_nobody_foresaw(environment, monkeypatch, capsys, tmp_path):
    def fail(*arguments):
        raise RuntimeError(f"with {SECRETS['HF_TOKEN']}")

    monkeypatch.setattr("nvembed_mcore.cli.train", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for flags in ([], ["--debug"]):
        assert main(["train", *flags]) == 70
        shown = capsys.readouterr().err
        assert "RuntimeError: with [redacted]" in shown and "CANARY" not in shown
        assert ("Traceback" in shown) == bool(flags)
    (trace,) = tmp_path.iterdir()
    assert "Traceback" in trace.read_text() and "CANARY" not in trace.read_text()


def secret_folder(root: Path) -> Path:
    """A folder whose path is a URL with a password."""
    return root / "https:" / "user:CANARY@host"


def files_with_secrets(root: Path, but: Path) -> list[str]:
    files = [path for path in root.rglob("*") if path.is_file() and but not in path.parents]
    assert len(files) > 10
    return [str(path) for path in files if b"CANARY" in path.read_bytes()]


def test_a_run_and_its_export(environment, tmp_path, capsys):
    inputs, run = runs.write_inputs(tmp_path / "inputs"), tmp_path / "run"
    secret = secret_folder(tmp_path / "inputs")
    secret.mkdir(parents=True)
    (inputs / "train.jsonl").rename(secret / "train.jsonl")
    architecture = json.loads((inputs / "config.json").read_text()) | {
        "hub_token": "CANARY",
        "url": "ftp://a:CANARY@h",
    }
    (secret / "config.json").write_text(json.dumps(architecture))
    tree = plain(runs.run_config(inputs, run, steps=2))
    tree["data"]["datasets"][0]["path"] = str(secret / "train.jsonl")
    tree["model"]["config"] = str(secret / "config.json")
    tree["log"]["tensorboard"] = True
    tree["eval"]["path"] = None
    (inputs / "run.yaml").write_text(yaml.safe_dump(tree))
    train = ["train", str(inputs / "run.yaml")]
    with _closed_log():
        assert main([*train, "--stop_at", "1"]) == 0
        assert main(train) == 0, capsys.readouterr().err  # what was stored compares equal
        assert main([*train, "--eval.path", str(secret / "missing")]) == 78
        assert main([*train, "--steps", SECRETS["HF_TOKEN"]]) == 78
        assert main(["export-hf", str(run), str(tmp_path / "export")]) == 0
    shown = capsys.readouterr()
    assert "[redacted]" in shown.err and "CANARY" not in shown.err + shown.out
    inputs_made = files_with_secrets(tmp_path, but=secret)
    assert inputs_made == [str(inputs / "run.yaml")]
    assert "[redacted]" in (run / "config.yaml").read_text()
    _check_modes(run)
    assert "mlflow" not in sys.modules and not tracking.services()


def _check_modes(run: Path) -> None:
    for path in (run, *run.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0, path


@contextlib.contextmanager
def _closed_log():
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)
        log.close_logging()
        shutdown()


def test_mining_and_its_report(environment, tmp_path):
    records, corpus = make_data(5, 20)
    secret = secret_folder(tmp_path)
    secret.mkdir(parents=True)
    arguments = dict(records=write_json_lines(secret / "records.jsonl", records), output=str(tmp_path / "mined"))
    mine(WordEmbedder, Mining(**arguments, corpus=write_json_lines(secret / "corpus.jsonl", corpus)))
    shutdown()
    assert files_with_secrets(tmp_path / "mined", but=secret) == []


def test_data_are_not_changed(tmp_path):
    """A text that looks like a secret is still the text to train on."""
    write_records(tmp_path / "records.jsonl", [{"query": "https://user:CANARY@host"}])
    assert "CANARY" in (tmp_path / "records.jsonl").read_text()
