"""Greedy decoding at the speed of the hardware: not written yet, so `generation` uses `generate()`."""

from __future__ import annotations


def is_supported(model) -> bool:
    """Whether `FastDecoder` can decode with this model here."""
    return False


def cut_after_eos(ids: list[int], eos_id: int) -> list[int]:
    """The ids up to and including the first EOS."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
