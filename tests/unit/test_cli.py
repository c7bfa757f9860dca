"""Bad input through the command line: exit status 78, one message that names the offender, and no step taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvembed_mcore import __version__
from nvembed_mcore.cli import main
from nvembed_mcore.log import close_logging, read_metrics
from nvembed_mcore.resume import plain
from tests.helpers import runs
from tests.helpers.checkpoints import rewrite


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """A run of two steps with its checkpoint, and its export beside it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    path = write_yaml(inputs, run_dir, {"eval.path": None})
    assert main(["train", str(path), "--steps", "2"]) == 0
    assert main(["export-hf", str(run_dir), str(run_dir.parent / "export")]) == 0
    close_logging()
    return run_dir


def write_yaml(inputs: Path, run_dir: Path, changes: dict[str, Any]) -> Path:
    """The tiny run as YAML; `changes` maps dotted fields to values (a number in a path is a place in a list)."""
    tree = plain(runs.run_config(inputs, run_dir))
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node[int(parent) if parent.isdigit() else parent]
        node[last] = value
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def message_of(capsys, arguments: list[str], status: int = 78) -> str:
    """Run a command that must end with `status`; its one error message."""
    capsys.readouterr()
    try:
        found = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        found = stop.code
    text = capsys.readouterr().err
    assert found == status, text
    assert "Traceback" not in text, text
    assert text.count("error:") == 1, text
    return text[text.index("error:") :]


def train_message(capsys, inputs, run_dir: Path, changes: dict[str, Any], *arguments: str) -> str:
    """The message of a training run that must end before its first step."""
    message = message_of(capsys, ["train", write_yaml(inputs, run_dir, changes), *arguments])
    assert not (run_dir / "metrics.jsonl").exists()
    assert not (run_dir / "checkpoints").exists()
    return message


def assert_names(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modle": 3}, ["modle"]),
        ({"optim.learning_rate": 3}, ["learning_rate"]),
        ({"data.datasets.0.instructions": "x"}, ["instructions"]),
        ({"steps": "many"}, ["steps", "many"]),
        ({"optim.lr": "fast"}, ["optim.lr", "fast"]),
        ({"step.way": "twice"}, ["step.way", "twice"]),
        ({"batch_size": 2.5}, ["batch_size", "2.5"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"optim.lr": -1.0}, ["optim.lr", "-1.0"]),
        ({"checkpoint.keep": 1}, ["checkpoint.keep", "1"]),
        ({"stop_at": 9}, ["stop_at", "9", "8"]),
        ({"data.datasets": []}, ["data.datasets"]),
        ({"model.init_from": "/somewhere"}, ["model.config", "model.init_from"]),
    ],
)
def test_configuration_that_cannot_work(capsys, inputs, tmp_path, changes, words):
    assert_names(train_message(capsys, inputs, tmp_path / "run", changes), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.learning_rate", "3"], ["learning_rate"]),
        (["--stpes=3"], ["stpes"]),
        (["--steps", "many"], ["steps", "many"]),
        (["--parallel.tp", "0"], ["parallel.tp", "0"]),
        (["more.yaml"], ["more.yaml"]),
    ],
)
def test_options_that_cannot_work(capsys, inputs, tmp_path, arguments, words):
    assert_names(train_message(capsys, inputs, tmp_path / "run", {}, *arguments), *words)
    assert not (tmp_path / "run").exists()


def test_configuration_files_that_cannot_be_read(capsys, tmp_path):
    assert_names(message_of(capsys, ["train", tmp_path / "none.yaml"]), "none.yaml")
    assert_names(message_of(capsys, ["train", "--config", tmp_path / "none.yaml"]), "none.yaml")
    (tmp_path / "broken.yaml").write_text("steps: [1\nrun_dir: x\n")
    assert_names(message_of(capsys, ["train", tmp_path / "broken.yaml"]), "broken.yaml")
    (tmp_path / "broken.yaml").write_text("only words\n")
    assert_names(message_of(capsys, ["train", tmp_path / "broken.yaml"]), "broken.yaml")
    assert_names(message_of(capsys, ["train"]), "run_dir")
    assert "COMMAND" in message_of(capsys, ["fly"], status=2)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (3, 2)])
