"""Load a model: the embedded agent model, a Hub id, a folder, or a GGUF file.

The embedded model is SmolLM2-135M-Instruct plus this package's LoRA adapter. Its base weights are fetched once (see
`fetch.py`), merged with the adapter, and stored as safetensors in a per-user cache folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from programmable_kv.cache.transformers_api import GROUPED_SDPA, register_attention
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidArgumentError, ModelUnavailableError
from programmable_kv.models.fingerprint import FileIdentity, fingerprint
from programmable_kv.models.loaded import remember
from programmable_kv.models.names import EMBEDDED
from programmable_kv.models.quiet import quiet_transformers
from programmable_kv.models.source import Source, find_source

_ATTENTION = ("sdpa", "eager")
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device` that spread a model over several devices."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Model:
    """A loaded model with its tokenizer, its engine, and a fingerprint of everything that its cache depends on."""

    name: str
    tokenizer: Any
    engine: Engine
    fingerprint: str = field(repr=False)

    def __post_init__(self) -> None:
        remember(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def position_limit(self) -> int | None:
        return self.engine.layout.position_limit


def load_model(
    name: str | Path = EMBEDDED,
    *,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model and its tokenizer.

    Args:
        name: "embedded", "embedded-plain" (the same model before its training for `visibility="design"`), a Hub id, a
            folder with a transformers model, or the path of a GGUF file.
        device: a device in the form of transformers' `device_map`; None leaves it to transformers.
        dtype: a floating-point torch dtype or its name, or "auto" for the dtype on disk; None means float32.
        attention: "sdpa", "eager", or None for this package's sdpa, which does not copy keys for each query group.
        revision: a branch, tag or commit of a Hub model.
        token: the Hub's access token; True for the one that `hf auth login` stored.
        trust_remote_code: run the code that comes with the model (transformers' option of this name).

    Raises:
        InvalidArgumentError: an argument has the wrong type, or the dtype or the attention is unknown.
        ModelUnavailableError: the weights or the device are not available; the message says why and what to do.
        UnsupportedModelError: the model does not cache keys and values for each token.
        MissingExtraError: an optional dependency is needed and not installed.
    """
    arguments: dict[str, Any] = {"dtype": _dtype(dtype)}
    if attention is not None:
        if attention not in _ATTENTION:
            raise InvalidArgumentError(f"attention must be one of {', '.join(_ATTENTION)}, or None; got {attention!r}")
        arguments["attn_implementation"] = attention
    placed = _device(device)
    direct = placed is not None and (placed in _SPREAD or find_spec("accelerate") is not None)
    if direct:
        arguments["device_map"] = placed
    source = find_source(name, revision=revision)
    given = {"revision": revision, "token": token, "gguf_file": source.gguf_file}
    shared: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    shared["trust_remote_code"] = trust_remote_code  # without it, transformers would ask on the terminal
    identity = FileIdentity.of(source, dtype=str(arguments["dtype"]), attention=str(attention))
    register_attention()
    model, tokenizer = _pretrained(str(name), source, shared, arguments)
    model.eval()
    if placed is not None and not direct:
        model.to(placed)
    if attention is None and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED_SDPA)
    _check_tokenizer(str(name), tokenizer)
    engine = Engine(model)  # raises for unsupported models before the weights are read for the fingerprint
    known = identity.fingerprint() if identity is not None else None
    if known is None:
        known = fingerprint(model, tokenizer)
        if identity is not None:
            identity.remember(known, source)
    return Model(str(name), tokenizer, engine, known)


def load_tokenizer(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Any:
    """Load only the tokenizer of a model, which is found as in `load_model`.

    Raises:
        ModelUnavailableError: the tokenizer could not be loaded.
    """
    from transformers import AutoTokenizer

    source = find_source(name, revision=revision)
    given = {"revision": revision, "token": token, "gguf_file": source.gguf_file}
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                source.place, **{key: value for key, value in given.items() if value is not None}
            )
    except Exception as error:  # as in `_pretrained`
        raise ModelUnavailableError(
            f"could not load the tokenizer of '{name}': {_first_line(error)} Check the name, the files and the network."
        ) from error


def wrap_model(model: Any, tokenizer: Any, *, name: str = "custom") -> Model:
    """Make a `Model` from a transformers model and its fast tokenizer that are already loaded.

    Raises:
        ModelUnavailableError: the tokenizer is not a fast one, so it does not say which characters a token covers.
        UnsupportedModelError: the model does not cache keys and values for each token.
    """
    _check_tokenizer(name, tokenizer)
    return Model(name, tokenizer, Engine(model), fingerprint(model, tokenizer))


def _pretrained(name: str, source: Source, shared: dict[str, Any], arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Load the model and its tokenizer without progress bars and warnings.

    Raises:
        ModelUnavailableError: transformers could not load them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(source.place, **shared, **arguments)
            tokenizer = AutoTokenizer.from_pretrained(source.place, **shared)
    # Damaged files and a model's own code may raise any type of error; the caller gets one type for all of them.
    except Exception as error:
        hint = "Check the name, the files and the network."
        if "trust_remote_code" in str(error):
            hint = "Read that code, and pass trust_remote_code=True to run it."
        elif source.gguf_file is not None:
            hint = "The file may be truncated: download it again."
        raise ModelUnavailableError(f"could not load '{name}': {_first_line(error)} {hint}") from error
    return model, tokenizer


def _dtype(given: str | torch.dtype | None) -> str | torch.dtype:
    if given is None:
        return torch.float32
    found = given if isinstance(given, torch.dtype) else getattr(torch, given, None) if isinstance(given, str) else None
    if isinstance(given, str) and given == "auto":
        return given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgumentError(
            "dtype must be a floating-point torch dtype or its name (float32, bfloat16, float16, float64), or 'auto'; "
            f"got {given!r}"
        )
    return found


def _device(given: str | int | torch.device | None) -> str | int | torch.device | None:
    """Check that a tensor can be created on the device, and return it.

    Raises:
        InvalidArgumentError: this is not a device or its name.
        ModelUnavailableError: the device cannot be used here.
    """
    if given is None or given in _SPREAD:
        return given
    if not isinstance(given, str | int | torch.device) or isinstance(given, bool):
        raise InvalidArgumentError(
            f"device must be a torch device or its name, or one of {', '.join(_SPREAD)}; got {given!r}"
        )
    try:
        torch.empty(1, device=given).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelUnavailableError(
            f"the device {str(given)!r} cannot be used here: {_first_line(error)} Omit the device to load on the CPU, "
            "or install the build of torch for it."
        ) from error
    return given


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelUnavailableError(
            f"the tokenizer of '{name}' does not report which characters a token covers (it is not a fast tokenizer), "
            "so field spans cannot be exact. Use a model with a tokenizer.json."
        )


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else line + "."
