"""A model's fingerprint: a digest of everything that determines the content of its cache.

Reading every weight takes seconds, so fingerprints are stored on disk by the identity of the files they were computed
from. The stored fingerprint is only a shortcut: if it is missing, damaged or cannot be written, the weights are read
again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from programmable_kv.cache.transformers_api import GROUPED_SDPA
from programmable_kv.errors import UnsupportedModelError
from programmable_kv.models.home import home
from programmable_kv.models.source import Source

FORMAT = 1
"""Version of the fingerprint; increase it when `fingerprint` reads something else."""
_SAME_NUMBERS = ("sdpa", GROUPED_SDPA)
"""Attention implementations that are equal up to rounding: the same fused kernel over the same keys, with query groups
folded or keys repeated. Their caches are interchangeable, so they share a fingerprint. Eager attention sums in another
order and dtype."""
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "quantization_config",
    }
)
"""Entries of a configuration that change no cached number, or that are visible in the weights themselves."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}\Z")
_SETTLED_NS = 2 * 10**9
"""A file must be unchanged for this long before it is identified by its times: within one tick of the file system's
clock it could change again without a new time."""


def fingerprint(model: Any, tokenizer: Any) -> str:
    """A digest of every weight and table, the configuration, the attention, the tokenizer and its chat template.

    The tokenizer's padding and truncation are excluded: each call sets them, they do not belong to the model.

    Raises:
        UnsupportedModelError: a weight is stored in a form that cannot be read, so two models could not be
            distinguished.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *_buffers(model), *_packed_weights(model)]:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _WITHOUT_EFFECT}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(_tokenizer_json(tokenizer).encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    attention = model.config._attn_implementation
    if attention not in _SAME_NUMBERS:
        digest.update(f"attention={attention}".encode())
    return digest.hexdigest()[:32]


def _buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Named buffers; for rotary frequencies, the tables that the model was loaded with.

    If the frequencies depend on the length, each forward may overwrite the table in use, and the model keeps the first
    one in another buffer.
    """
    for name, tensor in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        first = leaf.replace("inv_freq", "original_inv_freq") if "original" not in leaf else leaf
        yield name, getattr(model.get_submodule(path), first, tensor)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a load reads: its files, identified by path, size, times and inode, and the options of the load."""

    files: tuple[tuple[str, int, int, int, int], ...]
    """(resolved path, bytes, modified ns, changed ns, inode), ascending"""
    gguf_file: str | None
    dtype: str
    attention: str
    versions: tuple[str, ...]
    """versions of the fingerprint's format and of the libraries that affect it"""

    @classmethod
    def of(cls, source: Source, *, dtype: str, attention: str) -> FileIdentity | None:
        """The identity of a local source; None if its files do not determine the model or have only just been written.

        Files do not determine a Hub model, because the Hub decides what `from_pretrained` reads, or a folder with an
        adapter, because its base model is elsewhere.
        """
        folder = source.folder
        if folder is None or (folder / "adapter_config.json").exists():
            return None
        try:
            files = tuple(sorted(_identity(path) for path in _read_by_a_load(folder, source.gguf_file)))
        except OSError:
            return None
        if any(max(modified, changed) > time.time_ns() - _SETTLED_NS for _, _, modified, changed, _ in files):
            return None
        libraries = (f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
        return cls(files, source.gguf_file, dtype, attention, (f"fingerprint {FORMAT}", *libraries))

    def fingerprint(self) -> str | None:
        """The fingerprint that was stored for these files, or None."""
        try:
            note = json.loads(self._path().read_text(encoding="utf-8"))
            known, identity = note["fingerprint"], note["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = json.dumps(identity) == json.dumps(asdict(self))
        return known if same and isinstance(known, str) and _FINGERPRINT.match(known) else None

    def remember(self, known: str, source: Source) -> None:
        """Store the fingerprint, unless the files have changed since their identity was taken before the load."""
        if FileIdentity.of(source, dtype=self.dtype, attention=self.attention) != self:
            return
        path = self._path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix="partial-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"identity": asdict(self), "fingerprint": known}, file)
                Path(partial).replace(path)
            except OSError:
                Path(partial).unlink(missing_ok=True)
        except OSError:
            return  # a read-only home: the next load reads the weights again

    def _path(self) -> Path:
        key = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:24]
        return home() / "fingerprints" / f"{key}.json"


def _read_by_a_load(folder: Path, gguf_file: str | None) -> list[Path]:
    """The files of a folder that a load may read."""
    files = [path for path in folder.iterdir() if path.is_file()]
    if gguf_file is not None:  # other weights in the same folder (of downloads, for example) are not read
        files = [
            path for path in files if path.name == gguf_file or path.suffix in (".json", ".jinja", ".model", ".txt")
        ]
    templates = folder / "additional_chat_templates"
    return [*files, *(path for path in templates.glob("*") if path.is_file())]


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    resolved = path.resolve()
    stat = resolved.stat()
    return str(resolved), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer as JSON, without the padding and truncation that an earlier call may have set."""
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None or backend.truncation is not None:
        backend = copy.deepcopy(backend)
        backend.no_padding()
        backend.no_truncation()
    return str(backend.to_str())


def _packed_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    """The packed weights of quantised modules: they are in the state dict, but are neither parameters nor buffers."""
    plain = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    plain |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    found = []
    for name, packed in model.state_dict().items():
        if name in plain:
            continue
        for number, part in enumerate(packed if isinstance(packed, tuple) else (packed,)):
            if isinstance(part, torch.Tensor):
                found.append((f"{name}.{number}", part.int_repr() if part.is_quantized else part))
                if part.is_quantized:
                    found += [(f"{name}.{number}.{which}", tensor) for which, tensor in _scales(part)]
            elif part is None or isinstance(part, str | int | float | torch.dtype):
                found.append((f"{name}.{number}={part}", torch.empty(0)))
            else:
                raise UnsupportedModelError(
                    f"the weights in {name} are stored as {type(part).__name__}, which cannot be read, so this model's "
                    "caches cannot be distinguished from another model's. Load the model without this quantisation."
                )
    return found


def _scales(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Scales and zero points of a quantised tensor."""
    if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        return [("scales", tensor.q_per_channel_scales()), ("zeros", tensor.q_per_channel_zero_points())]
    return [("scale", torch.tensor([tensor.q_scale()])), ("zero", torch.tensor([tensor.q_zero_point()]))]
