"""Saves a notebook on disk or at an fsspec URL: `notebook.json` (text, fields, digests) and `cache-*.safetensors`.

Tensors (keys and values) are written first, under a new name for every save, and the manifest that names them last, in
one step. So a reader gets the old notebook or the new one, never a mixture, even if several processes save at the same
time or one is killed. This module does not use `Notebook`: it writes and reads a `SavedNotebook`, from which one is
made.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from programmable_kv.cache.layout import Rotated
from programmable_kv.cache.span import Span
from programmable_kv.design.build import AnyLedger, Build
from programmable_kv.design.declared import Declared
from programmable_kv.errors import CorruptFileError, FingerprintMismatchError, StorageError
from programmable_kv.models.load import Model
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.parts import Message
from programmable_kv.prompt.template import ChatTemplate
from programmable_kv.storage.builds import SavedBuild
from programmable_kv.storage.files import Blobs, blobs_at, sha256_of
from programmable_kv.storage.ledgers import SavedLedger
from programmable_kv.storage.local import LocalBlobs
from programmable_kv.storage.manifests import NotebookManifest, SavedContext, SavedTemplate, messages_of, saved_messages
from programmable_kv.storage.pairs import clear_unused, write_pair
from programmable_kv.storage.tensors import TensorCheck, cached_shapes, read_tensors

MANIFEST = "notebook.json"
_TENSORS = re.compile(r"cache(-[0-9a-f]{16})?\.safetensors\Z")
"""Name of a notebook's tensors; in format 1 it had no number."""
_POSITIONS = ("positions", "origins", "frequencies")
"""Tensors that stay on the CPU, whatever the model's device."""


@dataclass(frozen=True, slots=True)
class SavedNotebook:
    """Everything that a prefilled notebook is made of."""

    erratum_template: str
    messages: tuple[Message, ...]
    template: ChatTemplate
    """the chat template of the messages, with its arguments"""
    values: Mapping[str, str]
    """the text of every placeholder of the messages as rendered, including skills"""
    context: Context
    ledger: AnyLedger
    tensors: Mapping[str, torch.Tensor]
    """the buffer's tensors, named as by `KVBuffer.tensors`"""
    declared: Declared = field(default_factory=Declared)


def write(state: SavedNotebook, where: str | Path | Blobs, model: Model) -> Path | str:
    """Save a notebook to a folder or a URL; a notebook saved there before is replaced. Returns the folder or the URL.

    Raises:
        CorruptFileError: the place has something other than a saved notebook.
        StorageError: the notebook cannot be written (no room, no permission). What was saved there before is unchanged.
    """
    blobs = blobs_at(where)
    _require_ours(blobs)
    made = isinstance(blobs, LocalBlobs) and not blobs.root.exists()
    name = f"cache-{uuid.uuid4().hex[:16]}.safetensors"
    tensors = {key: tensor.contiguous() for key, tensor in state.tensors.items()}

    def save() -> bytes:
        digest = blobs.write_from(name, lambda path: save_file(tensors, path))
        return NotebookManifest(
            model_name=model.name,
            fingerprint=model.fingerprint,
            dtype=str(model.dtype),
            erratum_template=state.erratum_template,
            tensors=name,
            tensors_sha256=digest,
            messages=saved_messages(state.messages),
            template=SavedTemplate.of(state.template),
            placeholders=dict(state.values),
            context=SavedContext.of(state.context),
            ledger=None if isinstance(state.ledger, Build) else SavedLedger.of(state.ledger),
            build=SavedBuild.of(state.ledger) if isinstance(state.ledger, Build) else None,
            mentions=dict(state.declared.words),
            read_by=dict(state.declared.read_by),
        ).sealed()

    try:
        write_pair(blobs, name, MANIFEST, save, lambda: _named(blobs))
    except BaseException:
        if made and isinstance(blobs, LocalBlobs):
            with suppress(OSError):
                blobs.root.rmdir()  # succeeds only if it is empty
        raise
    clear_unused(blobs, lambda other: bool(_TENSORS.match(other)), lambda: _named(blobs))
    if isinstance(blobs, LocalBlobs):
        return blobs.root
    return where if isinstance(where, str) else blobs.where


def read(where: str | Path | Blobs, model: Model) -> SavedNotebook:
    """Read a notebook that was saved with this model. All checks are made before any state is.

    Raises:
        FingerprintMismatchError: the notebook was saved from another model, tokenizer or dtype.
        CorruptFileError: a file is missing, damaged, of another format, or does not fit the model.
        StorageError: the notebook cannot be read.
    """
    blobs = blobs_at(where)
    missing: str | None = None
    while True:
        manifest = _manifest(blobs)
        _check_model(manifest, model, blobs)
        tensors = _tensors(blobs, manifest, model)
        if tensors is not None:
            break
        # A save replaces the manifest before it removes the old tensors. So if tensors are missing and the manifest
        # still names them, no save has replaced them: they are lost.
        if manifest.tensors == missing:
            raise CorruptFileError(f"{blobs.where}: the tensors {missing} are missing: save the notebook again")
        missing = manifest.tensors
    place = f"{MANIFEST} in {blobs.where}"
    manifest.check(model, place)
    _check_tensors(
        tensors, sum(len(unit.ids) for unit in manifest.context.units), model, f"{manifest.tensors} in {blobs.where}"
    )
    context = manifest.context.context()
    _check_stand(tensors["positions"].tolist(), context, place)
    if manifest.build is not None:
        ledger: AnyLedger = manifest.build.build(manifest.declared)
    else:
        assert manifest.ledger is not None, "the check found a ledger or a build"
        ledger = manifest.ledger.ledger(context)
    return SavedNotebook(
        manifest.erratum_template,
        messages_of(manifest.messages),
        manifest.template.template(model.tokenizer),
        dict(manifest.placeholders),
        context,
        ledger,
        {name: it if name in _POSITIONS else it.to(model.engine.device) for name, it in tensors.items()},
        manifest.declared,
    )


