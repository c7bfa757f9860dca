"""`nvembed report`: figures against the files, and folders that are damaged, empty, going on or malicious."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import yaml

from nvembed_mcore import goodput
from nvembed_mcore.cli import main
from nvembed_mcore.config import ConfigError
from nvembed_mcore.reporting import curves, page
from nvembed_mcore.reporting.curves import look_of, points_of, thinned
from nvembed_mcore.reporting.folder import read_runs
from nvembed_mcore.reporting.page import html_page
from nvembed_mcore.reporting.summary import differences, hours, results, summary, throughput, warnings
from tests.helpers import chromium

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
EVIL = "<script>document.title = 'x'</script>&\"'"


def attempt(number: int, state: str = "done", **changes):
    """Of a hundred seconds, 60 of them productive."""
    seconds = dict.fromkeys(goodput.BUCKETS, 0.0) | {"productive": 60.0, "restart": 40.0}
    start = "2026-01-01T00:00:00+00:00"
    record = dict(number=number, start=start, end=start, from_step=0, last_step=4, kept_step=4, saves=1, state=state)
    layout = {"tp": 2, "pp": 1, "cp": 1, "dp": 4, "chunks_per_stage": 1}
    record |= dict(seconds=seconds, host="node-1", world_size=8, layout=layout, peak_memory={"bytes": 3 * 10**9})
    return record | {"hardware": {"device": "NVIDIA H100 80GB HBM3", "cores": 96}} | changes


def line(step: int, loss: float, seconds: float = 2.0):
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-5,
        "real_tokens": 900,
        "padded_tokens": 1000,
        "tokens_per_second": 900 / seconds,
        "seconds": seconds,
        "seconds_embed": seconds / 2,
        "mfu": 0.4,
    }


LINES = [
    {"step": 0, "ndcg_at_10": 0.1},
    *[line(step, 4.0 / step) for step in (1, 2)],
    {"step": 2, "ndcg_at_10": 0.5, "nfcorpus/ndcg_at_10": 0.25},
    *[line(step, 4.0 / step, seconds=4.0) for step in (3, 4)],
    {"step": 4, "ndcg_at_10": 0.375},
]
CONFIG = {
    "run_dir": "x",
    "steps": 4,
    "optim": {"lr": 1e-5},
    "data": {"datasets": [{"path": "a.jsonl", "weight": None}]},
}
STATUS = dict(state="done", exit_status=0, step=4, steps=4, samples_seen=4, checkpoint_step=4, reason="", attempt=1)
STATUS |= dict(host="node-1", time="2026-01-01T00:00:00+00:00")


def write_run(folder: Path, *, config=CONFIG, lines=LINES, attempts=(), status=STATUS) -> str:
    """A run folder; what is None is left out, and a text stands as it is."""
    folder.mkdir(parents=True)
    record = {"attempts": list(attempts or [attempt(1)]), "versions": {"torch": "2.13.0"}, "commit": None}
    files = {
        "config.yaml": config if config is None or isinstance(config, str) else yaml.safe_dump(config),
        "metrics.jsonl": lines
        if lines is None or isinstance(lines, str)
        else "".join(json.dumps(one) + "\n" for one in lines),
        "run.json": attempts if attempts is None or isinstance(attempts, str) else json.dumps(record),
        "status.json": status if status is None or isinstance(status, str) else json.dumps(status),
    }
    for name, text in files.items():
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def test_figures_by_hand(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "a", attempts=[attempt(1, "killed"), attempt(2)])])
    assert run.notes == [] and warnings(run, NOW) == []
    found = results(run)
    assert (found["step"], found["steps"], found["loss_last"], found["loss_mean_of_end"]) == (4, 4, 1.0, 1.0)
    assert found["evaluations"]["ndcg_at_10"] == {
        **dict(first=0.1, first_step=0, best=0.5, best_step=2, last=0.375, last_step=4)
    }
    assert found["evaluations"]["nfcorpus/ndcg_at_10"]["last_step"] == 2
    speed = throughput(run)
    assert speed.pop("phases") == {"embed": 0.5, "rest": 0.5}
    assert speed == {
        "tokens_per_second": 337.5,
        "tokens_per_second_per_process": 337.5 / 8,
        "seconds_median": 3.0,
        "seconds_p95": 4.0,
        "pad_fraction": pytest.approx(0.1),
        "mfu": 0.4,
        "training_hours": 12 / 3600,
    }
    time = summary([run], NOW)["runs"][0]["time"]
    assert (time["goodput"], time["wall_seconds"], time["ends"]) == (0.6, 200.0, ["killed", "done"])


def test_a_line_of_every_third_step_stands_for_three(tmp_path):
    lines = [line(step, 1.0, seconds=6.0) for step in (3, 6, 9)] + [{"step": 9, "ndcg_at_10": 0.5}]
    (run,) = read_runs([write_run(tmp_path / "a", lines=lines)])
    np.testing.assert_allclose(hours(run) * 3600, [18, 36, 54])
    assert points_of("ndcg_at_10", run, 0).hours.tolist() == [54 / 3600]
    assert points_of("temperature", run, 0) is None


def test_only_what_differs(tmp_path):
    one = CONFIG | {"steps": 4.0, "run_dir": "y", "extra": None}
    other = CONFIG | {"optim": {"lr": 1e-4}, "data": {"datasets": [{"path": "a.jsonl", "weight": 2.0}, {"path": "b"}]}}
    runs = read_runs([write_run(tmp_path / str(i), config=tree) for i, tree in enumerate([CONFIG, one, other, None])])
    found = differences(runs)
    assert list(found) == ["data.datasets.0.weight", "optim.lr", "steps", "extra", "data.datasets.1.path"]
    as_json = summary(runs, NOW)["differences"]
    assert as_json["optim.lr"] == {"0": 1e-5, "1": 1e-5, "2": 1e-4}
    assert as_json["extra"] == {"1": None} and as_json["data.datasets.1.path"] == {"2": "b"}
    cells = re.findall("<tr><td>steps</td>(.*?)</tr>", "".join(page._differences(runs)))
    assert re.findall(">([^<]+)<", cells[0]) == ["4", "4.0", "4", "–"]


def test_many_lines_become_means_of_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "MOST_POINTS", 5)
    (run,) = read_runs([write_run(tmp_path / "a", lines=[line(step, float(step)) for step in range(1, 11)])])
    some = thinned(points_of("loss", run, 0))
    assert some.steps.tolist() == [2, 4, 6, 8, 10] and some.values.tolist() == [1.5, 3.5, 5.5, 7.5, 9.5]


def test_runs_look_different():
    assert len({look_of(run) for run in range(24)}) == 24


def test_names_are_as_long_as_it_takes(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a/stage1", "b/stage1", "b/stage2")]
    assert [run.name for run in read_runs(folders)] == ["a/stage1", "b/stage1", "b/stage2"]
    assert [run.name for run in read_runs(folders[1:])] == ["stage1", "stage2"]
    os.symlink(folders[0], tmp_path / "link")
    with pytest.raises(ConfigError, match="one run is named 2 times: .*stage1, .*link"):
        read_runs([folders[0], str(tmp_path / "link")])


def test_folders_that_are_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "empty" / "metrics.jsonl")
    for folder, words in (("missing", "no run folder at"), ("empty", "holds no run: none of config.yaml, metrics")):
        assert main(["report", str(tmp_path / folder), "--output", str(tmp_path / "page.html")]) == 78
        assert words in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


DAMAGED = {
    "config": ["[1]", "a: [", "&a [*a]", "? {a: 1}\n: 2", "\x00", "a: " + "[" * 3000, "x: &a [1]\n" + "y: *b"],
    "lines": ["nonsense\n", '{"loss": 1.0}\n', '{"step": 1, "loss": "x"}\n', '{"step": 1, "loss": NaN}\n']
    + ['{"step": 1.5, "loss": 1}\n', '{"step": 1, "loss": 1e999}\n', '{"step": -1, "loss": 1}\n', '{"step": true}\n'],
    "attempts": ["[]", "{}", '{"attempts": [{}]}', '{"attempts": 1}', "[" * 3000]
    + [json.dumps({"attempts": [attempt(1) | change]}) for change in ({"seconds": {}}, {"layout": 5})]
    + [json.dumps({"attempts": [attempt(1, end="soon")]}), json.dumps({"attempts": [attempt(1, world_size="x")]})],
    "status": ["{}", "[]", "7", json.dumps(STATUS | {"step": None}), json.dumps(STATUS | {"more": 1})],
}
FILES = {"config": "config.yaml", "lines": "metrics.jsonl", "attempts": "run.json", "status": "status.json"}


def test_what_is_damaged_or_missing_is_a_note_and_the_rest_is_shown(tmp_path):
    folders, expected = [], []
    for part, texts in DAMAGED.items():
        for text in [None, *texts]:
            folders.append(write_run(tmp_path / f"run-{len(folders)}", **{part: text}))
            expected.append((FILES[part], "is missing" if text is None else "cannot be read: "))
    runs = read_runs(folders)
    for run, (file, words) in zip(runs, expected, strict=True):
        (note,) = run.notes
        assert re.match(rf"{file} {words}\S*", note) and (words == "is missing" or len(note) > 40), (run.name, note)
        assert str(tmp_path) not in note or file == "config.yaml"
        summary([run], NOW)
    text = html_page([runs[0], runs[9], runs[18], runs[-1]], NOW)
    for run in (runs[0], runs[9], runs[18], runs[-1]):
        assert f'<span class="name">{run.name}</span>' in text
    assert text.count("cannot be read") + text.count("is missing") == 4


def test_a_configuration_that_unfolds_without_end_is_not_read(tmp_path):
    levels = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 60)]
    (run,) = read_runs([write_run(tmp_path / "a", config="\n".join(levels))])
    assert run.notes == ["config.yaml cannot be read: it has more than 10,000 fields"] and run.fields == {}


def test_what_a_run_is_at_is_told(tmp_path):
    cases = {
        "going": (STATUS | {"state": "running", "step": 2, "exit_status": None}, "2 of 4; .* it may still go on"),
        "silent": (
            STATUS | {"state": "running", "step": 2, "exit_status": None},
            "1 day, 0:00:00 ago .* probably died",
        ),
        "failed": (STATUS | {"state": "nonfinite", "step": 3, "reason": EVIL}, "ended as nonfinite at step 3 of 4 "),
        "told": (STATUS | {"step": 3}, "stopped as it was told to at step 3 of 4"),
    }
    for name, (status, words) in cases.items():
        (run,) = read_runs([write_run(tmp_path / name, status=status)])
        age = 86400 if name == "silent" else 5
        for file in (tmp_path / name).iterdir():
            os.utime(file, (NOW.timestamp() - age,) * 2)
        (run,) = read_runs([str(tmp_path / name)])
        (note,) = warnings(run, NOW)
        assert re.search(words, note), note


def test_nothing_of_a_run_is_markup(tmp_path):
    tree = CONFIG | {"seed": EVIL, EVIL: 1}
    changes = dict(state=EVIL, host=EVIL, layout={EVIL: EVIL}, hardware={"device": EVIL})
    lines = [*LINES, {"step": 4, EVIL: 0.5, "\ud800": 0.25}, line(5, 1.0) | {f"more {EVIL}": 1.0}]
    folder = tmp_path / EVIL.replace("/", "") / "run"
    evil = write_run(
        folder,
        config=tree,
        lines=lines,
        attempts=[attempt(1, **changes)],
        status=STATUS | {"state": EVIL, "reason": EVIL},
    )
    text = html_page(read_runs([evil, write_run(tmp_path / "b" / "run")]), NOW)
    scripts = re.findall("<script", text)
    assert len(scripts) == 1 and "&lt;script&gt;" in text and "&lt;script>" not in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text) and "@import" not in text and "url(h" not in text


COMMAND = """
import sys
from nvembed_mcore.cli import main
assert main(sys.argv[1:]) == 0
assert not {"torch", "megatron", "transformers", "wandb"} & sys.modules.keys()
"""


def test_the_command_writes_and_says_and_needs_no_torch(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b [red]")]
    output = ["--output", str(tmp_path / "out" / "page.html"), "--json", str(tmp_path / "all.json")]
    command = [sys.executable, "-c", COMMAND, "report", *folders, *output]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "b [red]" in done.stdout and "0.5000 at 2" in done.stdout and "4 of 4" in done.stdout
    assert [one["name"] for one in json.loads((tmp_path / "all.json").read_text())["runs"]] == ["a", "b [red]"]
    assert "<h1>2 runs: a, b [red]</h1>" in (tmp_path / "out" / "page.html").read_text(encoding="utf-8")


LOOK = """(() => {
  const plots = [...document.querySelectorAll(".by-step .plot")];
  plots[0].focus();
  plots[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
  const tip = [...plots[0].querySelectorAll(".tip div")].map((one) => one.textContent);
  const isSeen = (one) => one.checkVisibility() && getComputedStyle(one).display !== "none";
  const seen = (selector) => [...document.querySelectorAll(selector)].filter(isSeen).length;
  const shown = [seen(".by-step"), seen(".by-hour")];
  document.getElementById("by-hour").click();
  const changed = [seen(".by-step"), seen(".by-hour")];
  document.getElementById("run1").click();
  return {
    curves: plots.map((one) => JSON.parse(one.dataset.curves)),
    titles: [...document.querySelectorAll("figcaption")].map((one) => one.textContent),
    lines: plots.map((one) => [...one.querySelectorAll("path[stroke-linejoin], g[class^=r] path")].length),
    tip, shown, changed, hidden: seen(".by-hour .r1"), left: seen(".by-hour .r0"),
    requests: performance.getEntriesByType("resource").map((one) => one.name),
    heading: document.querySelector("h1").textContent,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
})()"""


def test_a_browser_shows_it(tmp_path):
    """The script shows the numbers of the files, the page asks for nothing, and what looks like markup is text."""
    name = "b<script>x</script>".replace("/", "")
    longer = [*LINES, line(5, 0.5)]
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / name, lines=longer)])
    (tmp_path / "page.html").write_text(html_page(runs, NOW), encoding="utf-8")
    seen, errors = chromium.look(tmp_path / "page.html", tmp_path, LOOK)
    assert errors == [] and seen["requests"] == [] and seen["heading"] == f"2 runs: a, {name}" and seen["wide"] == 0
    assert seen["titles"][:3] == ["Contrastive loss", "Evaluation: ndcg_at_10", "Evaluation: nfcorpus/ndcg_at_10"]
    assert seen["curves"][0]["curves"] == [
        [0, [1, 2, 3, 4], [4, 2, 1.33333, 1]],
        [1, [1, 2, 3, 4, 5], [4, 2, 1.33333, 1, 0.5]],
    ]
    assert seen["curves"][1]["curves"][0] == [0, [0, 2, 4], [0.1, 0.5, 0.375]]
    assert min(seen["lines"]) >= 2 and len(seen["lines"]) == len(seen["titles"])
    assert seen["tip"] == ["step 4", "a: 1", f"{name}: 1"]
    count = len(seen["titles"])
    assert seen["shown"] == [count, 0] and seen["changed"] == [0, count]
    assert seen["hidden"] == 0 and seen["left"] >= count
