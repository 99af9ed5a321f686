"""The lab's probes compared with TransformerLens: whether log-probabilities agree, and what a probe costs in each.

TransformerLens runs the same weights, unprocessed, in float32 with eager attention and without a cache, as its users
do. Each of its probes is a forward of the whole context, with the keys and values of all rows but the last pinned to
those of the cache. Here a probe is one row of a forward over the cache. Log-probabilities are compared because logits
may differ by a constant.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from programmable_kv.engine import Rows
from programmable_kv.errors import MissingExtraError
from programmable_kv.lab.experiments.cases import Case, cases
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.tools.kv import patched
from programmable_kv.lab.tools.lens import logit_lens
from programmable_kv.lab.tools.together import Probe
from programmable_kv.models.load import Model
from programmable_kv.models.names import EMBEDDED_PLAIN
from programmable_kv.records import Record, Recorder, digest_of, record_for

SEED = 97_000
PROBES = 6
"""Number of slots patched, and number blocked, in TransformerLens. The lab's own probes cover all later slots."""
WITHIN = 1e-4
"""Largest difference allowed between log-probabilities."""
PROBED = ("patch", "knock_out", "lens")

Hook = tuple[str, Callable[..., torch.Tensor]]


def drawn(count: int) -> list[Case]:
    return cases(count, SEED)