def test_layout_that_does_not_divide_the_processes(capsys, inputs, tmp_path, tp, pp):
    message = train_message(capsys, inputs, tmp_path / "run", {"parallel.tp": tp, "parallel.pp": pp})
    assert_names(message, "parallel.tp", "parallel.pp", f" {tp * pp} ", " 1 process")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("data.datasets.0.path", ["no data file", "none.jsonl"]),
        ("data.tokenizer", ["no tokenizer folder", "none.jsonl"]),
        ("eval.path", ["no BEIR folder", "none.jsonl"]),
        ("model.config", ["config.json", "none.jsonl"]),
    ],
)
def test_missing_inputs(capsys, inputs, tmp_path, field, words):
    message = train_message(capsys, inputs, tmp_path / "run", {field: str(tmp_path / "none.jsonl")})
    assert_names(message, *words)


def test_a_missing_test_set_is_found_before_anything_is_tokenised(capsys, inputs, tmp_path):
    changes = {"eval.path": str(tmp_path / "none"), "data.cache_dir": str(tmp_path / "cache")}
    assert_names(train_message(capsys, inputs, tmp_path / "run", changes), "no BEIR folder")
    assert not (tmp_path / "cache").exists()


def test_missing_start(capsys, inputs, tmp_path):
    changes = {"model.config": None, "model.init_from": str(tmp_path / "stage1")}
    assert_names(train_message(capsys, inputs, tmp_path / "run", changes), "model.init_from", "stage1")


def test_run_folder_that_is_a_file(capsys, inputs, tmp_path):
    (tmp_path / "run").write_text("")
    assert_names(message_of(capsys, ["train", write_yaml(inputs, tmp_path / "run", {})]), str(tmp_path / "run"))


def data_message(capsys, inputs, tmp_path, content: bytes, changes: dict[str, Any] | None = None) -> str:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    return train_message(capsys, inputs, tmp_path / "run", {"data.datasets.0.path": str(file), **(changes or {})})


GOOD = b'{"query": "a", "pos": ["b"]}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["bad.jsonl holds no records"]),
        (b"\n\n", ["bad.jsonl holds no records"]),
        (GOOD + b'{"query": \n', ["1 bad line:", "bad.jsonl:2:11: not JSON"]),
        (GOOD + b'{"query": "\xff", "pos": ["b"]}\n', ["1 bad line:", "bad.jsonl:2:12: not UTF-8", "0xff"]),
        (b'{"pos": ["b"]}\n' + GOOD, ["1 bad line:", "bad.jsonl:1:1: query is missing"]),
        (GOOD + b'{"query": "a"}\n', ["bad.jsonl:2:1: pos is missing"]),
        (GOOD + b'{"query": "  ", "pos": ["b"]}\n', ["bad.jsonl:2:11: query is empty"]),
        (GOOD + b'{"query": "a", "pos": "b"}\n', ["bad.jsonl:2:23: pos must be a list"]),
        (GOOD + b'["a"]\n', ["bad.jsonl:2:1: not a JSON object"]),
    ],
)
def test_bad_records(capsys, inputs, tmp_path, content, words):
    assert_names(data_message(capsys, inputs, tmp_path, content), *words)


def test_all_bad_lines_are_counted_and_ten_are_shown(capsys, inputs, tmp_path):
    message = data_message(capsys, inputs, tmp_path, GOOD + b"{\n" * 23 + GOOD)
    assert_names(message, "23 bad lines, the first 10:", "bad.jsonl:2:", "bad.jsonl:11:")
    assert "bad.jsonl:12:" not in message


def test_batch_larger_than_the_data(capsys, inputs, tmp_path):
    message = data_message(capsys, inputs, tmp_path, GOOD * 5)
    assert_names(message, "batch_size", " 9", " 5 records")


def test_instruction_longer_than_the_limit(capsys, inputs, tmp_path):
    changes = {"data.datasets.0.instruction": "find it " * 20}
    assert_names(train_message(capsys, inputs, tmp_path / "run", changes), "the instruction", "limit of 24")


