"""The plugin in a vLLM worker: reads skills, moves them to their positions and writes them into the worker's cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from programmable_kv.errors import ProgrammableKVError, UnsupportedModelError
from programmable_kv.vllm_plugin.layout import PagedLayer
from programmable_kv.vllm_plugin.loading import HeadShare, StoredSkills, tokens_of
from programmable_kv.vllm_plugin.matching import Piece, blocks_of, slots_of
from programmable_kv.vllm_plugin.scheduling import Load

log = logging.getLogger("vllm.programmable_kv")


class Working:
    """Writes skills into the layers of a model that this worker has."""

    def __init__(self, skills: StoredSkills, block_size: int, share: HeadShare, device: torch.device) -> None:
        self._skills = skills
        self._block_size = block_size
        self._share = share
        self._device = device
        self._failed: set[int] = set()

    def load(self, loads: Sequence[Load], layers: dict[int, PagedLayer]) -> None:
        """Write every load. If a skill cannot be read, its blocks and the later blocks of the load are noted as failed.

        Args:
            layers: layer number in the model -> the layer's cache.

        Raises:
            UnsupportedModelError: a layer number is not among the certificate's layers.
        """
        count = len(self._skills.certificate.layers)
        if strange := sorted(number for number in layers if number >= count):
            raise UnsupportedModelError(
                f"vLLM has a cache for layer {strange[0]}, but the model that compiled the skills has only {count} layers: "
                "draft models cannot be used together with skills"
            )
        for load in loads:
            for number, piece in enumerate(load.pieces):
                try:
                    self._write(piece, load.block_ids, layers)
                except (ProgrammableKVError, OSError) as error:
                    log.error("request %s: skill %s is computed instead of loaded: %s", load.request, piece.key, error)
                    for lost in load.pieces[number:]:
                        self._failed.update(blocks_of(load.block_ids, tokens_of(lost), self._block_size))
                    break

    def failed(self) -> set[int]:
        """Return the blocks that could not be written since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def _write(self, piece: Piece, block_ids: Sequence[int], layers: dict[int, PagedLayer]) -> None:
        slots = torch.tensor(slots_of(block_ids, tokens_of(piece), self._block_size), device=self._device)
        for number, (keys, values) in enumerate(self._skills.relocated(piece, self._share, self._device)):
            if number in layers:
                layers[number].write(keys, values, slots)
