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
            "A loss is at most what is shown: a count of tokens does not tell text that is new from text that was sent again."
        )
    if any(request.block_tokens for request in requests):
        found.append("The trace holds hashes of blocks and no text: where a prefix breaks is known, why is not.")
    if any(finding.cause == "stored conversation" for finding in findings):
        found.append(
            "Requests with a `previous_response_id` whose response is not in the log cannot be compared: their beginning is on "
            "the server."
        )
    with_tools = next((request for request in requests if request.pieces and request.pieces[0].kind is Kind.TOOL), None)
    if meter.counter is not None and with_tools is not None and not meter.counter.writes_tools(with_tools):
        found.append(f"The chat template of {meter.counter.name} does not write the tools, so they are not counted.")
    if meter.counter is not None and any(piece.kind is Kind.MEDIA for request in requests for piece in request.pieces):
        found.append("Images and files are compared, but their tokens are not counted.")
    if any(finding.cause == "serialisation flip" for finding in findings) and meter.basis is Basis.BYTES:
        found.append("Whether a serialisation flip costs anything depends on the server; it is counted as if it did.")
    found += _of_money(requests, findings, meter, table)
    return tuple(found)


def _of_basis(requests: Sequence[Request], meter: Meter) -> str:
    if meter.basis is Basis.BYTES:
        some = sum(request.usage is not None for request in requests)
        carry = f"{some} of {len(requests)} requests carry" if some else "The log carries no"
        return (
            f"Counted in bytes. {carry} usage numbers with cached tokens"
            f"{', too few to go by' if some else ''}; name a model to count its tokens (`--model`)."
        )
    if meter.basis is Basis.TOKENIZER and meter.counter is not None:
        return (
            f"Counted with the tokenizer and chat template of {meter.counter.name}, in blocks of {meter.block_size}. What was "
            "computed again is counted piece by piece."
        )
    if meter.basis is Basis.UPSTREAM:
        without = sum(meter.total(request) is None for request in requests)
        left = f" {without} of {len(requests)} requests have none and are not counted." if without else ""
        return f"Counted by the upstream's own usage numbers.{left}"
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
        [f"Prices: {'; '.join(sorted(priced))}. Look whether they still hold; `--prices` takes your own."]
        if priced
        else []
    )
    if unpriced:
        found.append(
            f"No price is known for {', '.join(sorted(unpriced))}, so no money is shown for it; `--prices` takes your own."
        )
    return found
