"""Reads skills from a store without a model: tokens for the scheduler, relocated keys and values for a worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from programmable_kv.cache.rotation import Rotation
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.span import Span
from programmable_kv.errors import CorruptFileError, FingerprintMismatchError, FrequencyRegimeError, UnverifiedError
from programmable_kv.skills.entries import Entries
from programmable_kv.skills.packing import check_packed, unpacked
from programmable_kv.storage.files import Blobs, blobs_at
from programmable_kv.storage.manifests import Entry
from programmable_kv.storage.tensors import CachedShape, LayerShape, read_tensors
from programmable_kv.vllm_plugin.certificate import Certificate
from programmable_kv.vllm_plugin.matching import Piece

DEFAULT_KEPT = 2 * 2**30
"""bytes of keys and values that `StoredSkills` keeps in memory by default"""


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Which heads a worker has under tensor parallelism: share number `rank` of `size` equal shares."""

    rank: int = 0
    size: int = 1

    def of(self, heads: int) -> slice:
        """Return this worker's slice of a layer's heads. With fewer heads than workers, some workers share a head."""
        if heads < self.size:
            one = self.rank * heads // self.size
            return slice(one, one + 1)
        each = heads // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


class StoredSkills:
    """The skills of one certified model in one store."""

    def __init__(self, where: str | Path | Blobs, certificate: Certificate, *, kept: int = DEFAULT_KEPT) -> None:
        """`kept`: bytes of keys and values that stay in memory; the least recently used skills are dropped first."""
        self.certificate = certificate
        self._entries = Entries(blobs_at(where))
        self._kept = kept
        self._segments: OrderedDict[str, Segment] = OrderedDict()
        dtype: torch.dtype = getattr(torch, certificate.dtype)
        self._shapes: tuple[LayerShape, ...] = tuple(
            {"keys": CachedShape(each.heads, each.width, dtype), "values": CachedShape(each.heads, each.width, dtype)}
            for each in certificate.layers
        )

    def entry(self, which: str) -> Entry:
        """Return a stored skill's entry, which has its key and its tokens.

        Raises:
            UnknownSkillError: no skill, or more than one, matches `which`.
            CorruptFileError: the skill's manifest is damaged.
            FingerprintMismatchError: the skill was compiled with another model.
            StorageError: the store cannot be read.
        """
        entry = self._entries.entry(which, self.certificate.fingerprint)
        if entry.fingerprint != self.certificate.fingerprint:
            raise FingerprintMismatchError(
                f"skill {entry.name!r} was compiled by a model with fingerprint {entry.fingerprint[:8]}, but vLLM serves "
                f"'{self.certificate.model_name}' ({self.certificate.fingerprint[:8]}): compile it again"
            )
        return entry

    def relocated(
        self, piece: Piece, share: HeadShare, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values [H, n, D] layer by layer, relocated to the piece's position in the prompt.

        The tensors may share memory with the skill's cached copy: do not write to them. Errors are raised before the
        first layer.

        Raises:
            UnknownSkillError, CorruptFileError, FingerprintMismatchError, StorageError: the skill cannot be loaded.
            FrequencyRegimeError: the skill's keys were computed with other frequencies than those that relocation was
                proved for.
            UnverifiedError: there are gaps between the positions of the skill's tokens.
        """
        part = self._segment(piece.key).part(piece.tokens)
        return self._turned(part, piece.start, share, device)

    def _turned(
        self, part: Segment, start: int, share: HeadShare, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Keys are always rotated from their computed positions, so no error adds up however often a skill moves.
        rotation = Rotation(torch.arange(start, start + len(part)) - part.computed_at)
        for layer, (keys, values) in enumerate(zip(part.keys, part.values, strict=True)):
            heads = share.of(keys.shape[1])
            mine = keys[0, heads].to(device)
            turned = torch.empty_like(mine, memory_format=torch.contiguous_format)
            rotation.put(mine, self.certificate.rotary(layer), turned)
            yield turned, values[0, heads].to(device)

    def _segment(self, key: str) -> Segment:
        kept = self._segments.get(key)
        if kept is None:
            kept = self._segments[key] = self._read(key)
            held = sum(each.nbytes for each in self._segments.values())
            while held > self._kept and len(self._segments) > 1:
                held -= self._segments.popitem(last=False)[1].nbytes
        self._segments.move_to_end(key)
        return kept

    def _read(self, key: str) -> Segment:
        entry, body = self._entries.tensors(self.entry(key))
        where = self._entries.place(entry.tensors)
        tensors = read_tensors(body, where)
        check_packed(tensors, entry, self._shapes, where, limit=self.certificate.position_limit)
        segment = unpacked(tensors, entry, self._shapes, where, torch.device("cpu")).segment
        if segment.tables is not None and any(segment.tables):
            raise FrequencyRegimeError(
                f"skill {entry.name!r} was computed with rotary frequencies for which relocation is not proved: compile a "
                "shorter text"
            )
        if bool((segment.computed_at.diff() != 1).any()):
            raise UnverifiedError(
                f"skill {entry.name!r} has gaps between its positions, which vLLM does not allow: compile it with "
                "visibility 'causal'"
            )
        if len(segment) != len(entry.unit.ids):
            raise CorruptFileError(f"{where} has {len(segment)} tokens, but its manifest lists {len(entry.unit.ids)}")
        self._entries.touch(key)
        return segment


def tokens_of(piece: Piece) -> Span:
    """Return the piece's span in the prompt."""
    return Span(piece.start, piece.stop)
