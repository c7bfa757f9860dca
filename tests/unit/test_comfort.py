"""What every command has: --json, --quiet and --debug, one line for an error, no colours in a file, and help where a
word is mistyped."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess

import pytest

from nvembed_mcore import cli
from nvembed_mcore.cli import main
from nvembed_mcore.cli.results import Tables
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import ConfigError
from nvembed_mcore.log import close_logging
from tests.helpers import runs

FIELDS = ("train", "preflight", "plan", "doctor")
"""Commands that read the fields of a configuration."""
BAD = {
    "train": ["no.yaml"],
    "status": ["no"],
    "preflight": ["no.yaml", "--show", "run_dir"],
    "plan": ["no.yaml", "--gpus", "8"],
    "import-hf": ["no", "out"],
    "export-hf": ["no", "out"],
    "export-onnx": ["no", "out"],
    "inspect": ["no"],
    "evaluate": ["no", "beir"],
    "search": ["no", "a.py", "words"],
    "encode": ["no", "a.txt", "out"],
    "mine": ["no", "no.jsonl", "out"],
    "report": ["no", "--output", "page.html"],
    "data score": ["no.jsonl", "out.jsonl", "--teacher", "no"],
    "data tokenizer": ["a.file/below"],
    "data split": ["no.jsonl", "out", "--held-out", "3"],
    "data python-docs": ["out", "--tokenizer", "no"],
    "data plan": ["no.yaml"],
    "data convert pairs": ["no.jsonl", "out.jsonl"],
    "data decontaminate": ["no.jsonl", "out.jsonl", "--against", "no"],
    "data prompts brainstorm": ["out.txt", "--count", "1"],
    "data prompts write": ["no.jsonl", "out.jsonl"],
    "data check": ["--data"],
}
"""A command -> words after which it must end with an error that somebody foresaw."""
NEEDED = {
    "completion": ["bash"],
    "data check": ["a"],
    "data convert classification": ["a", "b", "--by", "label"],
    "data convert clustering": ["a", "b", "--by", "label"],
    "data convert hover": ["a", "b", "--corpus", "c"],
}
"""Words that a parser wants."""
NOT_TRIED = {"doctor", "completion"} | {
    f"data convert {layout}"
    for layout in (
        "classification",
        "clustering",
        "sts",
        "nli",
        "squad",
        "dpr",
        "hotpotqa",
        "bioasq",
        "synthetic",
        "hover",
    )
}


def commands(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """Commands that have none below them, and their parsers."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return {name: parser}
    return {
        long: leaf
        for word, child in below[0].choices.items()
        for long, leaf in commands(child, f"{name} {word}".strip()).items()
    }


LEAVES = commands(cli.parser())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.file").touch()
    return tmp_path


def ends(capsys, *words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    close_logging()
    return status, *capsys.readouterr()


def test_every_command_is_tried():
    assert set(LEAVES) == set(BAD) | NOT_TRIED


@pytest.mark.parametrize("name", BAD)
def test_an_error_is_one_message_without_a_trace(capsys, here, name):
    words = [*name.split(), *BAD[name]]
    status, out, err = ends(capsys, *words)
    assert status in (2, 78) and out == "" and err.count("error: ") == 1 and "Traceback" not in err
    if status == 78:
        assert err.startswith("nvembed: error: ") and ends(capsys, "--quiet", *words) == (status, out, err)
        assert "Traceback" in ends(capsys, *words, "--debug")[2]


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in FIELDS])
def test_a_mistyped_option_is_guessed(capsys, name):
    status, out, err = ends(capsys, *name.split(), *(NEEDED.get(name) or BAD.get(name) or ["a", "b"]), "--qiet")
    assert status == 2 and out == "" and err.endswith("; did you mean --quiet?\n")


@pytest.mark.parametrize(("words", "meant"), [(["trian"], "train"), (["data", "chek"], "check")])
def test_a_mistyped_command_is_guessed(capsys, words, meant):
    assert ends(capsys, *words)[2].endswith(f"; did you mean {meant}?\n")


def test_mistyped_fields_are_guessed(tmp_path):
    (tmp_path / "run.yaml").write_text("run_dir: x\noptim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: optim has no field 'lrr'; did you mean lr\?"):
        read_run_config([str(tmp_path / "run.yaml")])
    with pytest.raises(ConfigError, match=r"--stepz 3; did you mean --steps\?"):
        read_run_config(["--stepz", "3"])


@pytest.mark.parametrize("name", [name for name, one in LEAVES.items() if "--json" in one._option_string_actions])
def test_json_writes_over_no_other_file(capsys, here, name):
    status, _, err = ends(capsys, *name.split(), "--json", "a.file")
    assert status == 2 and "names a file that ends in .json, or - for stdout, got 'a.file'" in err


def raises(error: BaseException):
    def run(arguments: list[str]) -> None:
        raise error

    return run


