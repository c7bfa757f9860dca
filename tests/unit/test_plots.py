"""The picture of a run: what is drawn is what the files say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from nvembed_mcore.evaluation.plots import plot_run, smooth


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def stages(tmp_path):
    first = [{"step": 0, "ndcg_at_10": 0.25}, *({"step": n, "loss": 9.0 - n} for n in range(1, 5))]
    second = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "ndcg_at_10": 0.5}]
    return [write(tmp_path / "first.jsonl", first), write(tmp_path / "second.jsonl", second)]


def test_stages_follow_each_other(stages, tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    plot_run(stages, tmp_path / "run.png", {"BM25": 0.75})
    loss_axes, metric_axes = figures[0].axes
    raw = [line.get_xydata().tolist() for line in loss_axes.lines if line.get_alpha()]
    assert raw == [[[1, 8], [2, 7], [3, 6], [4, 5]], [[5, 3], [6, 2]]]
    assert metric_axes.lines[0].get_xydata().tolist() == [[0, 0.25], [6, 0.5]]
    assert metric_axes.lines[1].get_ydata()[0] == 0.75
    assert {"BM25 0.750", "stage 1", "stage 2", "0.500"} <= {text.get_text() for text in metric_axes.texts}
    assert imread(tmp_path / "run.png").shape[:2] == (450, 1000)


def test_a_run_without_evaluations_is_drawn(tmp_path):
    plot_run([write(tmp_path / "a.jsonl", [{"step": 1, "loss": 1.0}])], tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_smoothing_is_a_moving_mean():
    values = np.arange(200.0) ** 2
    means = smooth(values)
    assert means[100] == pytest.approx(values[90:111].mean()) and means[0] == pytest.approx(values[:11].mean())
    assert means[-1] == pytest.approx(values[-11:].mean()) and len(means) == 200


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        plot_run([], tmp_path / "run.png")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no line with a loss"):
        plot_run([write(tmp_path / "empty.jsonl", [{"step": 0, "ndcg_at_10": 0.5}])], tmp_path / "run.png")
