"""What the token store and a resumed run say of data that they cannot use: whole messages, `TMP` for the folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow
import pytest
import xxhash
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nvembed_mcore.checkpoint.store import CheckpointError, find_checkpoint
from nvembed_mcore.config import ConfigError, DataConfig, DatasetConfig
from nvembed_mcore.data import token_build
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.log import close_logging
from nvembed_mcore.resume import restore
from nvembed_mcore.train import train
from tests.helpers import runs
from tests.helpers.checkpoints import seal

GOOD = [json.dumps({"query": f"question {i}", "pos": [f"answer {i}"]}) for i in range(5)]
BAD = ["{", '{"query": "a"}', '{"query": "a", "pos": [" "]}']


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_mistral_tokenizer(folder)
    return load_tokenizer(folder)


def message(tmp_path: Path, work, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        work()
    assert type(caught.value) is kind
    return str(caught.value).replace(str(tmp_path), "TMP")


def build(tmp_path: Path, tokenizer, lines: list[str] = GOOD, *, instruction: str = "", **how) -> TokenStore:
    (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    how = dict(max_query_tokens=32, max_document_tokens=32, cache_dir=tmp_path / "cache") | how
    return TokenStore.build(
        DatasetConfig(path=str(tmp_path / "data.jsonl"), instruction=instruction), tokenizer, **how
    )


@pytest.mark.parametrize(
    ("lines", "how", "expected"),
    [
        (
            [*GOOD, *BAD],
            {},
            "TMP/data.jsonl has 3 bad lines:\n"
            "  TMP/data.jsonl:6:2: not JSON: Expecting property name enclosed in double quotes\n"
            "  TMP/data.jsonl:7:1: pos is missing\n"
            "  TMP/data.jsonl:8:23: pos[0] is blank",
        ),
        (
            [*BAD, *GOOD, "1", *BAD * 3],
            {"max_bad_records": 12},
            "TMP/data.jsonl has 13 bad lines, 12 allowed, the first 10:\n"
            "  TMP/data.jsonl:1:2: not JSON: Expecting property name enclosed in double quotes\n"
            "  TMP/data.jsonl:2:1: pos is missing\n"
            "  TMP/data.jsonl:3:23: pos[0] is blank\n"
            "  TMP/data.jsonl:9:1: not a JSON object but a number\n"
            "  TMP/data.jsonl:10:2: not JSON: Expecting property name enclosed in double quotes\n"
            "  TMP/data.jsonl:11:1: pos is missing\n"
            "  TMP/data.jsonl:12:23: pos[0] is blank\n"
            "  TMP/data.jsonl:13:2: not JSON: Expecting property name enclosed in double quotes\n"
            "  TMP/data.jsonl:14:1: pos is missing\n"
            "  TMP/data.jsonl:15:23: pos[0] is blank",
        ),
        (BAD, {"max_bad_records": 3}, "TMP/data.jsonl holds no records"),
        ([], {}, "TMP/data.jsonl holds no records"),
    ],
)
def test_bad_records(tmp_path, tokenizer, lines, how, expected):
    assert message(tmp_path, lambda: build(tmp_path, tokenizer, lines, **how)) == expected
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_store_that_had_more_bad_records_than_now_allowed(tmp_path, tokenizer):
    assert len(build(tmp_path, tokenizer, [*BAD, *GOOD], max_bad_records=3)) == len(GOOD)
    found = message(tmp_path, lambda: build(tmp_path, tokenizer, [*BAD, *GOOD], max_bad_records=2))
    assert found == (
        "TMP/data.jsonl has 3 bad lines, 2 allowed:\n"
        "  TMP/data.jsonl:1:2: not JSON: Expecting property name enclosed in double quotes\n"
        "  TMP/data.jsonl:2:1: pos is missing\n"
        "  TMP/data.jsonl:3:23: pos[0] is blank"
    )


def test_a_negative_number_of_bad_records():
    expected = "data.max_bad_records must be at least 0, got -1"
    with pytest.raises(ConfigError) as caught:
        DataConfig(tokenizer="t", datasets=[DatasetConfig(path="p")], max_bad_records=-1)
    assert str(caught.value) == expected


def test_no_data_file(tmp_path, tokenizer):
    dataset = DatasetConfig(path=str(tmp_path / "nowhere.jsonl"))
    how = dict(max_query_tokens=32, max_document_tokens=32, cache_dir=tmp_path / "cache")
    found = message(tmp_path, lambda: TokenStore.build(dataset, tokenizer, **how))
    assert found == "no data file at TMP/nowhere.jsonl"


def test_no_room_for_the_instruction(tmp_path, tokenizer):
    work = lambda: build(tmp_path, tokenizer, instruction="Find it", max_query_tokens=10)  # noqa: E731
    assert message(tmp_path, work, ValueError) == (
        "the instruction 'Find it' takes 9 tokens, and with one token of text and </s> more than the limit of 10"
    )


def test_a_text_that_the_tokenizer_joins_with_the_prompt(tmp_path):
    """The one record of which it is true is named, among many."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "Instruct: a\nQuery:": 3, "Instruct: a\nQuery: question 3": 4}
    vocabulary |= {f"Instruct: a\nQuery: question {i}": 10 + i for i in range(5)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    joining = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")  # noqa: S106
    assert message(tmp_path, lambda: build(tmp_path, joining, instruction="a")) == (
        "TMP/data.jsonl:1: the tokenizer does not keep 'Instruct: a\\nQuery: ' apart from the text 'question 0'"
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_data_that_change_while_they_are_tokenised(tmp_path, tokenizer, monkeypatch):
    def change(self):
        with open(self.source, "a") as file:
            file.write("\n")

    monkeypatch.setattr(token_build._Build, "write_arrow", lambda self, *_: change(self))
    assert message(tmp_path, lambda: build(tmp_path, tokenizer)) == "TMP/data.jsonl changed while it was tokenised"


def _without_file(folder: Path) -> None:
    (folder / "data.arrow").unlink()


def _shorter(folder: Path) -> None:
    (folder / "data.arrow").write_bytes((folder / "data.arrow").read_bytes()[:-8])


def _empty_description(folder: Path) -> None:
    (folder / "store.json").write_text("")


def _lacking(folder: Path) -> None:
    description = json.loads((folder / "store.json").read_text())
    del description["tokenizer"]
    (folder / "store.json").write_text(json.dumps(description))


def _other_columns(folder: Path) -> None:
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, pyarrow.schema([("a", pyarrow.int32())])):
            pass
    _describe(folder, bytes=(folder / "data.arrow").stat().st_size)


def _fewer_records(folder: Path) -> None:
    statistics = json.loads((folder / "store.json").read_text())["statistics"]
    _describe(folder, statistics=statistics | {"records": 6})


def _describe(folder: Path, **changes) -> None:
    description = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(description | changes))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_without_file, "[Errno 2] No such file or directory: 'STORE/data.arrow'"),
        (_shorter, "data.arrow has BYTES-8 bytes, BYTES were written"),
        (_empty_description, "store.json: Expecting value: line 1 column 1 (char 0)"),
        (_lacking, "store.json lacks 'tokenizer'"),
        (
            _other_columns,
            "the columns of data.arrow are ['a'], not ['query', 'query_length', 'query_pooled_from', 'pos', "
            "'pos_lengths', 'pos_ids', "
            "'neg', 'neg_lengths', 'neg_ids']",
        ),
        (_fewer_records, "data.arrow has 5 records, 6 were written"),
    ],
)
def test_a_damaged_store(tmp_path, tokenizer, damage, reason):
    folder = build(tmp_path, tokenizer).folder
    size = (folder / "data.arrow").stat().st_size
    damage(folder)
    for work in (lambda: TokenStore.open(folder), lambda: build(tmp_path, tokenizer)):
        found = message(tmp_path, work).replace(f"TMP/cache/{folder.name}", "STORE")
        found = found.replace(str(size - 8), "BYTES-8").replace(str(size), "BYTES")
        assert found == f"the token store STORE is damaged ({reason}); remove the folder to build it anew"


