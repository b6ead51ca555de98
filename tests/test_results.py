"""Numbers that results.py derives from runs."""

from types import SimpleNamespace

from medqa_lib.evaluation import results


def test_describe_gpu_time_by_hand():
    times = {
        "base": {"answer_time_s": 600.0},
        "exp_004": {"train_time_s": 1200.0, "answer_time_s": 600.0},
        "baseline_untuned_cut": {},
    }
    runs = {
        name: SimpleNamespace(metrics=metrics, config={"gpu": "NVIDIA T4"}) for name, metrics in times.items()
    }
    said = results.describe_gpu_time(runs, dollars_per_hour=6)
    assert "1 runs trained for at least 20 minutes" in said
    assert "answered for 20: at least 0.67 GPU hours, or $4.00 at an assumed $6 an hour." in said
    assert "since" not in said and said.endswith(
        "What was lost between a checkpoint and a stop is not counted."
    )
    assert (
        results.describe_gpu_time({"base": SimpleNamespace(config={"gpu": "none (CPU)"})})
        == "No GPU was used."
    )


def test_describe_origin_names_all_that_differ():
    runs = [
        SimpleNamespace(
            config={"identity": {"model": "m"}, "gpu": gpu, "date": "2026-01-02"}, metrics={"n_test": 1747}
        )
        for gpu in ("A", "B", "A")
    ]
    assert results.describe_origin(runs) == "m, n = 1,747 test questions, GPU A / B, 2026-01-02"


def test_summary_table_can_be_rounded():
    runs = {
        "a": SimpleNamespace(metrics={"rouge2": 0.123456, "n_test": 3, "note": "text"}),
        "line": SimpleNamespace(metrics={"rouge2": 0.2, "n_test": 3, "validation_loss": 2.34567}),
    }
    table = results.summary_table(runs).round(4)
    assert table.loc["a", "rouge2"] == 0.1235 and table.loc["line", "validation_loss"] == 2.3457
    assert table["n_test"].tolist() == [3, 3]
