"""The fast paths for training and answering. Delete this folder and the project works as before, only slower.

`training.plan`, `evaluation.generation` call what this file names. Imports wait for a call: they are slow.
"""

from __future__ import annotations


def choose_path(model, wanted: str | None = None, examples: list[dict] | None = None) -> tuple[str, str]:
    """(fastest path proved exact for this model here, why not a faster one); `wanted`: try no other."""
    from medqa_lib.fast.paths import choose_path

    return choose_path(model, wanted, examples)


def prepare(model, path: str) -> None:
    """Let the PEFT `model` take the path's batches, and forget an earlier path."""
    from medqa_lib.fast.paths import prepare

    prepare(model, path)


def make_decoder(model, eos_id: int):
    """Callable (ids, mask, max_new_tokens) -> token ids per row up to and including EOS; or None."""
    from medqa_lib.fast.decode import FastDecoder, is_supported

    return FastDecoder(model, eos_id) if is_supported(model) else None
