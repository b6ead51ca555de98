"""One of two processes under `accelerate launch` is killed: the launch ends and names it, and a new start ends as if nothing had been."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from fault_harness import EXPERIMENT
from safetensors.torch import load_file

pytestmark = pytest.mark.faults
SCRIPT = Path(__file__).with_name("several.py")
ANSWER_S = 120


def launch(home, fault="none none"):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        str(SCRIPT),
    ]
    variables = {
        **os.environ,
        "MEDQA_PROFILE": "smoke",
        "MEDQA_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "FAULT": fault,
        "PYTHONPATH": os.pathsep.join(
            [str(SCRIPT.parents[2]), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    start = time.monotonic()
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    return done, time.monotonic() - start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing has disturbed, and its seconds."""
    home = tmp_path_factory.mktemp("whole")
    done, seconds = launch(home)
    assert done.returncode == 0, done.stderr[-3000:]
    return home, seconds


@pytest.mark.parametrize("fault", ["1 step", "0 step", "0 save", "1 answers", "0 scores"])
def test_killed_process_is_named_and_the_next_start_ends_as_the_undisturbed_run(fault, whole, tmp_path):
    home, seconds = whole
    broken, broken_s = launch(tmp_path, fault)
    assert broken.returncode != 0
    assert f"rank      : {fault[0]}" in broken.stderr and "exitcode  : -9" in broken.stderr
    assert broken_s < seconds + ANSWER_S
    again, _ = launch(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Resuming from" in again.stdout
    mine, theirs = (
        load_file(each / "adapters" / "smoke-llama" / EXPERIMENT / "adapter_model.safetensors")
        for each in (tmp_path, home)
    )
    difference = max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)
    print(f"{fault}: ended after {broken_s:.0f} s, adapters differ by {difference:.1e}")
    assert difference <= (1e-3 if torch.cuda.is_available() else 1e-5)  # a GPU adds up in any order
    scores, expected = (
        pd.read_csv(each / "results" / "smoke-llama" / EXPERIMENT / "scores.csv") for each in (tmp_path, home)
    )
    if not torch.cuda.is_available():
        pd.testing.assert_frame_equal(scores, expected)
