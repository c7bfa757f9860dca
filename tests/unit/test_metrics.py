"""The table of peaks, rates on real tokens, phases."""

from __future__ import annotations

import pytest
import torch

from nvembed_mcore.metrics import PhaseTimer, StepMetrics, device_peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA GB200", torch.bfloat16, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_device_peak(name, dtype, peak):
    assert device_peak_flops(name, dtype) == peak


def step_metrics(**values) -> StepMetrics:
    plain = {
        "step": 3,
        "loss": 1.5,
        "grad_norm": 0.25,
        "lr": 1e-3,
        "real_tokens": 900,
        "padded_tokens": 1000,
        "texts": 9,
        "seconds": {"embed": 0.5, "total": 2.0},
    }
    return StepMetrics(**(plain | values))


def test_rates_count_real_tokens_only():
    metrics = step_metrics(flops=4e12, peak_flops=8e12)
    assert metrics.tokens_per_second == 450.0 and metrics.padded_tokens_per_second == 500.0
    assert metrics.pad_fraction == pytest.approx(0.1)
    assert metrics.mfu == 0.25
    line = metrics.as_dict()
    assert next(iter(line)) == "step"
    assert line["seconds"] == 2.0 and line["seconds_embed"] == 0.5 and line["mfu"] == 0.25
    assert line["tokens_per_second"] == 450.0 and line["padded_tokens_per_second"] == 500.0
    assert all(isinstance(value, (int, float)) for value in line.values())


def test_what_is_not_known_is_left_out():
    line = step_metrics(flops=4e12).as_dict()
    assert line["flops"] == 4e12 and "mfu" not in line
    assert not [name for name in line if name.startswith("communication")]
    line = step_metrics(communication={"data": 0.25, "data and context": 0.5}).as_dict()
    assert line["communication_seconds"] == 0.75 and line["communication_seconds_data"] == 0.25
    assert line["communication_seconds_data_and_context"] == 0.5


def test_phases_add_up_and_wait_for_the_device(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def queue_ends():
        now[0] += 0.25

    def work(seconds: float) -> None:
        now[0] += seconds

    timer = PhaseTimer(queue_ends)
    for _ in range(2):
        with timer("embed"):
            work(1.0)
    with timer("loss"):
        work(8.0)
    work(16.0)
    # What was queued before a phase is not its own; what it queued is. Two waits a phase enter the total.
    assert timer.lap() == {"embed": 2.5, "loss": 8.25, "total": 2.0 + 8.0 + 16.0 + 6 * 0.25}
    assert timer.lap() == {"total": 0.0}


def test_a_phase_that_raises_leaves_the_timer_usable():
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer("embed"):
        raise KeyError
    with timer("loss"):
        pass
    assert set(timer.lap()) == {"embed", "loss", "total"}
