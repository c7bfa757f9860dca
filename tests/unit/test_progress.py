"""Progress on a terminal, in a file, on other ranks, and when nobody wants it."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from nvembed_mcore import progress as room
from nvembed_mcore.progress import progress, show_each


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """Without the codes that move and colour, and without padding."""
        return re.sub(r" +", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def screen(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(room, "console", Console(file=screen, force_terminal=True, width=100))
    return screen


def count_to(last, clock, seconds, **options):
    with progress("read", last, "files", **options) as shown:
        for done in range(1, last + 1):
            clock(seconds)
            shown.update(done, f"at {done}")


def test_a_line_every_ten_seconds_with_the_time_left(capsys, clock):
    count_to(12, clock, 4.0)
    assert capsys.readouterr() == (
        "",
        "read: 3/12 files  at 3  ETA 0:00:36\nread: 6/12 files  at 6  ETA 0:00:24\n"
        "read: 9/12 files  at 9  ETA 0:00:12\nread: 12/12 files  at 12\n",
    )


def test_what_is_short_says_nothing(capsys, clock):
    count_to(9, clock, 1.0)
    assert capsys.readouterr().err == ""


def test_what_a_whole_run_is_says_its_first_and_last(capsys, clock):
    count_to(9, clock, 1.0, eager=True)
    assert capsys.readouterr().err == "read: 1/9 files  at 1  ETA 0:00:08\nread: 9/9 files  at 9\n"


def test_the_log_has_the_lines_where_there_is_one(caplog, capsys, clock):
    caplog.set_level(logging.INFO, logger="nvembed_mcore")
    count_to(3, clock, 10.0)
    assert [record.getMessage() for record in caplog.records][-1] == "read: 3/3 files  at 3"
    assert capsys.readouterr().err == ""


def test_a_total_that_is_found_out_later(capsys, clock):
    with progress("load", None, "GB") as shown:
        clock(10.0)
        shown.update(0.5)
        clock(10.0)
        shown.update(1.0, total=2.0)
    assert capsys.readouterr().err == "load: 0.50 GB\nload: 1.00/2.00 GB  ETA 0:00:20\n"


@pytest.mark.parametrize(("name", "value"), [("NVEMBED_QUIET", "1"), ("RANK", "1")])
def test_quiet_and_other_ranks_say_nothing(monkeypatch, capsys, screen, clock, name, value):
    monkeypatch.setenv(name, value)
    count_to(3, clock, 10.0, eager=True)
    count_to(3, clock, 10.0, bar=False)
    assert capsys.readouterr() == ("", "") and screen.getvalue() == ""


def test_bars_on_a_terminal(capsys, screen):
    with progress("outer", 4, "steps", start=1, eager=True) as outer:
        outer.update(2, "loss 0.5")
        assert list(show_each("abc", "inner", "letters")) == ["a", "b", "c"]
        outer.update(3, "[not] markup")
    said = screen.text()
    for part in ("outer", "1/4 steps", "inner", "0/3 letters", "3/4 steps [not] markup"):
        assert part in said
    assert "inner" not in said.rstrip().rpartition("outer")[2] and capsys.readouterr() == ("", "")
    assert room._bars is None


def test_a_bar_of_a_part_goes_when_it_is_done(screen):
    assert list(show_each("abc", "inner", "letters")) == ["a", "b", "c"]
    assert "inner" in screen.text() and screen.getvalue().endswith("\x1b[2K")


def test_works_that_overlap_end_in_any_order(screen):
    first, second = progress("first", 2), progress("second", 2)
    shown = [one.__enter__() for one in (first, second)]
    first.__exit__(None, None, None)
    shown[1].update(1)
    second.__exit__(None, None, None)
    assert room._bars is None


def test_a_bar_ends_with_an_error(screen):
    with pytest.raises(KeyboardInterrupt), progress("outer", 4, eager=True) as shown:
        shown.update(1)
        raise KeyboardInterrupt
    assert room._bars is None and screen.getvalue().endswith("\x1b[?25h")


def test_results_stay_on_a_stdout_that_is_a_file(capsys, screen):
    with progress("outer", 1):
        print("a result")
    assert capsys.readouterr().out == "a result\n" and "a result" not in screen.getvalue()


def test_forced_colours_make_no_terminal_of_a_file(monkeypatch, capsys, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(room, "console", Console(stderr=True))
    count_to(1, clock, 10.0)
    assert capsys.readouterr().err == "read: 1/1 files  at 1\n"
