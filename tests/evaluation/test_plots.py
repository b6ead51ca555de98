"""What the figures say: numbers and labels read back from the drawn objects, titles from the data."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color

from medqa_lib.evaluation import plots


def make_comparison(verdicts=("no difference", "better")):
    rows = []
    for metric, scale in (("rouge1", 1), ("bleu", 4), ("smog", 1)):
        for run, change, verdict in zip(("exp_003", "exp_004"), (-2.0, 10.0), verdicts, strict=True):
            middle = scale * change
            rows.append({"run": run, "metric": metric, "percent_change": middle, "percent_low": middle - 3,
                         "percent_high": middle + 3, "verdict": verdict, "n": 300, "family": 6})
    return pd.DataFrame(rows)


def intervals(panel):
    """Ends of the drawn intervals, from the top."""
    ends = [line.get_xdata() for line in panel.lines if len(line.get_xdata()) == 2]
    return [[float(low), float(high)] for low, high in ends if low != high]


def ticks(panel, axis="y"):
    return [label.get_text() for label in getattr(panel, f"get_{axis}ticklabels")()]


def test_plot_changes_has_a_panel_per_run_and_a_row_per_metric():
    figure = plots.plot_changes(make_comparison())
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("exp_003", "exp_004")
    assert ticks(first) == ["ROUGE-1 F1", "BLEU (0-100)"]  # readability is no quality
    assert intervals(first) == [[-5, 1], [-11, -5]] and intervals(second) == [[7, 13], [37, 43]]
    assert [text.get_text() for text in second.texts] == ["+10%", "+40%"]
    assert first.get_xlim() == second.get_xlim() and first.get_xlabel() == "Change (%)"
    assert "exp_004" in figure.get_suptitle() and "exp_003" not in figure.get_suptitle()
    assert "n = 300" in figure.get_supxlabel() and "over 6" in figure.get_supxlabel()


def test_plot_changes_marks_what_the_report_says_of_the_same_run():
    reported = {"exp_004": {"bleu": 223.28, "rouge2": 1.0}, "exp_001": {"bleu": 114.61}}
    first, second = plots.plot_changes(make_comparison(), reported=reported).axes
    crosses = [[line.get_xydata().tolist() for line in panel.lines if line.get_marker() == "x"] for panel in (first, second)]
    assert crosses == [[[]], [[[223.28, 1.0]]]]


def make_losses(step):
    rows = [("base", "validation", 0, 2.7), ("exp_004", "train", 100, 2.0), ("exp_004", "train", 50, 2.5),
            ("exp_004", "validation", step, 2.4), ("exp_004", "validation", 100, 2.1), ("exp_003", "validation", 100, 4.0)]
    return pd.DataFrame(rows, columns=["run", "split", "step", "loss"])


def test_plot_losses_names_the_runs_below_the_untuned_model():
    figure = plots.plot_losses(make_losses(50))
    train, validation = figure.axes
    assert [list(line.get_ydata()) for line in train.lines] == [[2.5, 2.0]]  # in the order of the steps
    assert [list(line.get_ydata()) for line in validation.lines] == [[4.0], [2.4, 2.1], [2.7, 2.7]]
    assert {text.get_text().strip() for text in validation.texts} == {"untuned", "exp_003", "exp_004"}
    assert "exp_004" in figure.get_suptitle() and "exp_003" not in figure.get_suptitle()
    assert "all pairs" in figure.get_supxlabel()


def test_plot_losses_takes_the_untuned_loss_of_the_curves_own_pairs_where_it_is_known():
    figure = plots.plot_losses(make_losses(0))
    assert list(figure.axes[1].lines[-1].get_ydata()) == [2.4, 2.4]
    assert "the same pairs" in figure.get_supxlabel()


def make_policy_table():
    return pd.DataFrame(
        {
            "base": (None, None, None, 2.0, 2.0, 300),
            "exp_001": (908, 5e-5, "preshifted", 4.0, 1.0, 300),
            "exp_001_aligned": (908, 5e-5, "aligned", 1.5, 3.0, 300),
            "exp_003": (400, 2e-4, "preshifted", 3.0, 2.0, 299),
        },
        index=["max_steps", "learning_rate", "label_policy", "validation_loss", "bleu", "n_test"],
    ).T


def test_plot_policy_table_puts_each_run_in_its_cell():
    figure = plots.plot_policy_table(make_policy_table())
    loss, bleu = figure.axes
    assert [text.get_text() for text in loss.texts] == ["4.00", "1.50", "3.00", "not run"]
    assert ticks(loss, "x") == ["shifted twice", "correct"]
    assert ticks(loss) == ["908 steps, 5e-5", "400 steps, 2e-4"]
    assert "untuned 2.00" in bleu.get_title()
    assert "n = 299 to 300 test questions" in figure.get_supxlabel()
    loss_gain, bleu_gain = (panel.collections[0].get_array().reshape(2, 2) for panel in (loss, bleu))
    assert loss_gain[0, 0] == pytest.approx(-1)  # twice the loss is as bad as half the BLEU
    assert bleu_gain[0, 0] == pytest.approx(-1)
    assert loss_gain[0, 1] > 0 and bleu_gain[0, 1] > 0
    assert np.ma.getmaskarray(loss_gain).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize(("bleu", "agrees"), [(41.0, "correct"), (44.0, None)])
def test_plot_ablation_names_the_policies_whose_intervals_hold_the_report(bleu, agrees):
    comparison = make_comparison().replace({"run": {"exp_003": "preshifted", "exp_004": "aligned"}})
    figure = plots.plot_ablation(comparison, {"rouge1": 9.0, "bleu": bleu})
    assert ticks(figure.axes[0]) == ["shifted twice", "correct"]
    assert intervals(figure.axes[1])[:2] == [[-11, -5], [37, 43]]
    assert bleu in [line.get_xdata()[0] for line in figure.axes[1].lines]
    assert (f"every metric: {agrees}" in figure.get_suptitle()) == bool(agrees)


def test_plot_slices_names_the_least_and_the_largest_gain():
    row = {"metric": "rouge2", "ci_low": 0.01, "ci_high": 0.2, "verdict": "better", "n": 10, "family": 2}
    slices = pd.DataFrame([{**row, "slice": "afrimedqa", "delta": 0.122}, {**row, "slice": "medquad", "delta": 0.034}])
    figure = plots.plot_slices(slices, "exp_005", "exp_004")
    assert ticks(figure.axes[0]) == ["AfriMed-QA (n = 10)", "MedQuAD (n = 10)"]
    assert figure.axes[0].get_xlabel() == "Difference to exp_004" and intervals(figure.axes[0])[0] == [0.01, 0.2]
    assert "+0.034 (MedQuAD) to +0.122 (AfriMed-QA)" in figure.get_suptitle()
    assert "untuned" in plots.plot_slices(slices, "exp_004").axes[0].get_xlabel()


def test_save_figure_writes_an_opaque_png_and_adds_to_the_caption(tmp_path, monkeypatch):
    from matplotlib.image import imread

    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    figure = plots.plot_changes(make_comparison())
    before = figure.get_supxlabel()
    path = plots.save_figure(figure, "changes", "a model, n = 3")
    assert path == tmp_path / "figures" / "changes.png" and figure.get_supxlabel() == f"{before}\na model, n = 3"
    pixels = imread(path)
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1
    assert list(pixels[0, 0, :3]) == [1, 1, 1] and same_color(figure.get_facecolor(), "white")
    assert plots.save_figure(figure, "x", folder=tmp_path / "new") == tmp_path / "new" / "x.png"
