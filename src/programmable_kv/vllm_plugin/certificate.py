"""Certificates: they prove that the skills of a store fit the model that vLLM serves.

vLLM loads the weights in its own way, so the plugin cannot compute the library's fingerprint of them. A certificate
connects the two. The library writes it after it has loaded the model: the fingerprint, the digests of the files that
both load, and the rotation of every layer, proved on the loaded weights. The certificate is stored with the skills. The
plugin compares the digests with the folder that vLLM serves, and refuses a folder with other files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from programmable_kv.cache.rotation import Pairing, Rotary
from programmable_kv.errors import FingerprintMismatchError, ModelUnavailableError
from programmable_kv.storage.files import Blobs
from programmable_kv.storage.manifests import Digest, Key
from programmable_kv.storage.sealed import Sealed

_NAME = re.compile(r"vllm-[0-9a-f]{32}\.json\Z")
_CERTIFY = "Certify the model that vLLM serves: `pkv vllm certify FOLDER --store STORE`"
_READ = ("config.json", "model.safetensors.index.json")


class SavedRotary(BaseModel):
    """A layer's rotation (see `cache.rotation.Rotary`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    frequencies: tuple[float, ...]
    start: Annotated[int, Field(ge=0)]
    pairing: Pairing

    @classmethod
    def of(cls, rotary: Rotary) -> SavedRotary:
        return cls(frequencies=rotary.frequencies, start=rotary.start, pairing=rotary.pairing)

    def rotary(self) -> Rotary:
        return Rotary(self.frequencies, self.start, self.pairing)


class SavedLayer(BaseModel):
    """What a layer caches for one token: `heads` keys and `heads` values of `width` numbers each.

    `rotation` is the index of the layer's rotation in `Certificate.rotations`; None if its keys are not rotated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    heads: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    rotation: int | None


class Certificate(Sealed):
    """Names a model into which skills of one fingerprint may be loaded."""

    FORMAT: ClassVar[int] = 1
    AGAIN: ClassVar[str] = "certify the model again"

    format: Literal[1] = 1
    model_name: str
    fingerprint: Key
    dtype: str
    """dtype of weights and cache, as torch names it"""
    files: dict[str, Digest]
    """file name -> SHA-256, for the files that determine the weights"""
    layers: tuple[SavedLayer, ...]
    rotations: tuple[SavedRotary, ...]
    position_limit: int | None

    def rotary(self, layer: int) -> Rotary | None:
        which = self.layers[layer].rotation
        return None if which is None else self.rotations[which].rotary()

    def write(self, blobs: Blobs) -> str:
        """Write the certificate to the store of the skills and return the blob's name.

        Raises:
            StorageError: the certificate cannot be written.
        """
        name = f"vllm-{self.fingerprint}.json"
        blobs.write(name, self.sealed())
        return name


def certificates(blobs: Blobs) -> list[Certificate]:
    """Return all certificates in a store.

    Raises:
        CorruptFileError: a certificate is damaged.
    """
    names = sorted(blob.name for blob in blobs.list() if _NAME.match(blob.name))
    bodies = [(name, blobs.read(name)) for name in names]
    return [Certificate.read(body, f"{name} in {blobs.where}") for name, body in bodies if body is not None]


def certificate_of(blobs: Blobs, folder: str | Path, dtype: str) -> Certificate:
    """Return the certificate for the model in a folder, served in the given dtype.

    Raises:
        FingerprintMismatchError: the store has no certificate for it.
        ModelUnavailableError: the folder contains no model.
    """
    found = files_of(folder)
    known = certificates(blobs)
    for each in known:
        if each.files == found and each.dtype == dtype:
            return each
    raise FingerprintMismatchError(
        f"the skills in {blobs.where} are not certified for the model in {folder} in {dtype}: {_nearest(known, found, dtype)}. "
        f"Keys and values only fit the weights and dtype that made them. {_CERTIFY}."
    )


def files_of(folder: str | Path) -> dict[str, str]:
    """Return file name -> SHA-256 for the files in a model's folder that determine its weights.

    Raises:
        ModelUnavailableError: config.json or the .safetensors files are missing.
    """
    root = Path(folder).expanduser()
    paths = [path for path in (root / name for name in _READ) if path.is_file()]
    weights = sorted(root.glob("*.safetensors"))
    if not weights or not (root / "config.json").is_file():
        raise ModelUnavailableError(
            f"{folder} is not a folder with config.json and .safetensors weights, which vLLM and this package both read. "
            "Give such a folder, not a Hub id; `pkv vllm export MODEL FOLDER` writes one."
        )
    return {path.name: _sha256(path) for path in (*paths, *weights)}


def _nearest(known: Sequence[Certificate], found: Mapping[str, str], dtype: str) -> str:
    """Describe the certificate that comes closest, for an error message."""
    if not known:
        return "the store has no certificate"
    for each in known:
        if each.files == found:
            return f"this model is certified in {each.dtype}"
        if each.dtype == dtype and each.files.keys() == found.keys():
            changed = sorted(name for name in found if each.files[name] != found[name])
            return f"{', '.join(changed)} differ from those of '{each.model_name}' ({each.fingerprint[:8]})"
    return f"certified are {', '.join(f'{each.model_name} ({each.fingerprint[:8]})' for each in known)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
