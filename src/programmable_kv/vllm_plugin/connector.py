"""`SkillConnector`: the plugin as a `KVConnectorBase_V1` of vLLM. Only this module imports vLLM.

Written for vLLM 0.32.

vllm serve FOLDER --kv-transfer-config '{"kv_connector": "SkillConnector",
    "kv_connector_module_path": "programmable_kv.vllm_plugin.connector", "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"store": "STORE"}}'
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from programmable_kv.errors import InvalidArgumentError, UnsupportedModelError
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.certificate import certificate_of
from programmable_kv.vllm_plugin.layout import PACKED, PagedLayer, WritePacked, paged_layer
from programmable_kv.vllm_plugin.loading import DEFAULT_KEPT, HeadShare, StoredSkills
from programmable_kv.vllm_plugin.marks import SALT_PREFIX
from programmable_kv.vllm_plugin.scheduling import Load, Request, Scheduling
from programmable_kv.vllm_plugin.working import Working

_OPTIONS = {"store", "salt_prefix", "kept_bytes"}


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The loads that the scheduler sends to the workers before a forward."""

    loads: tuple[Load, ...]


class SkillConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads the skills that a prompt's marks name, moved to their positions, so that vLLM does not prefill them."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """
        Raises:
            InvalidArgumentError: an option is missing or unknown, or a failed load would fail the request.
            UnsupportedModelError: vLLM serves the model with a setting under which the skills were not computed.
            FingerprintMismatchError: the store is not certified for the model that vLLM serves.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        options = _options(vllm_config)
        _check_served(vllm_config)
        if (groups := len(kv_cache_config.kv_cache_groups)) != 1:
            raise UnsupportedModelError(
                f"vLLM keeps the model's layers in {groups} groups of blocks, but skills can be written into one group only. "
                "Serve the model with --disable-hybrid-kv-cache-manager."
            )
        served = vllm_config.model_config
        blobs = blobs_at(options["store"])
        dtype = str(served.dtype).removeprefix("torch.")
        certificate = certificate_of(blobs, served.model, dtype)
        self._skills = StoredSkills(blobs, certificate, kept=int(options.get("kept_bytes", DEFAULT_KEPT)))
        self._block_size = int(vllm_config.cache_config.block_size)
        self._scheduling: Scheduling | None = None
        self._working: Working | None = None
        self._layers: dict[int, PagedLayer] = {}
        self._caches: dict[str, torch.Tensor] = {}
        self._computed: dict[str, int] = {}
        if role == KVConnectorRole.SCHEDULER:
            prefix = str(options.get("salt_prefix", SALT_PREFIX))
            self._scheduling = Scheduling(self._skills, self._block_size, salt_prefix=prefix)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: the connector hands no keys and values to another vLLM instance."""
        return False

    # -- in the scheduler ------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count = self._in_scheduler.matched(_request(request), num_computed_tokens)
        if count:
            self._computed[request.request_id] = num_computed_tokens
        return count, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        computed = self._computed.pop(request.request_id, None)
        if num_external_tokens and computed is not None:
            (block_ids,) = blocks.get_block_ids()
            self._in_scheduler.allocated(_request(request), computed, num_external_tokens, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        return Loads(self._in_scheduler.drain())

    def update_connector_output(self, connector_output: Any) -> None:
        self._in_scheduler.failed(sorted(connector_output.invalid_block_ids or ()))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._computed.pop(request.request_id, None)
        return False, self._in_scheduler.finished(request.request_id)

    @property
    def _in_scheduler(self) -> Scheduling:
        assert self._scheduling is not None
        return self._scheduling

    # -- in a worker -----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = dict(kv_caches)
        device = next(iter(kv_caches.values())).device
        parallel = self._vllm_config.parallel_config.tensor_parallel_size
        share = HeadShare(get_tensor_model_parallel_rank() if parallel > 1 else 0, parallel)
        self._working = Working(self._skills, self._block_size, share, device)
        layers = self._vllm_config.compilation_config.static_forward_context
        for name, cache in kv_caches.items():
            number = extract_layer_index(name)
            if number >= len(self._skills.certificate.layers):
                raise UnsupportedModelError(
                    f"vLLM has a cache for {name}, but the model that compiled the skills has only "
                    f"{len(self._skills.certificate.layers)} layers. Serve it without a draft model."
                )
            known = self._skills.certificate.layers[number]
            heads = share.of(known.heads)
            self._layers[number] = paged_layer(
                name,
                layers[name].attn_backend.get_name(),
                cache,
                heads=heads.stop - heads.start,
                width=known.width,
                block_size=self._block_size,
                dtype=getattr(torch, self._skills.certificate.dtype),
                write_packed=_writer(layers[name]),
            )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        if metadata.loads:
            assert self._working is not None
            self._working.load(metadata.loads, self._layers)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._working.failed() if self._working is not None else set()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: all layers are written before the forward starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: what vLLM computes is not stored as a skill."""

    def wait_for_save(self) -> None:
        """Do nothing: nothing is saved."""


def _options(vllm_config: Any) -> dict[str, Any]:
    transfer = vllm_config.kv_transfer_config
    options = dict(transfer.kv_connector_extra_config or {})
    if not options.get("store") or not options.keys() <= _OPTIONS:
        raise InvalidArgumentError(
            f"kv_connector_extra_config takes {', '.join(sorted(_OPTIONS))}; 'store', the folder or URL of a skill store, is "
            f"required. Got {sorted(options)}."
        )
    if transfer.kv_load_failure_policy != "recompute":
        raise InvalidArgumentError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: a skill that cannot be read would fail its "
            "request. Set it to 'recompute'."
        )
    return options


def _check_served(vllm_config: Any) -> None:
    """
    Raises:
        UnsupportedModelError: vLLM's settings give other keys and values than those the library computed from the same
            files.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    reasons: Iterable[tuple[bool, str]] = (
        (model.quantization is not None, f"quantisation ({model.quantization})"),
        (bool(model.hf_overrides), "hf_overrides"),
        (cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")), f"a {cache.cache_dtype} cache"),
        (vllm_config.speculative_config is not None, "a draft model"),
        (getattr(parallel, "decode_context_parallel_size", 1) > 1, "context parallelism"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "context parallelism"),
    )
    for found, what in reasons:
        if found:
            raise UnsupportedModelError(
                f"vLLM serves the model with {what}, but the skills were computed without it: serve without it, or without "
                "the connector"
            )


def _request(request: Any) -> Request:
    other = ""
    if request.lora_request is not None:
        other = f"the adapter {request.lora_request.lora_name}"
    elif request.mm_features:
        other = "images or sound"
    prompt = request.prompt_token_ids if getattr(request, "prompt_embeds", None) is None else None
    return Request(request.request_id, prompt, request.cache_salt, request.kv_transfer_params, other)


def _writer(layer: Any) -> WritePacked | None:
    """Return vLLM's own function that writes the CPU's packed blocks, bound to a layer; None for other backends."""
    if layer.attn_backend.get_name() != PACKED:
        return None
    from vllm import _custom_ops as ops

    def write(
        keys: torch.Tensor, values: torch.Tensor, of_keys: torch.Tensor, of_values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        ops.cpu_attn_reshape_and_cache(keys, values, of_keys, of_values, slots, layer.isa)

    return write
