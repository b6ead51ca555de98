"""The net under every change of structure: on the smoke profile, splits, adapters and scores stay what they were.

`python tests/test_golden.py` writes tests/golden/smoke.json anew. Do that only for a change that is meant to alter results,
and say so in the commit.
"""

import hashlib
import json
import os
import platform
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden" / "smoke.json"
RUNS = ("exp_003", "exp_004")


def describe_machine() -> dict:
    """What decides the last bits of a float32 sum: only on equal machines must adapters be equal bit for bit."""
    info = Path("/proc/cpuinfo")  # two makes with AVX512 add up in another order
    lines = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.+)$", info.read_text(), re.M)) if info.exists() else {}
    return {
        "processor": " ".join(lines.values()) or platform.processor(),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def measure(home: Path) -> dict:
    """Hashes of the splits, and of each run the adapter's SHA-256, each tensor's norm and the means of scores.csv."""
    from medqa_lib import config, data, training

    profile = config.PROFILES["smoke"]
    splits = data.prepare_splits(home=home)
    found = {"machine": describe_machine(), "splits": data.hash_splits(splits)}
    for name in RUNS:
        run = training.run_experiment(name, splits, profile, home)
        weights = home / "adapters" / profile.model_slug / name / "adapter_model.safetensors"
        found[name] = {
            "adapter_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "norms": {
                key: float(tensor.double().norm()) for key, tensor in sorted(load_file(weights).items())
            },
            "validation_loss": run.metrics["validation_loss"],
            "scores": {key: float(value) for key, value in run.scores.select_dtypes("number").mean().items()},
        }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_splits_are_what_they_were(found, golden):
    assert found["splits"] == golden["splits"]


@pytest.mark.parametrize("name", RUNS)
def test_adapters_are_what_they_were(name, found, golden):
    assert found[name]["norms"] == pytest.approx(golden[name]["norms"], rel=1e-4)
    assert found[name]["validation_loss"] == pytest.approx(golden[name]["validation_loss"], abs=1e-5)
    if found["machine"] == golden["machine"]:
        assert found[name]["adapter_sha256"] == golden[name]["adapter_sha256"]


@pytest.mark.parametrize("name", RUNS)
def test_scores_are_what_they_were(name, found, golden):
    assert found[name]["scores"] == pytest.approx(golden[name]["scores"], rel=1e-4, abs=1e-6)
    assert pd.Series(found[name]["scores"]).notna().all()


if __name__ == "__main__":
    import sys
    import tempfile

    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ["MEDQA_PROFILE"] = "smoke"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(measure(Path(folder)), indent=1) + "\n")