def _manifest(blobs: Blobs) -> NotebookManifest:
    body = blobs.read(MANIFEST)
    if body is None:
        raise CorruptFileError(f"{blobs.where} is not a saved notebook: it has no {MANIFEST}")
    return NotebookManifest.read(body, f"{MANIFEST} in {blobs.where}")


def _check_model(manifest: NotebookManifest, model: Model, blobs: Blobs) -> None:
    if manifest.fingerprint != model.fingerprint:
        raise FingerprintMismatchError(
            f"{blobs.where} was saved from '{manifest.model_name}' ({manifest.fingerprint[:8]}, {manifest.dtype}); this model "
            f"is '{model.name}' ({model.fingerprint[:8]}, {model.dtype}). Keys and values only fit the weights, tokenizer and "
            "dtype that made them: load that model, or prefill again."
        )
    if not _TENSORS.match(manifest.tensors):
        raise CorruptFileError(
            f"{MANIFEST} in {blobs.where} does not name a notebook's tensors: {manifest.tensors[:80]!r}"
        )


def _tensors(blobs: Blobs, manifest: NotebookManifest, model: Model) -> dict[str, torch.Tensor] | None:
    """The tensors that a manifest names; None if they are gone, for example because another save replaced both."""
    name = manifest.tensors
    where = f"{name} in {blobs.where}"
    path = blobs.local_path(name)
    source = blobs.read(name) if path is None else path
    if source is None:
        return None
    try:
        with blobs.translated("read", name):
            found = sha256_of(source)
        if found != manifest.tensors_sha256:
            raise CorruptFileError(
                f"{where} has sha256 {found[:12]}..., but its manifest says {manifest.tensors_sha256[:12]}...: it was "
                "damaged or replaced. Save the notebook again."
            )
        return read_tensors(source, where)
    except FileNotFoundError:
        return None


def _check_tensors(tensors: Mapping[str, torch.Tensor], count: int, model: Model, where: str) -> None:
    """
    Raises:
        CorruptFileError: the tensors are not those of a cache of `count` tokens of this model.
    """
    shapes = cached_shapes(model.engine)
    limit = model.position_limit
    check = TensorCheck(tensors, where, count)
    layers = range(len(shapes) if count else 0)
    rotated: list[Rotated] = ["keys" if f"origin_keys.{layer}" in tensors else "values" for layer in layers]
    moved = "origins" in tensors
    rules = len(model.engine.layout.frequency_rules) if count else 0
    check.names(
        [
            "positions",
            *(["frequencies"] if rules else []),
            *(f"{name}.{layer}" for name in ("keys", "values") for layer in layers),
        ]
        + (["origins", *(f"origin_{name}.{layer}" for layer, name in enumerate(rotated))] if moved else [])
    )
    check.positions("positions", limit)
    if rules:
        check.frequencies(rules)
    if moved:
        check.positions("origins", limit, ascending=False)
    for layer in layers:
        check.cached(layer, shapes[layer])
        if moved:
            check.cached(layer, shapes[layer], prefix="origin_", names=(rotated[layer],))


def _check_stand(positions: Sequence[int], context: Context, where: str) -> None:
    """
    Raises:
        CorruptFileError: the cache's positions are not those of the text.
    """
    if list(positions) != list(context.positions_in(Span(0, len(context)))):
        raise CorruptFileError(f"{where}: the cache's positions do not match the text: save the notebook again")


def _named(blobs: Blobs) -> set[str] | None:
    """The tensors that the manifest names; None if it cannot be read, so that it is unknown which are in use."""
    try:
        body = blobs.read(MANIFEST)
        return set() if body is None else {NotebookManifest.read(body, MANIFEST).tensors}
    except StorageError:
        return None


def _require_ours(blobs: Blobs) -> None:
    """
    Raises:
        CorruptFileError: the place has something other than a saved notebook.
    """
    if blobs.exists(MANIFEST):
        return
    other = blobs.foreign(lambda name: name == MANIFEST or bool(_TENSORS.match(name)))
    if other is not None:
        raise CorruptFileError(
            f"{blobs.where} exists but is not a saved notebook (it contains {other!r}): choose another name, or remove "
            "it yourself"
        )
