"""medqa_lib/fast only makes things faster: a copy of the package without it trains, answers and scores the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from pathlib import Path

# an editable installation would give medqa_lib.fast of this repository
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import medqa_lib
from medqa_lib.training import run_experiment
assert Path(medqa_lib.__file__).is_relative_to(sys.argv[1]) and "medqa_lib.fast" not in sys.modules
run = run_experiment("exp_004")
assert run.metrics["validation_loss"] > 0 and run.metrics["training_path"] == "padded", run.metrics
assert len(run.scores) and run.scores["rouge1"].notna().all(), run.scores
"""


@pytest.mark.slow  # an experiment of the smoke profile in a process of its own
def test_the_package_trains_answers_and_scores_without_fast(tmp_path):
    shutil.copytree(
        ROOT / "medqa_lib", tmp_path / "medqa_lib", ignore=shutil.ignore_patterns("__pycache__", "fast")
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "MEDQA_HOME": str(tmp_path / "home"),
        "MEDQA_PROFILE": "smoke",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_fast_is_imported_in_two_places_only():
    library = ROOT / "medqa_lib"
    texts = {path.relative_to(library): path.read_text(encoding="utf-8") for path in library.rglob("*.py")}
    importing = [
        path.as_posix()
        for path, text in texts.items()
        if path.parts[0] != "fast" and ("medqa_lib.fast" in text or "import fast" in text)
    ]
    assert sorted(importing) == ["evaluation/generation.py", "training/plan.py"]
