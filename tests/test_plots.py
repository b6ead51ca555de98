"""What the figures say: numbers, marks and labels read back from the drawn objects."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color

from medqa_lib.evaluation import plots

RUNS = ("exp_003", "exp_004")


def make_comparison():
    rows = []
    for metric, scale in (("rouge1", 1), ("bleu", 4), ("smog", 1)):
        for run, change, verdict in (("exp_003", -2.0, "no difference"), ("exp_004", 10.0, "better")):
            rows.append(
                {
                    "run": run,
                    "metric": metric,
                    "percent_change": scale * change,
                    "percent_low": scale * change - 3,
                    "percent_high": scale * change + 3,
                    "verdict": verdict,
                    "n": 300,
                }
            )
    return pd.DataFrame(rows)


def visible_panels(figure):
    return [panel for panel in figure.axes if panel.axison]


def caption(figure):
    return figure.get_supxlabel()


def test_plot_changes_draws_intervals_and_verdicts():
    figure = plots.plot_changes(make_comparison())
    assert [panel.get_title() for panel in visible_panels(figure)] == [
        "ROUGE-1 F1",
        "BLEU (0-100)",
    ]  # readability is no quality
    bleu = visible_panels(figure)[1]
    bars = [
        line
        for line in bleu.lines
        if len(line.get_xdata()) == 2 and line.get_xdata()[0] != line.get_xdata()[1]
    ]
    assert [list(bar.get_xdata()) for bar in bars] == [[-11, -5], [37, 43]]
    hollow, filled = (line for line in bleu.lines if len(line.get_xdata()) == 1)
    assert (hollow.get_xdata()[0], filled.get_xdata()[0]) == (-8, 40)
    assert same_color(hollow.get_markerfacecolor(), "white")
    assert same_color(filled.get_markerfacecolor(), plots.GREEN)
    assert [label.get_text() for label in visible_panels(figure)[0].get_yticklabels()] == list(RUNS)  # shared
    assert bleu.get_xlabel() == "Change (%)"
    assert "n = 300 test questions" in caption(figure)
    assert "original" not in caption(figure)


def test_plot_changes_marks_reported_runs_only_where_they_are():
    reported = pd.DataFrame(
        {"run": ["exp_004", "exp_001"], "metric": ["bleu", "bleu"], "percent_change": [223.28, 114.61]}
    )
    figure = plots.plot_changes(make_comparison(), reported=reported)
    crosses = [line for line in visible_panels(figure)[1].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[223.28]]
    assert "original report" in caption(figure)


def test_plot_losses_base_is_a_level_line():
    losses = pd.DataFrame(
        [
            ("base", "validation", 0, 2.7),
            ("exp_004", "train", 100, 2.0),
            ("exp_004", "train", 50, 2.5),
            ("exp_004", "validation", 50, 2.4),
            ("exp_004", "validation", 100, 2.1),
        ],
        columns=["run", "split", "step", "loss"],
    )
    figure = plots.plot_losses(losses)
    train, validation = figure.axes
    assert [list(line.get_ydata()) for line in train.lines] == [[2.5, 2.0]]  # in the order of the steps
    assert [list(line.get_ydata()) for line in validation.lines] == [[2.7, 2.7], [2.4, 2.1]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["base", "exp_004"]
    assert train.get_ylabel() == "Loss (nats / token)"


def make_policy_table():
    return pd.DataFrame(
        {
            "base": (None, None, None, 2.0, 2.0, 300),
            "exp_001": (908, 5e-5, "preshifted", 4.0, 1.0, 300),
            "exp_001_aligned": (908, 5e-5, "aligned", 1.5, 3.0, 300),
            "exp_003": (400, 2e-4, "preshifted", 3.0, 2.0, 299),
        },
        index=["max_steps", "learning_rate", "labels", "validation_loss", "bleu", "n_test"],
    ).T


def test_plot_policy_table_puts_each_run_in_its_cell():
    figure = plots.plot_policy_table(make_policy_table())
    loss, bleu = figure.axes
    assert [text.get_text() for text in loss.texts] == ["4.00", "1.50", "3.00", "not run"]
    assert [label.get_text() for label in loss.get_xticklabels()] == ["preshifted", "aligned"]
    assert [label.get_text() for label in loss.get_yticklabels()] == ["908 steps, 5e-5", "400 steps, 2e-4"]
    assert "base 2.00" in bleu.get_title()
    assert "n = 299 to 300 test questions a run" in caption(figure)
    loss_gain, bleu_gain = (panel.images[0].get_array() for panel in (loss, bleu))
    assert loss_gain[0, 0] == pytest.approx(-1)  # twice the loss is as bad as half the BLEU
    assert bleu_gain[0, 0] == pytest.approx(-1)
    assert loss_gain[0, 1] > 0 and bleu_gain[0, 1] > 0
    assert np.ma.getmaskarray(loss_gain).tolist() == [[False, False], [False, True]]


def test_plot_score_distributions_shows_every_run_and_metric_that_is_there():
    scores = pd.DataFrame(
        {"run": ["base"] * 5 + ["exp_004"] * 5, "rougeL": np.linspace(0, 1, 10), "words": np.arange(10)}
    )
    figure = plots.plot_score_distributions(scores)
    assert [panel.get_xlabel() for panel in figure.axes] == ["ROUGE-L F1", "Length (words)"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["base", "exp_004"]
    assert "n = 5 test questions a run" in caption(figure)


def test_save_figure_writes_an_opaque_png(tmp_path, monkeypatch):
    from matplotlib.image import imread

    monkeypatch.setenv("MEDQA_FIGURES", str(tmp_path / "new"))
    path = plots.save_figure(plots.plot_changes(make_comparison()), "changes")
    assert path == tmp_path / "new" / "changes.png"
    pixels = imread(path)
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1
    assert list(pixels[0, 0, :3]) == [1, 1, 1]


def test_save_figure_adds_what_was_measured_to_the_caption(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_FIGURES", str(tmp_path))
    figure = plots.plot_changes(make_comparison())
    before = figure.get_supxlabel()
    plots.save_figure(figure, "changes", "a model, n = 3, a GPU, a day")
    assert figure.get_supxlabel() == f"{before}\na model, n = 3, a GPU, a day"


def test_save_figure_goes_to_home_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDQA_FIGURES", raising=False)
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    assert plots.save_figure(plots.plot_changes(make_comparison()), "x") == tmp_path / "figures" / "x.png"


def test_figures_have_opaque_white_pages_and_labelled_axes():
    figures = [plots.plot_changes(make_comparison()), plots.plot_policy_table(make_policy_table())]
    for figure in figures:
        assert same_color(figure.get_facecolor(), "white")
        assert all(panel.get_xlabel() for panel in visible_panels(figure))
        assert caption(figure)


def test_plot_funnel_draws_steps_that_remove_rows():
    funnel = pd.DataFrame(
        {"step": ["raw rows", "clean", "empty"], "rows": [2000, 2000, 1500], "removed": [0, 0, 500]}
    )
    [panel] = plots.plot_funnel(funnel).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["raw rows", "empty"]
    assert [bar.get_width() for bar in panel.patches] == [2000, 1500, 0, 500]
    assert [text.get_text() for text in panel.texts] == ["2,000", "1,500  (-500)"]


def test_plot_lengths_counts_all_pairs_and_those_beyond_the_limit():
    lengths = pd.DataFrame({"source": ["medquad"] * 4 + ["afrimedqa"], "tokens": [10, 96, 97, 900, 20]})
    figure = plots.plot_lengths(lengths, 96)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == [
        "medquad: 4 pairs, median 96, 50.0% longer",
        "afrimedqa: 1 pairs, median 20, 0.0% longer",
    ]
    assert [sum(bar.get_height() for bar in panel.patches) for panel in figure.axes] == [4, 1]
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in figure.axes)


def test_plot_search_shows_every_trial_with_its_loss_or_its_status():
    table = pd.DataFrame(
        {
            "round": [1, 1, 2],
            "name": ["a", "b", "a+c"],
            "validation_loss": [2.5, np.nan, 2.25],
            "status": ["done", "failed: out of luck", "done"],
        }
    )
    [panel] = plots.plot_search(table).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b", "a + c"]
    assert [text.get_text() for text in panel.texts] == ["2.5000", "failed: out of luck", "2.2500"]
    assert panel.lines[1].get_xydata().tolist() == [[2.25, 2]]
    assert panel.get_xlabel() == "Validation loss (nats / token)"