def record_name(model: Model) -> str:
    return record_for("lens-peer", model.name, EMBEDDED_PLAIN)


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Probe `count` policies both ways. The row of a policy without a measurable pair only gives the reason.

    Raises:
        MissingExtraError: TransformerLens is not installed.
    """
    theirs = Peer.of(model)
    chosen = drawn(count)
    recorder = Recorder(
        path, name=record_name(model), version=1, title="The lab's probes beside TransformerLens",
        command=command, model=Path(model.name).name, model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for case in chosen), seeds=[SEED],
        settings={"count": count, "transformer_lens": theirs.version},
    )  # fmt: skip

    def row(case: Case) -> dict[str, Any]:
        pair = pair_of(model, case)
        known = {"number": case.number, "domain": case.domain}
        return known | ({"skipped": pair} if isinstance(pair, str) else measured(pair, theirs))

    recorder.collect(chosen, lambda case: {"number": case.number}, row, report)
    return recorder.finish(summary([row for row in recorder.rows if "skipped" not in row]))


class Peer:
    """A copy of a model in TransformerLens."""

    def __init__(self, bridge: Any, version: str, device: str) -> None:
        self.bridge, self.version, self.device = bridge, version, device

    @classmethod
    def of(cls, model: Model) -> Peer:
        """Wrap a copy of a model.

        Raises:
            MissingExtraError: TransformerLens is not installed.
        """
        if find_spec("transformer_lens") is None:
            raise MissingExtraError(
                "the probes are compared with TransformerLens, which is not installed and is not a dependency. "
                "Run: pip install transformer-lens"
            )
        bridges = import_module("transformer_lens.model_bridge")
        # TransformerLens changes the model that it wraps.
        own = copy.deepcopy(model.engine.model)
        own.set_attn_implementation("eager")
        with TemporaryDirectory() as folder, torch.no_grad():
            own.config.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
            device = str(model.engine.device)
            bridge = bridges.TransformerBridge.boot_transformers(folder, hf_model=own, device=device)
        return cls(bridge, version("transformer-lens"), device)

    @torch.no_grad()
    def last(self, ids: Sequence[int], hooks: Sequence[Hook] = ()) -> torch.Tensor:
        """Log-probabilities of the last row, [V]."""
        logits = self.bridge.run_with_hooks(torch.tensor([list(ids)], device=self.device), fwd_hooks=list(hooks))
        found: torch.Tensor = logits[0, -1].log_softmax(-1)
        return found

    @torch.no_grad()
    def cached(self, ids: Sequence[int], *names: str) -> dict[str, torch.Tensor]:
        """Activations whose names end with one of these, by name."""
        found = self.bridge.run_with_cache(
            torch.tensor([list(ids)], device=self.device), names_filter=lambda name: name.endswith(names)
        )[1]
        return {name: found[name] for name in found}

    @torch.no_grad()
    def lens(self, ids: Sequence[int], layers: int) -> torch.Tensor:
        """The logit lens of the last row: log-probabilities [L + 1, V]."""
        cache = self.cached(ids, "hook_resid_pre", "hook_resid_post")
        streams = [cache[f"blocks.{layer}.hook_resid_pre"][:, -1:] for layer in range(layers)]
        streams.append(cache[f"blocks.{layers - 1}.hook_resid_post"][:, -1:])
        read = self.bridge.unembed(self.bridge.ln_final(torch.cat(streams)))
        found: torch.Tensor = read[:, 0].log_softmax(-1)
        return found


def measured(pair: Pair, theirs: Peer) -> dict[str, Any]:
    """The distance between the two on one policy, and the processor time of each kind of probe in each, in seconds."""
    ids, later = pair.text.ids, list(pair.text.later)
    rng = random.Random(f"{SEED}/{pair.case.number}")
    some = rng.sample(later, PROBES)
    row: dict[str, Any] = {"tokens": len(ids), "later": len(later), "apart": {}, "seconds": {}}
    ours, own = _timed(lambda: pair.probe([Probe((slot,)) for slot in later]))
    one_by_one, alone = _timed(lambda: [_alone(pair, slot) for slot in some])
    old, new = (theirs.cached(each, "hook_rot_k", "hook_v") for each in (ids, pair.new_text.ids))
    found, other = _timed(lambda: [theirs.last(ids, list(_patch(old, new, slot))) for slot in some])
    wanted = torch.stack([ours[later.index(slot)] for slot in some])
    row["apart"]["patch"] = max(_apart(wanted, found), _apart(torch.stack(one_by_one), found))
    row["seconds"]["patch"] = {
        "ours": own / len(later), "ours_alone": alone / len(some), "theirs": other / len(some),
    }  # fmt: skip
    ours, own = _timed(lambda: pair.probe([Probe(blocked=(slot,)) for slot in later]))
    found, other = _timed(lambda: [theirs.last(ids, list(_blocked(old, slot))) for slot in some])
    row["apart"]["knock_out"] = _apart(torch.stack([ours[later.index(slot)] for slot in some]), found)
    row["seconds"]["knock_out"] = {"ours": own / len(later), "theirs": other / len(some)}
    rows = Rows((pair.token,), (pair.text.last,), (pair.text.last,))
    lens, own = _timed(lambda: logit_lens(pair.engine, pair.old, rows)[:, -1])
    their_lens, other = _timed(lambda: theirs.lens(ids, len(pair.old)))
    row["apart"]["lens"] = _apart(lens, list(their_lens))
    row["seconds"]["lens"] = {"ours": own, "theirs": other}
    # A patch must have moved something, or equal numbers would prove nothing.
    row["moved"] = float((ours.log_softmax(-1) - ours[:1].log_softmax(-1)).abs().max())
    return row


def _timed(what: Callable[[], Any]) -> tuple[Any, float]:
    """The result and its processor time in seconds, which leaves out other programs on the machine."""
    began = time.process_time()
    found = what()
    return found, time.process_time() - began


def _alone(pair: Pair, slot: int) -> torch.Tensor:
    """The logits after one patch, in a forward of its own."""
    rows = Rows((pair.token,), (pair.text.last,), (pair.text.last,))
    with patched(pair.old, pair.fresh, [slot]):
        return pair.engine.compute(pair.old, rows)[-1]


def _apart(ours: torch.Tensor, theirs: Sequence[torch.Tensor]) -> float:
    return float((ours.log_softmax(-1) - torch.stack(list(theirs))).abs().max())


def _patch(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], slot: int) -> Iterator[Hook]:
    """Give all rows but the last the old context's keys and values, and one slot the new context's."""
    for name in old:

        def put(tensor: torch.Tensor, hook: Any, name: str = name) -> torch.Tensor:
            tensor[:, :-1] = old[name][:, :-1]
            tensor[:, slot] = new[name][:, slot]
            return tensor

        yield name, put


def _blocked(old: dict[str, torch.Tensor], slot: int) -> Iterator[Hook]:
    """Block one slot for the last row."""
    for layer in range(len([name for name in old if name.endswith("hook_v")])):

        def block(scores: torch.Tensor, hook: Any) -> torch.Tensor:
            scores[:, :, -1, slot] = torch.finfo(scores.dtype).min
            return scores

        yield f"blocks.{layer}.attn.hook_attn_scores", block


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest distance of log-probabilities, mean times, and how many times longer a probe takes there."""
    found: dict[str, Any] = {"policies": len(rows), "apart": {}, "milliseconds": {}, "theirs_over_ours": {}}
    if not rows:
        return found
    found["tokens"] = sum(row["tokens"] for row in rows) / len(rows)
    for kind in PROBED:
        found["apart"][kind] = max(row["apart"][kind] for row in rows)
        means = {way: sum(row["seconds"][kind][way] for row in rows) / len(rows) for way in rows[0]["seconds"][kind]}
        found["milliseconds"][kind] = {way: round(1000 * each, 3) for way, each in means.items()}
        found["theirs_over_ours"][kind] = round(means["theirs"] / means["ours"], 2)
    alone = found["milliseconds"]["patch"]
    found["theirs_over_ours"]["patch_alone"] = round(alone["theirs"] / alone["ours_alone"], 2)
    found["equal"] = float(max(found["apart"].values()) < WITHIN)
    return found
