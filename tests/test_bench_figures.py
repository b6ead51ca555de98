"""What the benchmark's figures say, read back from the drawn objects."""

import pytest
from figures import plot_training_growth, plot_training_speed


def make_benchmark():
    """Made-up results of tests/bench/bench_training.py: an arm twice, one that only compares losses, one of the earlier form."""

    def arm(name, tokens_s, job, timed=36):
        return {
            "arm": name,
            "job": job,
            "tokens_s": tokens_s,
            "tokens_s_10_50_90": [tokens_s - 50, tokens_s, tokens_s + 70],
            "timed_steps": timed,
            "peak_gib": 9.5,
        }

    outside = {4: 30.0, 8: 20.0, 16: 12.0, 32: 1.0, 64: 1.0, 128: 1.0}
    growth = [
        {
            "arm": f"growth: {n}, {limit}",
            "growth_examples": n,
            "growth_tokens": limit,
            "tokens_a_step": n * limit // 4,
            "timed_steps": 8,
            "tokens_s": 1000 + n,
            "pass_ms": n * limit / 800 + limit / 256,
            "step_ms": n * limit / 800 + limit / 256 + outside[n],
            "filled": 1 / n,
        }
        for n in (128, 64, 32, 16, 8, 4)
        for limit in (256, 512)
    ]
    return [
        {"gpu": "Made-up GPU", "date": "2026-01-02", "rows": 32},
        arm("fast", 1000, "fast"),
        arm("fast", 2000, "fast.2"),
        arm("fast less graphs", 500, "ablation"),
        arm("flattened, dropout 0", 30, "flattened", 1),
        arm("Unsloth tuned, dropout 0", 700, "unsloth_tuned"),
        {"check": "kept", "ok": True},
        {"failed": "x", "error": "y"},
        {"arm": "padded", "tokens_s": 100, "tokens_s_10_90": [90, 120], "peak_gib": 2.5},
        {"arm": "padded, dropout 0", "tokens_s": 100, "tokens_s_10_90": [90, 120], "peak_gib": 2.5},
        *growth,
    ]


def test_plot_training_speed_draws_each_timed_arm_once():
    figure = plot_training_speed(make_benchmark())
    [panel] = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "padded",
        "Unsloth tuned, dropout 0",
        "fast",
    ]
    assert [bar.get_width() for bar in panel.patches] == [100, 700, 1500]
    assert [text.get_text() for text in panel.texts] == [
        "100  (2.5 GiB)",
        "700  (9.5 GiB)",
        "1,500  (9.5 GiB), 2 runs",
    ]
    assert [segment[:, 0].tolist() for segment in panel.collections[0].get_segments()] == [
        [90, 120],
        [650, 770],
        [950, 2070],
    ]
    assert (
        panel.get_xlabel() == "Real tokens / s"
        and "Made-up GPU, 32 examples a step" in figure.get_supxlabel()
    )


def test_plot_training_speed_adds_what_each_ingredient_gains():
    gains = [
        {"summary": "ablation", "ingredient": name, "gain_percent": gain}
        for name, gain in (("graphs", 200.0), ("filter", -0.4))
    ]
    _, panel = plot_training_speed(make_benchmark() + gains).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["filter", "graphs"]
    assert [text.get_text() for text in panel.texts] == ["-0.4%", "+200.0%"]
    assert panel.get_xlim()[0] < -0.4 and panel.get_xlim()[1] > 200


def test_plot_training_growth_draws_a_line_a_length_limit_and_each_pass():
    speed, time = plot_training_growth(make_benchmark()).axes
    whole = [line for line in speed.lines if line.get_linestyle() == "-"]
    assert [line.get_xydata()[:2].tolist() for line in whole] == [[[4, 1004], [8, 1008]]] * 2
    assert [label.get_text() for label in speed.get_xticklabels()] == ["4", "8", "16", "32", "64", "128"]
    passes = [line for line in time.lines if line.get_linestyle() == ":"]
    assert [line.get_xydata()[-1].tolist() for line in passes] == [[8192, 41.96], [16_384, 83.92]]
    hollow = [line.get_xdata().tolist() for line in speed.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[4, 8, 16], [4, 8, 16]]
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in (speed, time))


def test_plot_training_growth_gives_each_bend_its_reason():
    figure = plot_training_growth(make_benchmark())
    assert [text.get_text() for text in figure.legends[0].texts] == [
        f"at most {n} tokens an example" for n in (256, 512)
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["A", "B", "B", "C"] * 2
    said = " ".join(figure.get_supxlabel().split())
    assert (
        "A: the GPU waits" in said
        and "Steps of 256 to 2,048 tokens take 18 to 35 ms: 12 to 30 ms lie outside the pass" in said
    )
    assert "for its part of a step" not in said, "no arm without the ingredient that tells it"
    assert "B: the pass takes over: from 2,048 tokens on it is 92% of the step or more" in said
    assert "C: a pass takes about" in said
    assert (
        "8,192 tokens in examples of at most 512 take a pass of 43 ms, 8,192 in examples of at most 256 one of 42"
        in said
    )
    assert said.endswith("Made-up GPU, 2026-01-02; 8 timed steps a point (step: mean, pass: median).")


def test_plot_training_speed_says_when_nothing_was_timed():
    with pytest.raises(ValueError, match="no arm with four"):
        plot_training_speed([make_benchmark()[4]])
