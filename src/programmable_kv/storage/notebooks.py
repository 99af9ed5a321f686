"""A notebook on disk: `notebook.json` (text, fields, digests) and `cache.safetensors` (keys and values).

A folder is written beside its final name and renamed, so nobody reads half of one. Where an older one is replaced, it is
moved aside first: a process killed between the two renames leaves it there, as `.NAME-old-*/old`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from programmable_kv.cache.span import Span
from programmable_kv.errors import CorruptFileError, FingerprintMismatchError, NotPrefilledError
from programmable_kv.ledger.context import Context, FieldState
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.parts import Message, Text
from programmable_kv.prompt.units import Kind, Place, TokenState, Unit

_MANIFEST, _TENSORS = "notebook.json", "cache.safetensors"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedPlace(_Strict):
    name: str
    characters: tuple[int, int]
    tokens: tuple[int, int]


class SavedUnit(_Strict):
    kind: Kind
    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: bool
    places: tuple[SavedPlace, ...]
    corrects: tuple[tuple[str, str], ...]
    read: dict[str, tuple[str | None, ...]]
    name: str
    foreign: bool = False
    base: tuple[TokenState, ...]


class SavedField(_Strict):
    current: str
    written: str


class SavedMessage(_Strict):
    role: str
    template: str
    fields: tuple[str, ...]


class Manifest(_Strict):
    """Everything of a saved notebook but its tensors."""

    format: Literal[1] = 1
    model_name: str
    fingerprint: str
    dtype: str
    erratum_template: str
    tensors_sha256: str
    messages: tuple[SavedMessage, ...]
    units: tuple[SavedUnit, ...]
    fields: dict[str, SavedField]
    placeholders: dict[str, str]
    """what stood for every placeholder of the messages when they were rendered, skills included"""
    refreshed: tuple[int, ...]


def save(notebook: Notebook, folder: Path) -> Path:
    """Write a prefilled notebook. An existing folder is replaced only if it holds a notebook."""
    if folder.exists() and not (folder / _MANIFEST).exists():
        raise CorruptFileError(
            f"{folder} exists and is not a saved notebook; choose another name, or remove it yourself"
        )
    context = notebook._context
    if notebook._buffer is None:
        raise NotPrefilledError("there is no cache to save yet: call .prefill() first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        tensors = {name: tensor.contiguous() for name, tensor in notebook.cache.tensors().items()}
        save_file(tensors, partial / _TENSORS)
        manifest = Manifest(
            model_name=notebook.model.name,
            fingerprint=notebook.model.fingerprint,
            dtype=str(notebook.model.dtype),
            erratum_template=notebook.erratum_template,
            tensors_sha256=_sha256(partial / _TENSORS),
            messages=tuple(
                SavedMessage(role=m.role, template=m.content.template, fields=m.content.fields)
                for m in notebook._messages
            ),
            units=tuple(saved_unit(unit) for unit in context.units),
            fields={
                name: SavedField(current=state.current, written=state.written) for name, state in context.fields.items()
            },
            placeholders=notebook.written_values,
            refreshed=tuple(sorted(context.refreshed)),
        )
        body = manifest.model_dump_json()
        sealed = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "notebook": json.loads(body)}
        (partial / _MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
        if folder.exists():
            # A folder cannot be replaced in one step everywhere: move the old one aside first.
            aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-")) / "old"
            folder.rename(aside)
            try:
                partial.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            finally:
                shutil.rmtree(aside.parent, ignore_errors=True)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(folder: Path, model: Model) -> Notebook:
    """Read a notebook; every check comes before any state is made."""
    try:
        sealed = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest.model_validate(sealed["notebook"])
        intact = sealed["sha256"] == hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
    except FileNotFoundError:
        raise CorruptFileError(f"{folder} holds no {_MANIFEST}: it is not a saved notebook") from None
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{folder / _MANIFEST} is damaged or of another format: {_short(error)}") from error
    if not intact:
        raise CorruptFileError(f"{folder / _MANIFEST} was damaged or changed by hand: save the notebook again")
    if manifest.fingerprint != model.fingerprint:
        raise FingerprintMismatchError(
            f"{folder} was saved from '{manifest.model_name}' ({manifest.fingerprint[:8]}, {manifest.dtype}); this model is "
            f"'{model.name}' ({model.fingerprint[:8]}, {model.dtype}). Keys and values only fit the weights, tokenizer and "
            "dtype that made them: load that model, or prefill again."
        )
    path = folder / _TENSORS
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing: save the notebook again")
    if (found := _sha256(path)) != manifest.tensors_sha256:
        raise CorruptFileError(
            f"{path} has sha256 {found[:12]}..., its manifest says {manifest.tensors_sha256[:12]}...: it was damaged or "
            "exchanged. Save the notebook again."
        )
    try:
        tensors: dict[str, torch.Tensor] = load_file(path, device=str(model.engine.device))
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is not a safetensors file: {error}") from error
    notebook = Notebook(model, erratum_template=manifest.erratum_template)
    notebook._messages = [Message(m.role, Text(m.template, m.fields)) for m in manifest.messages]
    notebook._values = dict(manifest.placeholders)
    context = Context(
        [unit_of(saved) for saved in manifest.units],
        {name: FieldState(f.current, f.written) for name, f in manifest.fields.items()},
        frozenset(manifest.refreshed),
    )
    buffer = model.engine.new_buffer(len(context))
    for name in ("positions", "origins"):
        if name in tensors:
            tensors[name] = tensors[name].cpu()
    if int(tensors["positions"].numel()) != len(context):
        raise CorruptFileError(
            f"{folder}: {len(context)} tokens in the manifest, {tensors['positions'].numel()} in the cache"
        )
    buffer.load_tensors(tensors)
    notebook._context, notebook._buffer = context, buffer
    return notebook


def saved_unit(unit: Unit) -> SavedUnit:
    places = tuple(
        SavedPlace(
            name=p.name, characters=(p.characters.start, p.characters.stop), tokens=(p.tokens.start, p.tokens.stop)
        )
        for p in unit.places
    )
    return SavedUnit(
        kind=unit.kind, text=unit.text, ids=unit.ids, offsets=unit.offsets, special=unit.special, places=places,
        corrects=unit.corrects, read={name: tuple(sorted(values, key=str)) for name, values in unit.read.items()},
        name=unit.name, foreign=unit.foreign, base=unit.base,
    )  # fmt: skip


def unit_of(saved: SavedUnit) -> Unit:
    places = tuple(Place(p.name, Span(*p.characters), Span(*p.tokens)) for p in saved.places)
    return Unit(
        saved.kind,
        saved.text,
        saved.ids,
        saved.offsets,
        saved.special,
        places,
        saved.corrects,
        {name: frozenset(values) for name, values in saved.read.items()},
        saved.name,
        saved.foreign,
        saved.base,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: Any) -> str:
    return " ".join(str(error).split())[:160]
