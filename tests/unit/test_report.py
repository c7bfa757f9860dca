"""The HTML page of reports: escaped, self-contained, and its histograms hold the shares of the values."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree  # noqa: S405 (our own page)
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes

from nvembed_mcore import report


class Tags(HTMLParser):
    """All tags, those that are open, and text by the innermost tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.text.append((self.open[-1], data.strip()))


EVIL = "<script>alert('$x & y$')</script>"


def test_everything_is_escaped_and_nothing_is_loaded():
    parts = [
        EVIL,
        report.table([EVIL, "n"], [[EVIL, 1234567], [report.marked(EVIL, "bad"), None], ["x", 0.12345]]),
        report.verbatim(EVIL),
        report.histogram({EVIL: np.array([1, 2]), "none": np.array([])}, EVIL, EVIL, marks=[1.5]),
    ]
    tags = Tags(report.page(EVIL, [(EVIL, parts), ("", ["last"])]))
    assert not tags.open
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    assert not [a for _, attributes in tags.seen for a in attributes if a in ("src", "href") or a.startswith("on")]
    where = [tag for tag, text in tags.text if EVIL in text]
    assert where == ["title", "h1", "h2", "p", "th", "td", "span", "pre", "figcaption", "span", "text"]
    assert ("td", "1,234,567") in tags.text and ("td", "0.123") in tags.text and ("span", "none (none)") in tags.text
    assert sum(tag == "h2" for tag, _ in tags.seen) == 1


def test_the_picture_has_the_colour_of_the_text_and_the_same_bytes():
    first, second = (report.histogram({"a": np.arange(9.0)}, "t", "x") for _ in range(2))
    assert first == second
    svg = first[first.index("<svg") : first.index("</svg>") + 6]
    assert "currentColor" in svg and "#010203" not in svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_histogram_holds_every_value_once(monkeypatch, log, whole):
    drawn = []
    stairs = Axes.stairs
    monkeypatch.setattr(Axes, "stairs", lambda self, *a, **kw: (drawn.append(a), stairs(self, *a, **kw))[1])
    values = np.random.default_rng(0).lognormal(2, 1, 500) + 1
    values = values.astype(int) if whole else values
    distinct, often = np.unique(values, return_counts=True)
    report.histogram({"plain": values, "counted": distinct}, "t", "x", counts={"counted": often}, bins=20, log=log)
    (plain, edges), _, (counted, _), _ = drawn
    assert len(edges) <= 21 and np.array_equal(plain, counted)
    seen = np.log(edges[1:] / edges[:-1]) if log else np.diff(edges)
    shares = plain * seen * 20 / seen.sum()
    assert shares.sum() == pytest.approx(1)
    assert log and whole or np.allclose(shares, plain)
    for share, low, high in zip(shares, edges[:-1], edges[1:], strict=True):
        assert share * 500 == pytest.approx(sum(low <= value < high for value in values))
    ratios = edges[1:] / edges[:-1]
    assert not log or whole or np.allclose(ratios, ratios[0])


@pytest.mark.parametrize("log", [False, True])
def test_values_that_are_all_alike(log):
    assert "<svg" in report.histogram({"a": np.array([7, 7])}, "t", "x", log=log)


def test_numbers_stand_to_the_right_below_their_heading():
    text = report.table(["a", "b", "c"], [["x", -1.5, "12.5%"], ["1x", None, "-"]])
    assert text.splitlines()[1:3] == [
        '<tr><th>a</th><th class="n">b</th><th class="n">c</th></tr>',
        '<tr><td>x</td><td class="n">-1.500</td><td class="n">12.5%</td></tr>',
    ]
    assert report.table(["a"], []) == "<table>\n<tr><th>a</th></tr>\n</table>"


def test_save_leaves_nothing_half_written(tmp_path):
    report.save(tmp_path / "new" / "r.html", "é")
    assert (tmp_path / "new" / "r.html").read_text(encoding="utf-8") == "é"
    with pytest.raises(UnicodeEncodeError):
        report.save(tmp_path / "new" / "r.html", "x\ud800")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.html"]
    assert (tmp_path / "new" / "r.html").read_text(encoding="utf-8") == "é"
