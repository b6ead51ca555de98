"""What the benchmark's figures say, read back from the drawn objects."""

import pytest
from figures import plot_training_growth, plot_training_speed


def make_benchmark():
    """Made-up results of tests/bench/bench_training.py: an arm twice, one that only compares losses, one of the earlier form."""
    def arm(name, tokens_s, job, timed=36):
        return {"arm": name, "job": job, "tokens_s": tokens_s, "tokens_s_10_50_90": [tokens_s - 50, tokens_s, tokens_s + 70],
                "timed_steps": timed, "peak_gib": 9.5}

    growth = [{"arm": f"growth: {n}, {limit}", "growth_examples": n, "growth_tokens": limit, "tokens_a_step": n * limit // 4,
               "tokens_s": 1000 + n, "step_ms": 12.0 + n, "pass_ms": 10.0 + n, "filled": 1 / n} for n in (32, 8) for limit in (256, 512)]
    return [{"gpu": "Made-up GPU", "date": "2026-01-02", "rows": 32}, arm("fast", 1000, "fast"), arm("fast", 2000, "fast.2"),
            arm("fast less graphs", 500, "ablation"), arm("flattened, dropout 0", 30, "flattened", 1),
            arm("Unsloth tuned, dropout 0", 700, "unsloth_tuned"), {"check": "kept", "ok": True}, {"failed": "x", "error": "y"},
            {"arm": "padded", "tokens_s": 100, "tokens_s_10_90": [90, 120], "peak_gib": 2.5},
            {"arm": "padded, dropout 0", "tokens_s": 100, "tokens_s_10_90": [90, 120], "peak_gib": 2.5}, *growth]


def test_plot_training_speed_draws_each_timed_arm_once():
    figure = plot_training_speed(make_benchmark())
    [panel] = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["padded", "Unsloth tuned, dropout 0", "fast"]
    assert [bar.get_width() for bar in panel.patches] == [100, 700, 1500]
    assert [text.get_text() for text in panel.texts] == ["100  (2.5 GiB)", "700  (9.5 GiB)", "1,500  (9.5 GiB), 2 runs"]
    assert [segment[:, 0].tolist() for segment in panel.collections[0].get_segments()] == [[90, 120], [650, 770], [950, 2070]]
    assert panel.get_xlabel() == "Real tokens / s" and "Made-up GPU, 32 examples a step" in figure.get_supxlabel()


def test_plot_training_speed_adds_what_each_ingredient_gains():
    gains = [{"summary": "ablation", "ingredient": name, "gain_percent": gain} for name, gain in (("graphs", 200.0), ("filter", -0.4))]
    _, panel = plot_training_speed(make_benchmark() + gains).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["filter", "graphs"]
    assert [text.get_text() for text in panel.texts] == ["-0.4%", "+200.0%"]
    assert panel.get_xlim()[0] < -0.4 and panel.get_xlim()[1] > 200


def test_plot_training_growth_draws_a_line_a_length_limit_and_the_pass_alone():
    figure = plot_training_growth(make_benchmark())
    by_examples, by_tokens = figure.axes
    assert [line.get_xydata().tolist() for line in by_examples.lines] == [[[8, 1008], [32, 1032]]] * 2
    assert [label.get_text() for label in by_examples.get_xticklabels()] == ["8", "32"]
    passes = [line for line in by_tokens.lines if line.get_linestyle() == ":"]
    assert passes[0].get_xydata().tolist() == [[512, 1e3 * 512 / 18], [2048, 1e3 * 2048 / 42]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["at most 256 tokens", "at most 512 tokens"]
    assert "12% of the real tokens at 512 a step, 3% at 4,096" in figure.get_supxlabel()
    assert "2.0 to 2.0 ms a step are outside it (10% of the smallest step, 5% of the largest)" in figure.get_supxlabel()
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in figure.axes)


def test_plot_training_speed_says_when_nothing_was_timed():
    with pytest.raises(ValueError, match="no arm with four"):
        plot_training_speed([make_benchmark()[4]])