def test_tokenizer_larger_than_the_vocabulary(capsys, inputs, tmp_path):
    architecture = json.loads((inputs / "config.json").read_text()) | {"vocab_size": 500}
    (tmp_path / "small.json").write_text(json.dumps(architecture))
    message = train_message(capsys, inputs, tmp_path / "run", {"model.config": str(tmp_path / "small.json")})
    assert_names(message, "32000", "500", "vocab_size")


def test_resume_must_find_a_checkpoint(capsys, inputs, tmp_path):
    message = train_message(capsys, inputs, tmp_path / "run", {"checkpoint.resume": "must"})
    assert_names(message, "checkpoint.resume", "must", str(tmp_path / "run"))


def again_message(capsys, inputs, finished, changes: dict[str, Any]) -> str:
    """The message of a run that must not go on in a finished run's folder, and leaves all but its record as it was."""
    kept = [one for one in [*finished.glob("checkpoints/**/*"), *finished.glob("*[!n]")] if one.is_file()]
    before = [path.read_bytes() for path in kept]
    message = message_of(capsys, ["train", write_yaml(inputs, finished, {"eval.path": None, "steps": 2} | changes)])
    assert [path.read_bytes() for path in kept] == before
    return message


def test_resume_never_refuses_a_checkpoint(capsys, inputs, finished):
    message = again_message(capsys, inputs, finished, {"checkpoint.resume": "never"})
    assert_names(message, "checkpoint.resume", "never", "step 2", str(finished))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("optim.lr", 0.5, "optim.lr: 0.002 -> 0.5"),
        ("seed", 5, "seed: 1234 -> 5"),
        ("data.datasets.0.num_negatives", 1, "data.datasets.0.num_negatives: 2 -> 1"),
        ("data.datasets.0.in_batch_negatives", False, "data.datasets.0.in_batch_negatives: None -> False"),
        ("data.datasets.0.weight", 2.0, "data.datasets.0.weight: None -> 2.0"),
        ("data.max_document_tokens", 30, "data.max_document_tokens: 32 -> 30"),
        ("model.pooling.kind", "mean", "model.pooling.kind: 'latent' -> 'mean'"),
    ],
)
def test_resume_with_a_changed_setting(capsys, inputs, finished, field, value, shown):
    message = again_message(capsys, inputs, finished, {field: value})
    assert_names(message, "saved -> now", f"\n  {shown}", str(finished))


def test_resume_under_another_version_of_transformers(inputs, finished):
    """The architecture's dictionary names the library's version, which is no setting of the run."""
    (found,) = finished.glob("checkpoints/step-*/run.json")
    stored = json.loads(found.read_text())
    other = stored | {"hf_config": stored["hf_config"] | {"transformers_version": "5.0.0"}}
    rewrite(found, other)
    try:
        path = write_yaml(inputs, finished, {"eval.path": None, "steps": 2})
        assert main(["train", str(path)]) == 0
    finally:
        rewrite(found, stored)
    assert [line["step"] for line in read_metrics(finished / "metrics.jsonl")] == [1, 2]


def test_second_stage_with_another_head(capsys, inputs, finished, tmp_path):
    changes = {"model.config": None, "model.init_from": str(finished), "model.pooling.num_latents": 7}
    message = train_message(capsys, inputs, tmp_path / "run", changes)
    assert_names(message, str(finished), "num_latents: 6 -> 7")


def test_only_every_nth_step_is_written(inputs, tmp_path):
    path = write_yaml(inputs, tmp_path / "run", {"eval.path": None, "log.every_steps": 2, "steps": 3})
    assert main(["train", str(path)]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2, 3]


def test_export_folder_that_exists(capsys, finished, tmp_path):
    (tmp_path / "export").mkdir()
    message = message_of(capsys, ["export-hf", finished, tmp_path / "export"])
    assert_names(message, str(tmp_path / "export"), "exists")
    assert not list((tmp_path / "export").iterdir())


def test_export_of_what_has_no_checkpoint(capsys, tmp_path):
    for source in (tmp_path, tmp_path / "none"):
        message = message_of(capsys, ["export-hf", source, tmp_path / "export"])
        assert_names(message, "no complete checkpoint", str(source))
    assert not (tmp_path / "export").exists()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000007\n")
    assert_names(message_of(capsys, ["export-hf", tmp_path, tmp_path / "export"]), "step-00000007")


