"""On a GPU: interrupted and resumed equals never interrupted, and memory that really runs out changes no result. Not in CI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.test_resume import Interrupted, interrupt_after, make_splits, record_batches, train

from medqa_lib.config import LoraSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
ROOT = Path(__file__).parents[2]
SETTINGS = {
    "max_steps": 12,
    "logging_steps": 2,
    "save_steps": 2,
    "learning_rate": 0.02,
}  # a rate at which 12 steps change the loss


@pytest.fixture(params=[None, "padded"], ids=["chosen", "padded"])
def path(request):
    """The training path that this GPU gets, and the plain one."""
    return request.param


def watched(monkeypatch, splits, folder, stop_after=None, **settings):
    """A run with what it did on the way: (step, learning rate) after each step, (step, hash) of each batch."""
    rates, batches = [], []
    with monkeypatch.context() as patch:
        record_batches(patch, batches)
        interrupt_after(patch, stop_after, rates)
        run = train(splits, folder, **SETTINGS | settings)
    return run, rates, batches


def test_resumed_equals_uninterrupted(path, tmp_path, monkeypatch):
    splits = make_splits(30)
    whole, rates, batches = watched(monkeypatch, splits, tmp_path / "whole", path=path)
    with pytest.raises(Interrupted):
        watched(monkeypatch, splits, tmp_path / "resumed", stop_after=7, path=path)
    resumed, rates_after, batches_after = watched(monkeypatch, splits, tmp_path / "resumed", path=path)
    assert [step for step, _ in rates_after] == list(range(7, 13)), "goes on from checkpoint-6"
    assert rates_after == rates[6:] and batches_after == [batch for batch in batches if batch[0] >= 6]
    assert resumed.tokens == whole.tokens and list(resumed.losses["step"]) == list(whole.losses["step"])
    difference = (resumed.losses["loss"] - whole.losses["loss"]).abs().max()
    print(
        f"{path}: loss {whole.losses['loss'].iloc[0]:.4f} -> {whole.losses['loss'].iloc[-1]:.4f}, resumed differs by {difference:.1e}"
    )
    assert whole.losses["loss"].iloc[0] - whole.losses["loss"].iloc[-1] > 0.1
    assert difference <= 1e-3


def test_real_out_of_memory_halves_the_micro_batch(path, tmp_path):
    enough, said, full_bytes = run_alone(tmp_path / "enough", path)
    assert "512 rows x 1" in said
    # what a path needs at once is less than what it has reserved by the end, by a share that only a trial tells
    for share in (0.8, 0.65, 0.5, 0.4, 0.3):
        little, said, capped_bytes = run_alone(tmp_path / f"little_{share}", path, share * full_bytes)
        if "Out of GPU memory." in said:
            break
    assert "512 did not fit" in said
    print(f"{path}: {full_bytes / 2**20:.0f} MiB without a limit, {capped_bytes / 2**20:.0f} MiB with one")
    assert little["tokens"] == enough["tokens"]
    assert little["losses"] == pytest.approx(enough["losses"], abs=1e-3)


def run_alone(folder, path, limit=0.0):
    """Two steps in a process of its own, so that no other run's memory counts: its numbers, output, bytes reserved."""
    command = [sys.executable, __file__, str(folder), path or "", str(limit)]
    imports = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": imports}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(done.stdout.splitlines()[-1])
    return numbers, done.stdout, numbers["reserved"]


def run_child(folder, path, limit):
    if float(limit):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(limit) / total)
    rows = 512  # of this small model: enough for activations to outweigh what torch and cuBLAS take for themselves
    changes = {"total_batch_size": rows, "max_steps": 2, "lora": LoraSettings(lora_dropout=0.0)}  # masks: one a micro-batch
    run = train(make_splits(rows), Path(folder), path or None, **SETTINGS | changes)
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    print(json.dumps({"tokens": int(run.tokens), "losses": list(run.losses["loss"]), "reserved": reserved}))


if __name__ == "__main__":
    run_child(*sys.argv[1:])