def test_what_nobody_foresaw_is_one_line_and_its_trace_is_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "_run", raises(KeyError("a\nb")))
    status, out, err = ends(capsys, "status", "x")
    (kept,) = tmp_path.iterdir()
    assert (status, out) == (70, "")
    assert err == f"nvembed: error: internal: KeyError: 'a\\nb' (its trace: {kept}, or again with --debug)\n"
    assert kept.read_text().startswith("Traceback")
    status, _, err = ends(capsys, "status", "x", "--debug")
    assert "Traceback" in err and err.endswith("nvembed: error: internal: KeyError: 'a\\nb'\n")
    monkeypatch.setenv("NVEMBED_DEBUG", "1")
    assert "Traceback" in ends(capsys, "status", "x")[2]


def test_control_c_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_run", raises(KeyboardInterrupt()))
    assert ends(capsys, "status", "x") == (130, "", "nvembed: interrupted\n")


@pytest.mark.parametrize("words", [["data", "plan", "run.yaml"], ["completion", "bash"]])
def test_a_reader_that_goes_away_is_no_error(capsys, inputs, monkeypatch, words):
    monkeypatch.chdir(inputs)
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(os.fdopen(write, "wb", buffering=16), write_through=True) as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A run of one step, its export, and all that commands read."""
    folder = runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    config = runs.write_config(runs.run_config(folder, folder / "run", steps=1, batch_size=4))
    assert config == folder / "run.yaml"
    assert main(["train", "run.yaml"]) == 0 and main(["export-hf", "run", "export"]) == 0
    close_logging()
    (folder / "a.py").write_text("def alpha():\n    return 'beta'\n")
    (folder / "pairs.jsonl").write_text('["alpha", "beta"]\n["gamma", "delta"]\n')
    patch.undo()
    return folder


RESULTS = {
    "status run": lambda found: found["state"] == "done",
    "doctor run.yaml": lambda found: found["found: torch"],
    "preflight run.yaml --run_dir other": lambda found: found["status"] == 0,
    "plan run.yaml --gpus 1,2 --device cpu": lambda found: len(found["stages"][0]["plans"]) == 2,
    "import-hf export imported": lambda found: found["num_tensors"] > 0,
    "export-hf run mean --format nv-embed": lambda found: found["output"] == "mean",
    "inspect run": lambda found: found,
    "evaluate export beir --max-length 32": lambda found: 0 <= found["ndcg_at_10"] <= 1,
    "search export a.py alpha --max-length 32": lambda found: found["hits"][0]["line"] == 1,
    "encode export a.py out --max-length 32": lambda found: found["texts"] == 2,
    "mine export train.jsonl mined --max-length 24 --method topk --negatives 1": lambda found: found,
    "data plan run.yaml": lambda found: found,
    "data check run.yaml --processes 1": lambda found: found,
    "data convert pairs pairs.jsonl converted.jsonl": lambda found: found["records written"] == 2,
    "data decontaminate train.jsonl clean.jsonl --against beir": lambda found: found,
    "data prompts brainstorm prompts.jsonl --count 2": lambda found: found,
    "data tokenizer mistral": lambda found: found == {"output": "mistral"},
}
"""A command on the inputs -> what is so of its JSON."""


@pytest.mark.parametrize("line", RESULTS)
def test_json_is_all_that_stdout_has(capsys, inputs, monkeypatch, line):
    monkeypatch.chdir(inputs)
    status, out, err = ends(capsys, *line.split(), "--json", "--quiet")
    assert status == 0 and err == "" and RESULTS[line](json.loads(out))


def test_a_file_of_json_is_beside_what_is_shown(capsys, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    status, out, _ = ends(capsys, "data", "plan", "run.yaml", "--json", "plan.json")
    assert status == 0 and "train.jsonl" in out and json.loads((inputs / "plan.json").read_text())


def test_colours_are_for_terminals_and_whoever_asks(capsys, monkeypatch):
    def shown() -> str:
        Tables().print("[red]red[/]")
        return capsys.readouterr().out

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert shown() == "red\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert shown() == "\x1b[31mred\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "red\n"


def test_completion_in_bash(capsys, tmp_path):
    (tmp_path / "nvembed").write_text(ends(capsys, "completion", "bash")[1])
    asked = ["nvembed se", "nvembed train --optim.l", "nvembed plan --step.way s", "nvembed data convert s"]
    script = """
source "$1"; shift
name=$(complete -p nvembed); name=${name##*-F }
for line; do
    COMP_WORDS=($line) COMP_LINE=$line COMP_POINT=${#line} COMP_CWORD=$(( $(wc -w <<< "$line") - 1 )) COMPREPLY=()
    ${name% *} nvembed "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[@]}"
done
"""
    command = ["bash", "-c", script, "-", tmp_path / "nvembed", *asked]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.splitlines() == ["search", "--optim.lr", "single", "sts squad synthetic"]


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_completion_for_other_shells_knows_fields(capsys, shell):
    assert "optim.lr" in ends(capsys, "completion", shell)[1]
