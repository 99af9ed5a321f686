"""The relocation check on every architecture that transformers ships, tiny and random: `pkv zoo`.

The record has one row for each type. Each type is built and checked in its own process, so a crash or a hang costs only
that type. Nothing about a type is assumed: its verdict is what was measured.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from programmable_kv.cache.layout import KVLayout, LayerLayout
from programmable_kv.cache.rotation import Rotary
from programmable_kv.cache.transformers_api import decoder_of, rope_types
from programmable_kv.errors import InvalidOptionsError, UnsupportedModelError
from programmable_kv.lab.tiny_configs import (
    ORDINARY_TOKENS,
    SCALINGS,
    has_sections,
    text_config_class,
    tiny_config,
    tiny_text_config,
)
from programmable_kv.records import Record, Recorder, digest_of
from programmable_kv.verify.alone import prefill_alone
from programmable_kv.verify.relocation import CachedLayer, PositionEncoding, RelocationProof, Verdict, prove_relocation

VERSION = 1
NOT_BUILT = "not built"
_TIMEOUT_SECONDS = 90
_TEXT_SIDE = "text side"
KINDS = {
    "latent": ("family", "beside a latent"),
    "three_axes": ("family", "3 axes"),
    "state_alone": ("reason", "its whole past is a state"),
}
"""Kinds of cache counted separately, name -> (key of a row, text in its value): MLA, M-RoPE, attention-free models."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the zoo: a model type, and which model of that type is built."""

    name: str
    side: str = "causal LM"


