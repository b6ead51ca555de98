"""On a GPU: the fast path learns what the plain one learns, on real rows with SmolLM2. Not in CI; MEDQA_DATA_DIR names the sources.

Without pytest-xdist: `python -m pytest -q -rP -o addopts=--import-mode=importlib tests/fast/test_paths_gpu.py`, about 90 seconds.
MEDQA_PREPARED_HOME names a home folder whose splits are used again.
"""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from medqa_lib.config import PROFILES, get_experiment, home_dir
from medqa_lib.data import hash_splits, prepare_splits
from medqa_lib.evaluation.results import run_identity
from medqa_lib.training.run import train_adapter
from medqa_lib.training.session import CheckpointSession

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
    pytest.mark.skipif("MEDQA_DATA_DIR" not in os.environ, reason="needs the real rows"),
]
PROFILE = dataclasses.replace(PROFILES["gpu"], model="smollm2-135m")
STEPS = 100


@pytest.fixture(scope="module")
def splits():
    return prepare_splits(home=Path(os.environ.get("MEDQA_PREPARED_HOME") or home_dir()))


def train(path, dropout, splits, folder, monkeypatch):
    """(loss history, numbers) of exp_004's recipe by one path."""
    recipe = get_experiment("exp_004")
    experiment = dataclasses.replace(
        recipe, max_steps=STEPS, lora=dataclasses.replace(recipe.lora, lora_dropout=dropout)
    )
    with CheckpointSession(folder, folder, run_identity(experiment, PROFILE, hash_splits(splits))) as session:
        return train_adapter(experiment, splits, PROFILE, session, folder / "adapter", path)


@pytest.mark.parametrize("dropout", [get_experiment("exp_004").lora.lora_dropout, 0.0])
def test_fast_path_learns_what_the_padded_one_learns(dropout, splits, tmp_path, monkeypatch):
    found = {}
    for path in ("fast", "padded"):
        losses, numbers = train(path, dropout, splits, tmp_path / path, monkeypatch)
        assert numbers["training_path"] == path and numbers["trained_steps"] == STEPS
        found[path] = losses[losses["split"] == "validation"].set_index("step")["loss"]
        trained = losses[losses["split"] == "train"].set_index("step")["loss"]
        print(
            f"dropout {dropout}, {path}: {numbers['train_time_s']:.1f} s, {numbers['trained_tokens']:,} tokens, training loss "
            f"{trained.round(4).to_dict()}, validation loss {found[path].round(4).to_dict()}"
        )
    difference = (found["fast"] - found["padded"]).abs()
    print(f"dropout {dropout}: validation loss differs by {difference.round(5).to_dict()}")
    assert difference[STEPS] <= 0.005
