"""The HTML page: one self-contained file, in which nothing from a log is markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from explain.corpus import ANSWERED, ASKED, ASKED_NEXT, RULES, SHAPES, chat
from programmable_kv import explain_miss
from programmable_kv.explain.page import page
from programmable_kv.explain.report import MissReport

EMPTY = {"meta", "br"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"


class Checked(HTMLParser):
    """Collects tags and texts, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(report: MissReport) -> Checked:
    text = page(report)
    found = Checked(text)
    assert not found.open
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|srcset", text), (
        "the page needs nothing from elsewhere"
    )
    assert "prefers-color-scheme: dark" in text
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes), (tag, attributes)
    return found


def clocks(count: int = 4) -> MissReport:
    bodies = [
        chat(f"Now: 2026-06-09 15:0{n}\n{HOSTILE}\n{RULES}", *[ASKED, ANSWERED] * n, ASKED_NEXT) for n in range(count)
    ]
    return explain_miss(*bodies)


def test_the_page_has_a_bar_for_each_request_and_a_card_for_each_cause() -> None:
    report = clocks()
    found = checked(report)
    bars = [attributes for tag, attributes in found.tags if attributes.get("role") == "img"]
    cards = [attributes["id"] for tag, attributes in found.tags if tag == "article"]
    assert len(bars) == len(report.findings) == 4
    assert cards == ["cause-1"]
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert links == ["#cause-1"] * 3
    assert report.headline in found.text
    assert report.causes[0].fix in found.text
    for note in report.notes:
        assert note in found.text
    assert f"{report.findings[1].lost:,} recomputed" in str(bars[1]["title"])


def test_bars_are_drawn_to_one_scale() -> None:
    report = clocks()
    text = page(report)
    longest = max(finding.total or 0 for finding in report.findings)
    rows = re.findall(r'<div class="bar".*?>((?:<div.*?></div>)*)</div>', text)
    for finding, row in zip(report.findings, rows, strict=True):
        widths = {kind: float(width) for kind, width in re.findall(r'class="(\w+)" style="width:([\d.]+)%"', row)}
        assert sum(widths.values()) == pytest.approx(100 * (finding.total or 0) / longest, abs=0.01)
        assert widths.get("lost", 0) == pytest.approx(100 * (finding.lost or 0) / longest, abs=0.01)


def test_what_differs_is_marked() -> None:
    text = page(clocks(2))
    assert "<del>00</del>" in text
    assert "<ins>01</ins>" in text


def test_nothing_from_a_log_is_markup() -> None:
    body = chat(f"{HOSTILE} one", ASKED, model=HOSTILE)
    found = checked(explain_miss({**body, "model": HOSTILE}, {**chat(f"{HOSTILE} two", ASKED), "model": HOSTILE}))
    assert HOSTILE in found.text


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_shape_gives_a_whole_page(shape: object) -> None:
    checked(explain_miss(*shape.log))  # type: ignore[attr-defined]


def test_a_report_without_causes_and_a_long_one() -> None:
    assert "No prefix was lost" in checked(explain_miss(chat(RULES, ASKED), chat(RULES, ASKED))).text
    many = explain_miss(*[chat(f"Turn {n}\n{RULES}", ASKED) for n in range(450)])
    found = checked(many)
    assert sum(attributes.get("role") == "img" for _, attributes in found.tags) == 400
    assert "400 of 450 requests" in found.text
