"""Renders the report as one HTML file without network access or scripts, with a light and a dark theme."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape

from programmable_kv.explain.report import MissCause, MissReport, RequestFinding

_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --ink: #1c1d1f; --soft: #66696e; --line: #e2e2de; --card: #fff;
  --hit: #4f9d86; --lost: #d2603a; --new: #c9ccd1; --was: #fbe3da; --is: #dcefe8; }
@media (prefers-color-scheme: dark) { :root { --ground: #17181a; --ink: #e7e7e4; --soft: #9a9da3; --line: #2e3033;
  --card: #1e2022; --hit: #5db79b; --lost: #e8784f; --new: #4a4d52; --was: #4a2a1f; --is: #1d3b33; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { margin: .4rem 0; } .soft, small { color: var(--soft); }
.legend span { display: inline-block; margin-right: 1.25rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; vertical-align: -1px; }
.hit { background: var(--hit); } .lost { background: var(--lost); } .new { background: var(--new); }
.whole { display: flex; height: 1.5rem; border-radius: 4px; overflow: hidden; margin: .75rem 0; }
.log { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px .75rem; align-items: center;
  font-size: .82rem; max-height: 34rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 8px; padding: .75rem;
  background: var(--card); }
.log .bar { display: flex; height: .8rem; border-radius: 2px; overflow: hidden; }
.log a { color: inherit; text-decoration: none; } .log .missed { color: var(--lost); font-weight: 600; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.25rem; margin: 0 0 1rem; background: var(--card); }
article header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .25rem 1rem; }
article h3 { margin: 0; font-size: 1.05rem; } .cost { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0; padding: .6rem .75rem; border-radius: 6px;
  border: 1px solid var(--line); font: .82rem/1.5 ui-monospace, monospace; }
del { text-decoration: none; background: var(--was); border-radius: 2px; } ins { text-decoration: none; background: var(--is);
  border-radius: 2px; }
.fix { border-left: 3px solid var(--hit); padding-left: .75rem; margin-top: .75rem; }
li { margin: .2rem 0; }
"""
_WORD = re.compile(r"\w+|\W")
_MOST_ROWS = 400
_MOST_CAUSES = 50


def page(report: MissReport) -> str:
    """The report as HTML. All text from a log is escaped."""
    by_number = {finding.number: finding for finding in report.findings}
    causes = "".join(
        _cause(rank, cause, by_number[cause.worst], report)
        for rank, cause in enumerate(report.causes[:_MOST_CAUSES], start=1)
    )
    more = len(report.causes) - _MOST_CAUSES
    causes += f"<p>{more} more causes are in the JSON report.</p>" if more > 0 else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*report.notes, *report.skipped[:20]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Why the prefix cache missed</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(report.headline)}</h1>{_whole(report)}"
        + (f'<h2>Causes, most expensive first</h2><section id="causes">{causes}</section>' if causes else "")
        + f'<h2>Requests</h2>{_log(report)}<h2>About these numbers</h2><ul class="soft">{notes}</ul>'
        "</main></body></html>\n"
    )


def _whole(report: MissReport) -> str:
    new = max(0, report.total - report.hit - report.lost)
    most = "at most " if report.at_most else ""
    amounts = (
        ("hit", "from the cache", report.hit),
        ("lost", f"{most}recomputed", report.lost),
        ("new", "new", new),
    )
    legend = "".join(
        f'<span><i class="{kind}"></i>{words}: {amount:,} {report.unit}</span>' for kind, words, amount in amounts
    )
    return f'<div class="whole">{_segments(report.hit, report.lost, new, report.total)}</div><p class="legend">{legend}</p>'


def _segments(hit: int, lost: int, new: int, scale: int) -> str:
    return "".join(
        f'<div class="{kind}" style="width:{100 * amount / scale:.3f}%"></div>'
        for kind, amount in (("hit", hit), ("lost", lost), ("new", new))
        if amount > 0 and scale > 0
    )


