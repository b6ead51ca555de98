"""The adapters in assets/adapters are the study's: for everybody's machine, and as good and as bad as the README says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from medqa_lib import config, data, labels
from medqa_lib.evaluation.likelihood import completion_loss
from medqa_lib.model import load_base_model, load_tokenizer
from medqa_lib.publish import hub

CPU = config.PROFILES["cpu"]
NAMES = ["exp_005", "exp_004", "exp_001", "exp_002", "exp_003"]


def test_without_runs_the_studys_adapters_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    found = hub.find_adapters(None, CPU)
    assert list(found) == NAMES
    for folder in found.values():
        settings = json.loads((folder / hub.CONFIG).read_text(encoding="utf-8"))
        assert settings["base_model_name_or_path"] == hub.public_name(CPU)
        weights = load_file(folder / hub.WEIGHTS)
        assert all(value.dtype == torch.float16 and value.isfinite().all() for value in weights.values())


@pytest.mark.slow  # SmolLM2 on a CPU
def test_correct_labels_lower_the_loss_and_shifted_ones_raise_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    monkeypatch.setenv("MEDQA_PROFILE", "cpu")
    tokenizer = load_tokenizer(CPU)
    pairs, _ = labels.encode_split(tokenizer, data.prepare_splits()["validation"].select(range(8)), 256, "aligned")
    base = load_base_model(CPU)
    loss = {"untuned": completion_loss(base, pairs)}
    model = hub.load_adapters(base, hub.find_adapters(None, CPU))
    for name in ("exp_005", "exp_004", "exp_003"):
        model.set_adapter(name)
        loss[name] = completion_loss(model, pairs)
    assert loss["exp_005"] < loss["exp_004"] < loss["untuned"] < loss["exp_003"], loss