def all_variants() -> list[Variant]:
    """Every causal LM type, the rotary scalings on one type, and the text sides of image-text types with M-RoPE."""
    causal = [Variant(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    texts = [
        Variant(name, _TEXT_SIDE)
        for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and has_sections(text_config_class(name))
    ]
    return causal + [Variant(name, f"with {kind} scaling") for name, kind in SCALINGS] + texts


def build(variant: Variant, dtype: torch.dtype = torch.float64) -> Any:
    """The tiny random model. Its weights are large enough that attention is peaked and no error can hide."""
    torch.manual_seed(0)
    # The plain implementations: the fast kernels for attention and experts do not all exist in float64.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": dtype}
    kind: Any
    if variant.side == _TEXT_SIDE:
        config = tiny_text_config(variant.name)
        kind = _text_model(config)
    else:
        scaling = variant.side.removeprefix("with ").removesuffix(" scaling")
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[variant.name]]
        # The causal language model of a composite type may be its decoder's alone.
        config = tiny_config(variant.name, kind.config_class, SCALINGS.get((variant.name, scaling)))
        # Encoders of the BERT family attend to later tokens and cache nothing unless configured as decoders.
        config.is_decoder = True
    model: Any = kind._from_config(config, **plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name:
                parameter.normal_(std=1.0)
            elif parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def _text_model(config: Any) -> Any:
    """The decoder class for the text configuration, from the image-text type's own module."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    classes: list[Any] = [each for _, each in inspect.getmembers(module, inspect.isclass)]
    for each in classes:
        if (
            issubclass(each, PreTrainedModel)
            and each.config_class is type(config)
            and each.__name__.endswith("TextModel")
        ):
            return each
    raise UnsupportedModelError(f"{type(config).__name__} has no text model of its own")


def prove(model: Any) -> RelocationProof:
    """Run the relocation check on a model of any kind, through transformers' own cache."""

    def prefill(ids: Sequence[int], positions: torch.Tensor | None, *, padding: int = 0) -> list[CachedLayer]:
        return prefill_alone(model, ids, positions, padding=padding)

    return prove_relocation(KVLayout.read(model), prefill, ORDINARY_TOKENS, model.dtype)


def examine(variant: Variant) -> dict[str, Any]:
    """A type's row: what was measured, or the stage at which it failed and the error."""
    began = time.perf_counter()
    row: dict[str, Any] = {"type": variant.name, "side": variant.side}
    # Some types compute parts in float32 whatever their dtype, and cannot mix the two.
    for dtype in (torch.float64, torch.float32):
        measured = _measured(variant, dtype)
        if measured["verdict"] != NOT_BUILT:
            row["dtype"] = str(dtype).removeprefix("torch.")
            return row | measured | {"seconds": round(time.perf_counter() - began, 2)}
    row |= measured
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def _measured(variant: Variant, dtype: torch.dtype) -> dict[str, Any]:
    stage = "building it"
    try:
        model = build(variant, dtype)
        stage = "running it"
        proof = prove(model)
    except UnsupportedModelError as error:
        return {"verdict": str(Verdict.REFUSED), "reason": str(error)}
    except Exception as error:  # whatever a model type raises is that row's finding, not this run's failure
        return {"verdict": NOT_BUILT, "reason": f"{stage} failed: {type(error).__name__}: {_one_line(str(error))}"}
    return {
        "verdict": str(proof.verdict),
        "reason": proof.reason,
        "family": family(proof, sorted(rope_types(decoder_of(model)))),
        "worst": float(f"{proof.worst:.3g}"),
        "layers": dict(Counter(layer.kind for layer in proof.layout.layers)),
    }


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]


def family(proof: RelocationProof, scalings: Sequence[str]) -> str:
    """Describe in words how positions enter this model's cache, as the check found it."""
    if proof.encoding is PositionEncoding.LEARNED:
        return "positions in the hidden states"
    if proof.encoding is PositionEncoding.NONE_CACHED:
        return "nothing cached turns; order is told" if proof.tells_order else "no position encoding"
    rules = [_rules(layer) for layer in proof.layout.layers]
    turning = Counter(f"{_place(name)}{_shape(rule)}" for layer in rules for name, rule in layer.items())
    parts = [*turning, *(f"{kind} scaling" for kind in scalings if kind != "default")]
    tables = {rule.frequencies for layer in rules for rule in layer.values()}
    if len(tables) > 1:
        parts.append(f"{len(tables)} frequency tables")
    still = sum(1 for index, layer in enumerate(rules) if not layer and index not in proof.states)
    if still and turning:
        parts.append(f"{still} of {len(rules)} layers do not rotate")
    return "; ".join(parts) if turning else "nothing that turns was found"


def _rules(layer: LayerLayout) -> dict[str, Rotary]:
    return ({"keys": layer.rotary} if layer.rotary is not None else {}) | dict(layer.others)


def _place(name: str) -> str:
    return {"keys": "", "values": "beside a latent, "}.get(name, f"{name}: ")


def _shape(rule: Rotary) -> str:
    text = f"{rule.width} channels" + (f" from {rule.start}" if rule.start else "") + f", {rule.pairing}"
    if rule.axes:
        runs = sum(1 for a, b in pairwise(rule.axes) if a != b) + 1
        text += f", {len(set(rule.axes))} axes in {'interleaved ' if runs > len(set(rule.axes)) else ''}sections"
    return text


def examine_apart(variant: Variant, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> dict[str, Any]:
    """Run `examine` in its own process, which may crash or be killed without harm."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        # One server imports the libraries once; each type is a fork of it.
        context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(variant, theirs), daemon=True)
    process.start()
    theirs.close()
    row: dict[str, Any] = {"type": variant.name, "side": variant.side, "verdict": NOT_BUILT}
    try:
        if ours.poll(timeout_seconds):
            row = ours.recv()
        else:
            row["reason"] = f"did not finish within {timeout_seconds:.0f} seconds"
    except EOFError:
        row["reason"] = "its process died"
    finally:
        process.kill()
        process.join()
    return row


def _report(variant: Variant, connection: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        connection.send(examine(variant))


def variants_named(names: Sequence[str]) -> list[Variant]:
    """The variants of these types, or all variants if no type is named.

    Raises:
        InvalidOptionsError: the zoo has no type of one of these names.
    """
    variants = all_variants()
    unknown = set(names) - {each.name for each in variants}
    if unknown:
        raise InvalidOptionsError(
            f"transformers has no causal language model type and no image-text type with M-RoPE called "
            f"{', '.join(sorted(unknown))}"
        )
    return [each for each in variants if not names or each.name in names]


def run(
    path: Path,
    variants: Sequence[Variant],
    *,
    command: str = "",
    report: Callable[[int, int], None] = lambda *_: None,
) -> Record:
    """Examine the variants into a record at `path`, one row each. An interrupted run is resumed."""
    recorder = Recorder(
        path,
        name="zoo",
        version=VERSION,
        title="Relocation of cached keys on every decoder type of transformers, tiny random models in float64",
        command=command,
        model="tiny random models",
        model_fingerprint="seed 0",
        data_digest=digest_of(f"{each.name} {each.side}" for each in variants),
        seeds=[0],
        settings={"types": len(variants), "dtype": "float64"},
    )
    for number, each in enumerate(variants, start=1):
        if not recorder.done(type=each.name, side=each.side):
            recorder.add(examine_apart(each))
        report(number, len(variants))
    return recorder.finish(summary(recorder.rows))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The number of types with each verdict: of causal LM types, of the other rows, and of each of `KINDS`."""
    verdicts = [*(str(verdict) for verdict in Verdict), NOT_BUILT]

    def counts(some: Sequence[dict[str, Any]]) -> dict[str, int]:
        found = Counter(row["verdict"] for row in some)
        return {_key(verdict): found[verdict] for verdict in verdicts}

    causal = [row for row in rows if row["side"] == "causal LM"]
    return {
        "types": len(causal),
        "causal": counts(causal),
        "others": counts([row for row in rows if row["side"] != "causal LM"]),
        "kinds": {
            name: counts([row for row in rows if words in row.get(where, "")]) for name, (where, words) in KINDS.items()
        },
    }


def _key(verdict: str) -> str:
    return verdict.replace(" ", "_")
