"""The notes of a report: what a reader must know about its numbers, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from programmable_kv.explain.measure import Basis, Meter
from programmable_kv.explain.pieces import Kind, Request
from programmable_kv.explain.prices import PriceTable
from programmable_kv.explain.report import RequestFinding


def notes_of(
    requests: Sequence[Request], findings: Sequence[RequestFinding], meter: Meter, table: PriceTable
) -> tuple[str, ...]:
    """The notes of a report."""
    found = [_of_basis(requests, meter)]
    if meter.at_most:
        found.append(
            "Losses are upper bounds: a count of tokens does not distinguish new text from text that was sent before."
        )
    if any(request.block_tokens for request in requests):
        found.append("The trace contains hashes of blocks and no text: it shows where a prefix breaks, not why.")
    if any(finding.cause == "stored conversation" for finding in findings):
        found.append(
            "Requests with a `previous_response_id` whose response is not in the log cannot be compared: only the server has "
            "their beginning."
        )
    with_tools = next((request for request in requests if request.pieces and request.pieces[0].kind is Kind.TOOL), None)
    if meter.counter is not None and with_tools is not None and not meter.counter.writes_tools(with_tools):
        found.append(f"The chat template of {meter.counter.name} does not write the tools, so they are not counted.")
    if meter.counter is not None and any(piece.kind is Kind.MEDIA for request in requests for piece in request.pieces):
        found.append("Images and files are compared, but their tokens are not counted.")
    if any(finding.cause == "serialisation flip" for finding in findings) and meter.basis is Basis.BYTES:
        found.append("Whether a serialisation flip costs anything depends on the server; it is counted as a loss.")
    found += _of_money(requests, findings, meter, table)
    return tuple(found)


def _of_basis(requests: Sequence[Request], meter: Meter) -> str:
    if meter.basis is Basis.BYTES:
        some = sum(request.usage is not None for request in requests)
        carry = f"{some} of {len(requests)} requests have" if some else "The log has no"
        return (
            f"Counted in bytes. {carry} usage numbers with cached tokens"
            f"{', which is too few to use' if some else ''}; name a model to count its tokens (`--model`)."
        )
    if meter.basis is Basis.TOKENIZER and meter.counter is not None:
        return (
            f"Counted with the tokenizer and chat template of {meter.counter.name}, in blocks of {meter.block_size}. Losses "
            "are counted piece by piece."
        )
    if meter.basis is Basis.UPSTREAM:
        without = sum(meter.total(request) is None for request in requests)
        left = f" {without} of {len(requests)} requests have no usage numbers and are not counted." if without else ""
        return f"Counted from the upstream's own usage numbers.{left}"
    return f"Counted in blocks of {requests[0].block_tokens} tokens."


def _of_money(
    requests: Sequence[Request], findings: Sequence[RequestFinding], meter: Meter, table: PriceTable
) -> list[str]:
    missed = [finding for finding in findings if finding.missed]
    if not missed or meter.basis is Basis.BYTES:
        return []
    if meter.basis is Basis.TOKENIZER and meter.counter is not None:
        names = {meter.counter.name}
    else:
        names = {finding.model for finding in missed}
    priced, unpriced = set(), set()
    by_number = {request.number: request for request in requests}
    for finding in missed:
        name = finding.model if finding.model in names else next(iter(names))
        row = table.price_of(name, meter.total(by_number[finding.number]) or 0)
        if row is None:
            unpriced.add(name or "a model without a name")
        else:
            priced.add(f"{row.model} ({row.source}, {row.date})")
    found = (
        [f"Prices: {'; '.join(sorted(priced))}. Check that they are current; `--prices` takes your own table."]
        if priced
        else []
    )
    if unpriced:
        found.append(
            f"No price is known for {', '.join(sorted(unpriced))}, so no cost is shown; `--prices` takes your own table."
        )
    return found
