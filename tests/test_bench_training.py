"""What the training benchmark concludes from its arms. The measuring itself needs a GPU; `bench_training.py --cpu` runs all of it."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "bench" / "bench_training.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_training", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arm(name, tokens_s, **more):
    return {"arm": name, "tokens_s": tokens_s, "losses": [2.0, 1.5], "norms": [1.0, 0.5], **more}


def test_summarize_compares_with_the_mean_of_the_repeated_arm(bench):
    rows = [
        arm("fast", 900, record_ms=100.0, recordings_in_400_steps=8, step_ms=48.0),
        arm("fast", 1100),
        arm("padded", 50),
        arm("Unsloth tuned, dropout 0", 500),
        arm("fast less graphs", 800),
        {"failed": "ablation", "error": "none"},
    ]
    ratios, memory, gain, graphs = bench.summarize(rows)
    assert memory == {"summary": "low memory: tokens/s, peak GiB", "Unsloth tuned, dropout 0": [500, 0.0]}
    assert ratios == {
        "summary": "fast / other arms",
        "fast": 1000,
        "runs": [900, 1100],
        "padded": 20.0,
        "Unsloth tuned, dropout 0": 2.0,
    }
    assert (gain["ingredient"], gain["without"], gain["gain_percent"]) == (
        "CUDA graphs",
        "fast less graphs",
        25.0,
    )
    assert graphs["share_of_400_steps"] == pytest.approx(0.8 / (0.8 + 400 * 0.048))


def test_summarize_judges_the_first_losses_of_every_arm_without_dropout(bench):
    rows = [
        arm("padded, dropout 0", 50),
        arm("fast", 900, losses=[9.0, 9.0]),
        arm("fast, dropout 0", 900, losses=[2.0005, 1.5]),
        arm("Unsloth tuned, dropout 0", 500),
        arm("Unsloth tuned, dropout 0", 500, norms=[1.0, 0.51]),
    ]
    agreement = {row["compared"]: row for row in bench.summarize(rows) if "compared" in row}
    assert {name: row["agrees"] for name, row in agreement.items()} == {
        "padded, dropout 0": True,
        "fast, dropout 0": True,
        "Unsloth tuned, dropout 0": False,
    }
    assert agreement["fast, dropout 0"]["loss"] == pytest.approx(5e-4)


def test_every_ablation_is_an_arm_that_is_measured(bench):
    """bench_training.py knows the arms of training_arms.py by name only."""
    source = (PATH.parent / "training_arms.py").read_text(encoding="utf-8")
    for name in bench.ABLATIONS.values():
        assert (
            f'"{name}"' in source
            or "multiples of" in name
            and 'f"fast, graphs for multiples of {bucket}"' in source
        )
