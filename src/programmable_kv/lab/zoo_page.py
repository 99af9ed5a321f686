"""Writes the page of supported architectures from the zoo's record alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from programmable_kv.lab.tiny_configs import NOTES
from programmable_kv.lab.zoo import NOT_BUILT
from programmable_kv.records import Record
from programmable_kv.verify.relocation import Verdict

_MEANING = {
    Verdict.EXACT: (
        "Cached tokens can be relocated. The third column says what rotates with the position, and how. The last column is the "
        "worst error of the check over its tolerance (1 would be a failure). Where a row names indexer keys or shared layers, "
        "the rotation is proved, but `KVBuffer` does not hold such a cache yet and refuses it."
    ),
    Verdict.WITHIN: "As above, as long as every position stays below the bound. Across it, relocation is refused.",
    Verdict.ATTENTION_ONLY: (
        "The attention layers' cache can be relocated, but other layers keep a running state instead of tokens. That state has "
        "to be recomputed over the tokens that follow. The library refuses these models as a whole; the rows say "
        "what would be possible."
    ),
    Verdict.REFUSED: (
        "What is cached at one position is wrong at another, or there is nothing to relocate. Edits by erratum or suffix do "
        "not need relocation."
    ),
    NOT_BUILT: "Nothing is claimed about these.",
}

_INTRODUCTION = """# Which architectures

Moving a cached token to another position (an edit that changes a value's length, a splice, a cut) is right only if
everything that the model cached about the token depends on its position in a known way. This is not looked up in a list of
model types. It is proved on your weights when it is first needed, in about a second (`engine.relocation`): tokens and chunks
prefilled alone at one position and relocated must equal the same tokens prefilled alone at the other, in every layer, keys
and values; and a chunk left to count positions by itself must move in the same way, so that a model which ignores the
positions it is given cannot pass by standing still. A model that fails is refused, with the layer, the error and the reason.

This page is the same check on a tiny random model of every causal language model type of transformers {transformers}, of the
rotary scalings on one type, and of the text side of the image-text types with M-RoPE. It is written by `pkv zoo` from
[its record](../results/zoo.json): a real checkpoint of a type can have other settings (a rotary scaling, say), and the check on
your weights is the one that counts.

To see the row of one type: `pkv zoo --type llama`.
"""


def page(record: Record) -> str:
    """Return the text of docs/architectures.md."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in record.rows:
        groups[row["verdict"]].append(row)
    verdicts = [verdict for verdict in _MEANING if groups[verdict]]
    lines = [_INTRODUCTION.format(transformers=record.machine.transformers), *_counts(verdicts, groups)]
    for verdict in verdicts:
        lines += ["", f"## {str(verdict).capitalize()}", "", _MEANING[verdict], "", *_table(verdict, groups[verdict])]
    return "\n".join(lines) + "\n"


def _counts(verdicts: Sequence[str], groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| verdict | causal LM types | other rows |", "| --- | --- | --- |"]
    for verdict in verdicts:
        causal = sum(1 for row in groups[verdict] if row["side"] == "causal LM")
        lines.append(f"| {verdict} | {causal} | {len(groups[verdict]) - causal} |")
    return lines


def _table(verdict: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return one line for each type, with the reason if there is one, and the worst error if it can be relocated."""
    explained = any(row["reason"] for row in rows)
    last = ["reason"] if explained else []
    if verdict in (Verdict.EXACT, Verdict.WITHIN, Verdict.ATTENTION_ONLY):
        head = ["type", "layers", "what turns", *last, "worst"]
    else:
        head = ["type", "reason"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in sorted(rows, key=lambda row: (row["side"] != "causal LM", row["type"], row["side"])):
        name = f"`{row['type']}`" + ("" if row["side"] == "causal LM" else f" ({row['side']})")
        cells = {
            "type": name,
            "layers": ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in row.get("layers", {}).items()),
            "what turns": row.get("family", ""),
            "reason": " ".join(filter(None, [_plain(row["reason"]), NOTES.get(row["type"], "")])),
            "worst": f"{row['worst']:.0e}" if "worst" in row else "",
        }
        lines.append("| " + " | ".join(cells[column] for column in head) + " |")
    return lines


def _plain(reason: str) -> str:
    ended = reason if not reason or reason.endswith(".") else reason + "."
    return ended.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