def test_a_store_with_other_bytes(tmp_path, tokenizer):
    """Of the same size and in the same format: seen when a run starts, and not when it only opens the store."""
    folder = build(tmp_path, tokenizer).folder
    content = bytearray((folder / "data.arrow").read_bytes())
    content[-100] ^= 1
    (folder / "data.arrow").write_bytes(content)
    TokenStore.open(folder)
    found = message(tmp_path, lambda: build(tmp_path, tokenizer))
    written = json.loads((folder / "store.json").read_text())["xxh3_128"]
    assert found == (
        f"the token store TMP/cache/{folder.name} is damaged (the XXH3 of data.arrow is "
        f"{xxhash.xxh3_128(content).hexdigest()}, {written} was written); remove the folder to build it anew"
    )


def test_no_store(tmp_path):
    assert message(tmp_path, lambda: TokenStore.open(tmp_path / "nowhere")) == "no token store at TMP/nowhere"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A run of one step: its configuration, and the facts of its checkpoint."""
    root = tmp_path_factory.mktemp("finished")
    config = runs.run_config(runs.write_inputs(root / "inputs"), root / "run", steps=1)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, path=None))
    train(config)
    close_logging()
    return config, find_checkpoint(config.run_dir).facts


def set_dataset(facts: dict, **changes) -> None:
    facts["stores"][0] |= changes


def add_dataset(facts: dict) -> None:
    facts["config"]["data"]["datasets"].append({"path": "more.jsonl"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda facts: set_dataset(facts, data="0123456789abcdef" * 4),
            "data.datasets.0.data: 'DATA' -> '0123456789abcdef' (the content of TMP/inputs/train.jsonl)",
        ),
        (
            lambda facts: set_dataset(facts, query_prompt="Instruct: Find that\nQuery: "),
            r"data.datasets.0.query_prompt: 'Instruct: Find it\nQuery: ' -> 'Instruct: Find that\nQuery: '",
        ),
        (
            lambda facts: set_dataset(facts, document_prompt="Instruct: Find it\nQuery: "),
            r"data.datasets.0.document_prompt: '' -> 'Instruct: Find it\nQuery: '",
        ),
        (
            lambda facts: set_dataset(facts, rejected={"records": 2, "lines": "abcd"}),
            "data.datasets.0.rejected.lines: None -> 'abcd'\n  data.datasets.0.rejected.records: 0 -> 2",
        ),
        (lambda facts: set_dataset(facts, format=2), "data.datasets.0.format: 1 -> 2"),
        (
            lambda facts: facts["config"]["data"].update(max_query_tokens=16),
            "data.max_query_tokens: 24 -> 16",
        ),
        (add_dataset, "data.datasets: ['TMP/inputs/train.jsonl'] -> ['TMP/inputs/train.jsonl', 'more.jsonl']"),
    ],
)
def test_other_data_do_not_resume(finished, change, expected):
    config, saved = finished
    now = json.loads(json.dumps(saved))
    change(now)
    root = Path(config.run_dir).parent
    found = message(root, lambda: restore(config, [], None, now), CheckpointError)
    assert found.replace(saved["stores"][0]["data"][:16], "DATA") == (
        "TMP/run/checkpoints/step-00000001 belongs to another run; changed (saved -> now):\n"
        f"  {expected}\n"
        "Set these back, or give a new run_dir"
    )


def test_a_checkpoint_without_the_stores(finished, tmp_path):
    config, saved = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    lacking = {key: value for key, value in saved.items() if key != "stores"}
    (tmp_path / "run/checkpoints/step-00000001/run.json").write_text(json.dumps(lacking))
    seal(tmp_path / "run/checkpoints/step-00000001")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    found = message(tmp_path, lambda: restore(config, [], None, saved), CheckpointError)
    assert found == (
        "TMP/run/checkpoints/step-00000001 was written by an older version and lacks what a run needs to go on; "
        "give a new run_dir"
    )