def _log(report: MissReport) -> str:
    """One bar for each request, all on one scale. Of a long log, only the requests that lost most."""
    shown = list(report.findings)
    left = ""
    if len(shown) > _MOST_ROWS:
        kept = sorted(shown, key=lambda finding: (-(finding.lost or 0), finding.number))[:_MOST_ROWS]
        shown = sorted(kept, key=lambda finding: finding.number)
        left = f'<p class="soft">The {_MOST_ROWS} of {len(report.findings):,} requests with the largest losses.</p>'
    scale = max((finding.total or 0 for finding in shown), default=0)
    return f'{left}<div class="log">{"".join(_row(finding, scale, report) for finding in shown)}</div>'


def _row(finding: RequestFinding, scale: int, report: MissReport) -> str:
    total, hit, lost = finding.total or 0, finding.hit or 0, finding.lost or 0
    rank = next((i for i, cause in enumerate(report.causes, start=1) if finding.number in cause.requests), None)
    what = escape(finding.cause)
    if finding.missed and rank is not None and rank <= _MOST_CAUSES:
        what = f'<a class="missed" href="#cause-{rank}">{what}</a>'
    told = (
        "not counted"
        if finding.total is None
        else f"{total:,} {report.unit}: {hit:,} from the cache, {lost:,} recomputed"
    )
    title = escape(f"{finding.source}, {finding.model or 'no model'}: {told}", quote=True)
    bar = _segments(hit, lost, max(0, total - hit - lost), scale)
    drawn = f'<div class="bar" role="img" aria-label="{title}" title="{title}">{bar}</div>'
    return f"<span>{finding.number}</span>{drawn}<span>{what}</span>"


def _cause(rank: int, cause: MissCause, worst: RequestFinding, report: MissReport) -> str:
    cost = f"{cause.share:.1%} &middot; {cause.lost:,} {report.unit}"
    if cause.money is not None:
        cost += f" &middot; {escape(report.currency)} {cause.money:,.4f}"
    count = "1 request" if len(cause.requests) == 1 else f"{len(cause.requests):,} requests"
    at = [f"byte {worst.byte:,}"] if worst.byte is not None and worst.path else []
    at += [f"token {worst.token:,}"] if worst.token is not None and worst.path else []
    path = f"<code>{escape(worst.path)}</code>" if worst.path else escape(cause.place)
    where = (
        f"{path}{', at ' + ', '.join(at) if at else ''}: {escape(worst.source)}, after request {worst.compared_with}"
    )
    behind = f'<p class="soft">Further differences: {escape("; ".join(worst.behind))}.</p>' if worst.behind else ""
    fix = f'<p class="fix">{escape(cause.fix)}</p>' if cause.fix else ""
    return (
        f'<article id="cause-{rank}"><header><h3>{rank}. {escape(cause.name)}, {escape(cause.place)}</h3>'
        f'<span class="cost">{cost}</span></header><p>{escape(cause.what)} <span class="soft">{count}. {where}.</span></p>'
        f"{_diff(worst.before, worst.after)}{behind}{fix}</article>"
    )


def _diff(before: str, after: str) -> str:
    """The two excerpts with the differences marked."""
    if not before and not after:
        return ""
    if not before or not after:
        mark = "ins" if after else "del"
        return f"<pre><{mark}>{escape(after or before)}</{mark}></pre>"
    was, now = [], []
    words, words_after = _WORD.findall(before), _WORD.findall(after)
    for tag, a, a2, b, b2 in SequenceMatcher(None, words, words_after, autojunk=False).get_opcodes():
        one, other = escape("".join(words[a:a2])), escape("".join(words_after[b:b2]))
        was.append(one if tag == "equal" or not one else f"<del>{one}</del>")
        now.append(other if tag == "equal" or not other else f"<ins>{other}</ins>")
    return f"<pre>{''.join(was)}\n{''.join(now)}</pre>"
