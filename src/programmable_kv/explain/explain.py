"""`explain_miss`: compares every request of a log with earlier ones, and reports why a prefix cache missed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from programmable_kv.arguments import require_count
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.explain.case import Case
from programmable_kv.explain.classes import CauseClass, classify, classify_behind
from programmable_kv.explain.difference import Difference, changes_behind, common_bytes
from programmable_kv.explain.excerpts import excerpts
from programmable_kv.explain.history import History
from programmable_kv.explain.logs import LogReader
from programmable_kv.explain.measure import Basis, Meter, basis_of
from programmable_kv.explain.notes import notes_of
from programmable_kv.explain.pieces import Request
from programmable_kv.explain.prices import Price, PriceTable, read_prices
from programmable_kv.explain.report import MissCause, MissReport, RequestFinding
from programmable_kv.explain.tokens import TokenCounter
from programmable_kv.explain.upstream import Unread, classify_unread, was_unread

FIRST = CauseClass("first request", "No earlier request exists.", "", lambda _: False, lost=False)
TEMPLATE = CauseClass(
    "chat template",
    "The client only appended messages, but the chat template now renders the earlier ones differently.",
    "Look for the template's switch (`preserve_thinking`, `clear_thinking`). If the template inserts the date, set a constant "
    "one with `chat_template_kwargs`.",
    lambda _: False,
)
WHOLE_REQUEST = "the whole request"


def explain_miss(
    *logs: str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    block_size: int = 16,
    prices: str | Path | None = None,
    skip_bad_lines: bool = False,
    show_text: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MissReport:
    """Explain why a prefix cache missed: where each request first differs from earlier ones, why, and what that cost.

    This function sends nothing anywhere and loads no model. Requests are Chat Completions, Responses, Messages or
    Completions bodies.

    Args:
        logs: the requests in the order in which they were sent: paths of files (one request as JSON, a log with one
            request on each line, or a trace of hashed blocks; "-" is standard input), or requests as mappings.
        model: count in the tokens of this model: "embedded", a Hub id, a folder or a GGUF file. Only its tokenizer is
            loaded.
        block_size: tokens in a block of the engine's cache (16 in vLLM). A block with any difference is recomputed as a
            whole.
        prices: a JSON file with prices, instead of the table in the package.
        skip_bad_lines: skip lines that cannot be read and report them, instead of raising an error.
        show_text: keep excerpts of prompts in the report.
        progress: called with the number of requests examined and the total number.

    Raises:
        InvalidRequestError: a log or the table of prices cannot be read, or a line of a log is not a request.
        InvalidArgumentError: no log is given, one is neither a path nor a mapping, or the block size is less than 1.
        ModelUnavailableError: the model's tokenizer cannot be loaded.
        TemplateError: the model's tokenizer has no chat template, or the template refuses a request.
    """
    require_count(block_size, "block_size", least=1)
    if not logs:
        raise InvalidArgumentError("explain_miss takes at least one log or request")
    table = read_prices(None if prices is None else Path(prices))
    reader = LogReader(skip_bad_lines)
    for number, log in enumerate(logs, start=1):
        if isinstance(log, Mapping):
            reader.add(log, f"request {number}")
        elif isinstance(log, str | Path):
            reader.read(Path(log))
        else:
            raise InvalidArgumentError(f"a log must be a path or a mapping (one request), got {type(log).__name__}")
    counter = None if model is None else TokenCounter.of(model)
    report = explain_requests(reader.requests, table, counter=counter, block_size=block_size, progress=progress)
    report = replace(report, skipped=tuple(reader.skipped))
    return report if show_text else without_text(report)


def explain_requests(
    requests: Sequence[Request],
    table: PriceTable,
    *,
    counter: TokenCounter | None = None,
    block_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> MissReport:
    """The report on parsed requests. Each is compared with the requests before it."""
    meter = Meter(basis_of(requests, counter), counter, block_size)
    history = History()
    causes: dict[int, CauseClass] = {}
    findings = []
    for done, request in enumerate(requests, start=1):
        finding, causes[request.number] = finding_of(request, history, meter, table)
        findings.append(finding)
        history.add(request)
        if progress is not None:
            progress(done, len(requests))
    counted = [finding for finding in findings if finding.total is not None]
    total = sum(finding.total or 0 for finding in counted)
    paid = [finding.money for finding in findings if finding.money is not None]
    return MissReport(
        meter.basis.unit,
        meter.basis.value,
        meter.at_most,
        total,
        sum(finding.hit or 0 for finding in counted),
        sum(finding.lost or 0 for finding in counted),
        sum(paid) if paid else None,
        table.currency,
        tuple(findings),
        _ranked(findings, causes, total),
        notes_of(requests, findings, meter, table),
    )


def without_text(report: MissReport) -> MissReport:
    """The report without any text of prompts."""
    hidden = [replace(finding, line="", before="", after="") for finding in report.findings]
    return replace(report, findings=tuple(hidden), causes=tuple(replace(cause, line="") for cause in report.causes))


def finding_of(
    request: Request, history: History, meter: Meter, table: PriceTable
) -> tuple[RequestFinding, CauseClass]:
    """The finding for one request after those in the history, and its class. Does not change the history."""
    nearest = history.nearest(request)
    found = _compared(history, request, nearest)
    case = None if found is None else Case(found, found.change)
    row = FIRST if case is None else classify(case)
    amounts = meter.amounts(request, nearest, found, missed=row.lost)
    shown = case is not None and row.lost
    if found is not None and amounts is not None and not row.lost:
        row, unread = _unexplained(row, found, meter, table)
        amounts = replace(amounts, lost=min(unread, amounts.total - amounts.hit))
    lost = amounts.lost if amounts is not None else None
    missed = row.lost and (lost is None or lost > 0)
    before, after = excerpts(case, row.key) if case is not None and shown else ("", "")
    place, path = _place(case, row) if shown else ("", "")
    price = _price(request, meter, table)
    return RequestFinding(
        request.number,
        request.source,
        request.model,
        request.protocol,
        row.name,
        missed,
        None if found is None else found.earlier.number,
        place,
        path,
        None if found is None or row.key or request.block_tokens else found.equal_bytes,
        _token(found, meter) if found is not None and not row.key else None,
        amounts.total if amounts is not None else None,
        amounts.hit if amounts is not None else None,
        lost,
        _money(lost, request, price, table) if missed else None,
        case.template if case is not None and shown and case.shown and not row.key else "",
        before,
        after,
        _behind(found) if found is not None and shown else (),
        _seconds(found),
    ), row


def _place(case: Case | None, row: CauseClass) -> tuple[str, str]:
    """The place where two requests first differ, in words and as a path."""
    if row.key:
        return WHOLE_REQUEST, row.key
    piece = None if case is None else case.after or case.before
    return ("", "") if piece is None else (piece.place, piece.path)


def _compared(history: History, request: Request, nearest: Difference | None) -> Difference | None:
    """The comparison that explains a request: with the one that it continues, or with the nearest if that covers it."""
    if nearest is not None and nearest.after is None:
        return nearest
    counterpart = history.counterpart(request, nearest)
    if counterpart is None or nearest is None:
        return counterpart
    covered = nearest.only_appended and common_bytes(counterpart.earlier, request) <= nearest.equal_bytes
    return nearest if covered else counterpart


def _unexplained(row: CauseClass, found: Difference, meter: Meter, table: PriceTable) -> tuple[CauseClass, int]:
    """The class and loss of a request whose text shows no miss: the template or the upstream may still cause one."""
    lost = meter.template_loss(found)
    if lost:
        return TEMPLATE, lost
    request, usage = found.later, found.later.usage
    grew = found.only_appended or found.only_shorter
    if meter.basis is not Basis.UPSTREAM or usage is None or not grew:
        return row, 0
    earlier = meter.total(found.earlier)
    prefix = min(earlier or 0, usage.tokens)
    if not was_unread(usage.cached, prefix):
        return row, 0
    unread = classify_unread(Unread(found.earlier, request, prefix, table.price_of(request.model, usage.tokens)))
    return unread, prefix - usage.cached if unread.lost else 0


def _ranked(findings: Iterable[RequestFinding], rows: Mapping[int, CauseClass], total: int) -> tuple[MissCause, ...]:
    """Groups misses with the same class, part of the prompt and line into causes; the most expensive comes first."""
    groups: dict[tuple[str, str, str], list[RequestFinding]] = defaultdict(list)
    for finding in findings:
        if finding.missed:
            place = "messages" if finding.place.startswith("message ") else finding.place
            line = finding.line if place in ("system prompt", "messages") else ""
            groups[finding.cause, place, line if finding.cause not in _WHOLE else ""].append(finding)
    causes = []
    for (name, place, _), group in groups.items():
        row = rows[group[0].number]
        lost = sum(finding.lost or 0 for finding in group)
        paid = [finding.money for finding in group if finding.money is not None]
        worst = max(group, key=lambda finding: finding.lost or 0)
        causes.append(
            MissCause(
                name, row.what, row.fix, place or WHOLE_REQUEST, worst.line, tuple(finding.number for finding in group),
                lost, lost / total if total else 0.0, sum(paid) if paid else None, worst.number,
            )
        )  # fmt: skip
    return tuple(sorted(causes, key=lambda cause: (-cause.lost, cause.worst)))


_WHOLE = (
    "client header",
    "rewritten message",
    "varying part first", "system prompt changed", "tool result changed", "history trimmed", "history compacted",
    "message inserted", "moved reminder", "stripped thinking", "serialisation flip", "rolling cache_control",
    "model changed", "cache salt changed",
)  # fmt: skip
"""Classes whose text at fault differs each time. Their misses are grouped by part of the prompt, not by line."""


def _behind(found: Difference) -> tuple[str, ...]:
    texts = []
    for change in changes_behind(found) if not found.later.block_tokens else ():
        place = change.after.place if change.after is not None else ""
        texts.append(f"{classify_behind(Case(found, change)).name} in {place}")
    return tuple(dict.fromkeys(texts))


def _token(found: Difference, meter: Meter) -> int | None:
    if found.later.block_tokens:
        return found.index * found.later.block_tokens
    return meter.counter.shared(found.earlier, found.later) if meter.counter is not None else None


def _seconds(found: Difference | None) -> float | None:
    if found is None or found.later.time is None or found.earlier.time is None:
        return None
    return found.later.time - found.earlier.time


def _price(request: Request, meter: Meter, table: PriceTable) -> Price | None:
    """The price of a request's tokens. Tokens of a named model have that model's price; bytes have no price."""
    tokens = meter.total(request)
    if tokens is None or meter.basis is Basis.BYTES:
        return None
    named = meter.counter.name if meter.basis is Basis.TOKENIZER and meter.counter is not None else request.model
    return table.price_of(named, tokens)


def _money(lost: int | None, request: Request, price: Price | None, table: PriceTable) -> float | None:
    if lost is None or price is None:
        return None
    return table.lost(price, lost, request.usage.written if request.usage is not None else 0)
