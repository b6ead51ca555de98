"""The open cells of notebook 11 train the adapter that `run_experiment` trains, bit for bit, and resume it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from medqa_lib import config, data, labels, model, standin, training
from medqa_lib.evaluation import likelihood

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "11_exp_001_baseline.ipynb"


def open_cells():
    """The code cells from "# 1. The base model" to "# 5. Train"."""
    cells = [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    first, last = (next(i for i, cell in enumerate(cells) if cell.startswith(f"# {n}.")) for n in (1, 5))
    return cells[first : last + 1]


def run_cells(profile, home, splits):
    """Execute the cells, one after the other, as a kernel does; returns their names."""
    names = {
        "dataclasses": dataclasses,
        "profile": profile,
        "home": home,
        "splits": splits,
        "experiment": profile.scale(config.EXPERIMENTS["exp_001"]),
        **{"config": config, "data": data, "labels": labels, "model": model, "standin": standin},
        "likelihood": likelihood,
    }
    for cell in open_cells():
        exec(cell, names)
    return names


@pytest.fixture(scope="module", params=[4, 16], ids="{} rows a step".format)
def trained(request, tmp_path_factory):
    """16 rows are two passes a step, 4 rows are one."""
    home, profile = tmp_path_factory.mktemp("inline"), config.PROFILES["smoke"]
    profile = dataclasses.replace(profile, step_divisor=150, total_batch_size=request.param)
    splits = data.prepare_splits(home=home)
    training.run_experiment("exp_001", splits, profile, home)
    weights = home / "adapters" / profile.model_slug / "exp_001" / "adapter_model.safetensors"
    return home, profile, splits, load_file(weights)


def assert_equal_weights(folder, expected):
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    largest = max(float((found[name] - expected[name]).abs().max()) for name in found)
    assert largest == 0.0


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU run_experiment takes another path than the cells"
)
def test_cells_of_notebook_11_train_the_adapter_of_run_experiment(trained):
    home, profile, splits, expected = trained
    names = run_cells(profile, home, splits)
    assert_equal_weights(names["folder"], expected)
    assert float(expected["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].norm()) > 0


class Interrupted(Exception):
    pass


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU run_experiment takes another path than the cells"
)
def test_cells_of_notebook_11_go_on_after_an_interruption(trained, monkeypatch, tmp_path):
    _, profile, splits, expected = trained
    step = Trainer.training_step
    calls, passes = iter(range(100)), max(1, profile.total_batch_size // 8)

    def interrupted_step(self, *args, **kwargs):
        if next(calls) == 3 * passes:
            raise Interrupted
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "training_step", interrupted_step)
        run_cells(profile, tmp_path, splits)
    again = run_cells(profile, tmp_path, splits)
    assert again["latest_checkpoint"].endswith("checkpoint-2")
    assert_equal_weights(again["folder"], expected)
    third = run_cells(profile, tmp_path, splits)
    assert third["trainer"].state.global_step == 0, "a finished run is read, not trained on"
    assert_equal_weights(third["folder"], expected)
