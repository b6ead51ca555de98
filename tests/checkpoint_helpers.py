"""Checkpoints small enough to make by hand, for the tests of files and of the session."""

import json

from medqa_lib.training.checkpoints import write_manifest

IDENTITY = {"experiment": {"label_policy": "aligned", "lora": {"r": 8}}, "data": "abc"}


def make_checkpoint(folder, step, identity=IDENTITY):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(bytes([step]) * 1000)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if identity is not None:
        write_manifest(checkpoint, identity)
    return checkpoint


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))