@pytest.mark.parametrize("command", ["evaluate", "encode", "search"])
def test_a_folder_that_is_no_export(capsys, inputs, tmp_path, command):
    (tmp_path / "texts.txt").write_text("a text\n")
    rest = {
        "evaluate": [inputs / "beir"],
        "encode": [tmp_path / "texts.txt", tmp_path / "out.npy"],
        "search": [tmp_path / "texts.txt", "a query"],
    }[command]
    for folder in (tmp_path, tmp_path / "none"):
        assert_names(message_of(capsys, [command, folder, *rest]), str(folder))
    assert not (tmp_path / "out.npy").exists()


def test_evaluate_and_encode_with_bad_texts(capsys, inputs, finished, tmp_path):
    export, output = finished.parent / "export", tmp_path / "out.npy"
    assert_names(message_of(capsys, ["evaluate", export, tmp_path / "none"]), str(tmp_path / "none"))
    shutil.copytree(inputs / "beir", tmp_path / "beir")
    (tmp_path / "beir" / "queries.jsonl").write_text('{"_id": "q0", "text": " "}\n')
    assert_names(message_of(capsys, ["evaluate", export, tmp_path / "beir"]), "queries.jsonl:1:23: text is empty")
    assert_names(message_of(capsys, ["encode", export, tmp_path / "none.txt", output]), "none.txt")
    (tmp_path / "texts.txt").write_text("one\n\nthree\n")
    assert_names(message_of(capsys, ["encode", export, tmp_path / "texts.txt", output]), "texts.txt:2:1")
    assert list(tmp_path.glob("out*")) == []


def test_search_with_bad_input(capsys, finished, tmp_path):
    export = finished.parent / "export"
    (tmp_path / "a.py").write_text("def f():\n    return 1\n")
    assert_names(message_of(capsys, ["search", export, tmp_path / "a.py", " "]), "query is empty")
    assert_names(message_of(capsys, ["search", export, tmp_path / "b.py", "one"]), "b.py")
    assert_names(message_of(capsys, ["search", export, tmp_path / "a.py", "one", "--top", "0"]), "top")
    assert_names(message_of(capsys, ["search", export, tmp_path / "a.py", "one", "--max-length", "2"]), "2")
    assert_names(message_of(capsys, ["search", export, tmp_path / "a.py", "one", "--device", "abacus"]), "abacus")


def test_interrupted(capsys, monkeypatch, tmp_path):
    from nvembed_mcore.checkpoint import export_run

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_run, "export_run", interrupt)
    assert main(["export-hf", str(tmp_path), str(tmp_path / "export")]) == 130
    assert capsys.readouterr().err == "nvembed: interrupted\n"


def test_only_the_first_rank_speaks(capsys, monkeypatch, inputs, tmp_path):
    monkeypatch.setenv("RANK", "1")
    path = str(write_yaml(inputs, tmp_path / "run", {}))
    for arguments in (["--steps", "many"], ["--parallel.tp", "0"]):
        assert main(["train", path, *arguments]) == 78
        assert capsys.readouterr().err == ""


def test_print_config_shows_the_resolved_tree(capsys, inputs, tmp_path):
    path = write_yaml(inputs, tmp_path / "run", {})
    with pytest.raises(SystemExit) as stop:
        main(["train", str(path), "--optim.lr", "0.25", "--print_config"])
    assert stop.value.code in (0, None)
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["optim"]["lr"] == 0.25 and tree["optim"]["clip_norm"] == 1.0
    assert tree["data"]["datasets"][0]["num_negatives"] == 2
    assert not (tmp_path / "run").exists()


def test_what_a_run_resolved_is_a_configuration(inputs, finished, tmp_path):
    """`config.yaml` of a run starts another one."""
    assert main(["train", str(finished / "config.yaml"), "--run_dir", str(tmp_path / "run"), "--steps", "1"]) == 0


def test_train_help_is_the_configuration_s(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--optim.clip_norm", "Largest norm of the whole gradient", "--data.tokenizer", "--parallel.pp"):
        assert words in text


def test_version():
    command = [sys.executable, "-m", "nvembed_mcore", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == __version__
