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
        "worst error of the check divided by its tolerance (1 would be a failure). If a row names indexer keys or shared "
        "layers, the rotation is proved, but `KVBuffer` cannot hold this kind of cache yet and refuses it."
    ),
    Verdict.WITHIN: "As above, while every position is below the bound. Relocation across the bound is refused.",
    Verdict.ATTENTION_ONLY: (
        "The attention layers' cache can be relocated, but other layers keep a running state instead of tokens. This state "
        "must be recomputed over the tokens that follow. The library refuses these models as a whole; the rows say what would "
        "be possible."
    ),
    Verdict.REFUSED: (
        "What is cached at one position is wrong at another, or there is nothing to relocate. The edit modes `erratum` and "
        "`suffix` do not need relocation."
    ),
    NOT_BUILT: "Nothing is claimed about these.",
}

_INTRODUCTION = """# Which architectures

An edit that changes a value's length, a splice and a cut move cached tokens to other positions. This is right only if
everything that the model cached about a token depends on its position in a known way. The library does not look this up in
a list of model types. It proves it on your weights when it first needs it, in about a second (`engine.relocation`). It
prefills tokens and chunks alone at one position, relocates them, and compares them with the same tokens prefilled alone at
the other position: keys and values must be equal in every layer, up to rounding. It also lets the model count a chunk's
positions by itself; this chunk must move in the same way, so that a model which ignores the positions it is given does not
pass. If a model fails, the library refuses to relocate, and says which layer failed, by how much, and why.

This page shows the same check on tiny random models: every causal language model type of transformers {transformers}, the
rotary scalings on one type, and the text side of the image-text types with M-RoPE. `pkv zoo` writes it from
[its record](../results/zoo.json). A real checkpoint of a type can have other settings (a rotary scaling, for example), so only
the check on your weights counts.

`pkv zoo --type llama` prints the row of one type.
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
        head = ["type", "layers", "what rotates", *last, "worst"]
    else:
        head = ["type", "reason"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in sorted(rows, key=lambda row: (row["side"] != "causal LM", row["type"], row["side"])):
        name = f"`{row['type']}`" + ("" if row["side"] == "causal LM" else f" ({row['side']})")
        cells = {
            "type": name,
            "layers": ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in row.get("layers", {}).items()),
            "what rotates": row.get("family", ""),
            "reason": " ".join(filter(None, [_plain(row["reason"]), NOTES.get(row["type"], "")])),
            "worst": f"{row['worst']:.0e}" if "worst" in row else "",
        }
        lines.append("| " + " | ".join(cells[column] for column in head) + " |")
    return lines


def _plain(reason: str) -> str:
    ended = reason if not reason or reason.endswith(".") else reason + "."
    return ended.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
