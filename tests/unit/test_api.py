"""The names that `from nvembed_mcore import ...` gives: loaded when asked for, documented, typed."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nvembed_mcore
from nvembed_mcore import api, config
from nvembed_mcore.log import close_logging
from tests.helpers import pages, runs

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", nvembed_mcore.__all__)
def test_a_name_is_there_with_its_documentation(name):
    found = getattr(nvembed_mcore, name)
    assert inspect.getdoc(found) and len(inspect.getdoc(found)) > 20
    assert f"`{name}`" in (DOCS / "how-to" / "python-api.md").read_text("utf-8")
    if not name.endswith("Config"):  # those are in the reference of the configuration, made from the classes
        assert f"::: nvembed_mcore.{name}\n" in (DOCS / "reference" / "python.md").read_text("utf-8")


def test_names_are_those_of_their_rooms():
    classes = {one.__name__ for one in vars(config).values() if dataclasses.is_dataclass(one)} | {"ConfigError"}
    others = {name for name in vars(api) if not name.startswith("_")}
    assert sorted(classes | others) == nvembed_mcore.__all__
    assert set(nvembed_mcore.__all__) <= set(dir(nvembed_mcore))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        nvembed_mcore.trian  # noqa: B018


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As the tutorial leaves it, but small."""
    folder = runs.write_inputs(tmp_path_factory.mktemp("api"), with_words=True)
    (folder / "data").mkdir()
    (folder / "train.jsonl").rename(folder / "data" / "train.jsonl")
    (folder / "beir").rename(folder / "data" / "heldout")
    (folder / "sorting.py").write_text("def put_in_order(things):\n    return sorted(things)\n")
    run = runs.run_config(folder, folder / "run", eval=config.EvalConfig())
    run.data.datasets[0] = config.DatasetConfig(path=str(folder / "data" / "train.jsonl"), instruction="Find it")
    runs.write_config(run)
    return folder


def test_the_examples_of_the_page_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    found = [block for block in pages.blocks("docs/how-to/python-api.md") if block.language == "python"]
    assert len(found) == 3
    for block in found:
        exec(compile(block.text, block.page, "exec"), {})  # noqa: S102
    close_logging()
    out = capsys.readouterr().out
    assert "(2, 32)" in out and "sorting.py 1 " in out and out.endswith(" negatives\n")


def test_no_torch_before_it_is_needed():
    code = "import sys; from nvembed_mcore import RunConfig, ConfigError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
