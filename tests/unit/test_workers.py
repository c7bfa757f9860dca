"""Work over processes: order, laziness, errors."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from nvembed_mcore.data.workers import num_workers, ordered_map

STARTED = []


def note_start(word):
    STARTED.append(word)


def slow_square(number):
    """The earlier, the slower: results come out of order."""
    time.sleep(0.05 if number % 2 == 0 else 0)
    if number == 77:
        raise ValueError("no square of 77")
    return number * number, os.getpid(), list(STARTED)


def test_results_are_in_order_and_from_other_processes():
    found = list(ordered_map(slow_square, range(12), processes=2, start=note_start, start_arguments=("begun",)))
    assert [square for square, _, _ in found] == [number * number for number in range(12)]
    workers = {process for _, process, _ in found}
    assert len(workers) == 2 and os.getpid() not in workers
    assert all(started == ["begun"] for _, _, started in found)


def test_items_are_drawn_as_needed_and_errors_come_through():
    drawn = []

    def items():
        for number in [*range(4), 77, *range(100)]:
            drawn.append(number)
            yield number

    results = ordered_map(slow_square, items(), processes=2)
    assert next(results)[0] == 0
    assert len(drawn) < 12
    with pytest.raises(ValueError, match="no square of 77"):
        list(results)
    assert len(drawn) < 20


def test_one_item_is_worked_on_here():
    assert [process for _, process, _ in ordered_map(slow_square, [3])] == [os.getpid()]
    assert [process for _, process, _ in ordered_map(slow_square, [3, 5], processes=1)] == [os.getpid()] * 2
    assert list(ordered_map(slow_square, [])) == []


def test_workers_of_a_killed_process_end(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from nvembed_mcore.data.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    for _ in ordered_map(time.sleep, [0.01] * 100_000, processes=2):\n"
        "        print('begun', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert not alive


def test_a_core_each_up_to_a_limit(monkeypatch):
    for cores, workers in ((1, 1), (32, 32), (200, 32)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        assert num_workers() == workers
