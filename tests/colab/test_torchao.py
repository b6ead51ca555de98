"""PEFT and torchao together, run and not only resolved: LoRA on a plain layer and on a 4-bit one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, types
sys.path[:0] = sys.argv[1:]
import importlib.metadata
import bitsandbytes, peft, torch

class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.config = layer, types.SimpleNamespace(to_dict=dict)
        self.is_loaded_in_4bit = isinstance(layer, bitsandbytes.nn.Linear4bit)

    def forward(self, x):
        return self.layer(x)

print("torchao", importlib.metadata.version("torchao"))
four_bit = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
four_bit.load_state_dict({"weight": torch.randn(64, 64), "bias": torch.zeros(64)})
for layer in (four_bit.to("cpu"), torch.nn.Linear(64, 64)):
    model = peft.get_peft_model(Model(layer), peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(3, 64)
    tuned = model(x)
    with model.disable_adapter():
        assert not torch.equal(tuned, model(x))
    tuned.sum().backward()
    print(type(layer).__name__, "ok")
"""


def run(folder, version):
    """The script with this torchao in front of whatever is installed here."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), version]
    subprocess.run(command, check=True, capture_output=True)
    return subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True)


@pytest.mark.slow  # both fetch a wheel
def test_lora_runs_with_the_torchao_that_the_requirements_give(tmp_path):
    lines = (Path(__file__).parents[2] / "requirements.txt").read_text().splitlines()
    done = run(tmp_path, next(line for line in lines if line.startswith("torchao")))
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("ok") == 2


@pytest.mark.slow
def test_lora_does_not_run_with_the_torchao_of_colabs_image(tmp_path):
    """Why torchao is in the requirements. Should this fail one day, PEFT has become tolerant and the line can go."""
    done = run(tmp_path, "torchao==0.10.0")
    assert "torchao 0.10.0" in done.stdout and "Linear4bit ok" in done.stdout
    assert done.returncode != 0 and "torchao" in done.stderr.splitlines()[-1]
