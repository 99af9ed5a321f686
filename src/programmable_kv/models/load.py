"""Load a model: the embedded agent model, a Hub id, a folder, or a GGUF file; and fingerprint it.

The embedded model is SmolLM2-135M-Instruct plus this package's LoRA adapter. Its base weights are fetched once (see
`weights.py`), joined with the adapter, and kept as safetensors in a per-user cache folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from programmable_kv.cache.transformers_api import GROUPED_SDPA, register_attention
from programmable_kv.engine import Engine
from programmable_kv.errors import ModelUnavailableError, UnsupportedModelError

EMBEDDED = "embedded"
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
"""entries of a configuration that change no cached number, or that the weights themselves show"""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model with its tokenizer, the engine that runs it, and a fingerprint of all that its cache depends on."""

    name: str
    tokenizer: Any
    engine: Engine
    fingerprint: str = field(repr=False)

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
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
) -> Model:
    """Load a causal language model and its tokenizer.

    Args:
        name: "embedded", a Hub id, a folder with a transformers model, or the path of a GGUF file.
        device: as transformers' `device_map` spells it; the model's default when None.
        dtype: a torch dtype or its name, or "auto" for the dtype on disk; float32 when None.
        attention: "sdpa", "eager", or None for sdpa that never repeats keys for their query groups.

    Raises:
        ModelUnavailableError: the weights could not be had, with the reason and what to do.
        UnsupportedModelError: the model does not cache keys and values for each token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    register_attention()
    arguments: dict[str, Any] = {"dtype": dtype if dtype is not None else torch.float32}
    if device is not None:
        arguments["device_map"] = device
    if attention is not None:
        arguments["attn_implementation"] = attention
    source: dict[str, Any] = {}
    folder = name
    if str(name) == EMBEDDED:
        from programmable_kv.models.fetch import embedded_folder

        folder = embedded_folder()
    elif Path(name).suffix == ".gguf":
        if not Path(name).is_file():
            raise ModelUnavailableError(f"there is no GGUF file at {name}. Check the path.")
        folder, source = Path(name).parent, {"gguf_file": Path(name).name}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **source, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelUnavailableError(
            f"could not load '{name}': {_first_line(error)} Give 'embedded', a Hub id that can be reached, a folder with "
            "config.json and weights, or a .gguf file."
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model.eval()
    if attention is None and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED_SDPA)
    return wrap_model(model, tokenizer, name=str(name))


def wrap_model(model: Any, tokenizer: Any, *, name: str = "custom") -> Model:
    """A `Model` from a transformers model and its fast tokenizer that are loaded already."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelUnavailableError(
            f"the tokenizer of '{name}' cannot tell which characters a token covers (it is not a fast tokenizer), so field "
            "spans cannot be exact. Use a model with a tokenizer.json."
        )
    return Model(name, tokenizer, Engine(model), fingerprint(model, tokenizer))


def fingerprint(model: Any, tokenizer: Any) -> str:
    """A digest of all that decides a cache's content: every weight and table, configuration, tokenizer, chat template.

    Raises:
        UnsupportedModelError: a weight is kept in a form that cannot be read, so two models could not be told apart.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *_packed_weights(model)]:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _WITHOUT_EFFECT}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    return digest.hexdigest()[:32]


def _packed_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    """What a module with quantised weights packs away: neither parameter nor buffer, but in its state."""
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
                    f"the weights in {name} are kept as {type(part).__name__}, which cannot be read, so a cache could not be "
                    "told from another model's. Load the model without this quantisation."
                )
    return found


def _scales(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Scales and zero points of a quantised tensor."""
    if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        return [("scales", tensor.q_per_channel_scales()), ("zeros", tensor.q_per_channel_zero_points())]
    return [("scale", torch.tensor([tensor.q_scale()])), ("zero", torch.tensor([tensor.q_zero_point()]))]


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else line + "."
