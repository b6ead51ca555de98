"""Time of the fast path on a T4 by arithmetic: floating-point operations, bytes and launches of a step, divided by what the card sustains.

    python tests/bench/t4_model.py

Nobody has run it on a T4. The same arithmetic is printed for an H100 beside what was measured there, and that ratio is applied to
the T4's arithmetic too. Assumptions stand in `CARDS`; a measurement of your own replaces the estimate.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = (
    Path(__file__).parents[2] / "assets" / "results" / "benchmarks" / "training_nvidia_h100_80gb_hbm3.json"
)
LAYERS, WIDTH, INNER, HEADS, KEY_HEADS, DIM, VOCABULARY = 22, 2048, 5632, 32, 4, 64, 32_000  # TinyLlama
QKV_WIDTH = (HEADS + 2 * KEY_HEADS) * DIM
ROWS, LENGTHS = (
    32,
    [15, 24, 28, 41, 52, 62, 73, 82, 96, 109, 127, 150, 171, 199, 228, 271, 318, 367, 458, 512, 512],
)
STEPS = {"exp_001": 908, "exp_002": 400, "exp_003": 400, "exp_004": 400, "exp_005": 400}
VALIDATION_PAIRS, TEST_QUESTIONS, NEW_TOKENS = 200, 300, 512


@dataclass(frozen=True)
class Card:
    """What a card sustains, not its nominal rate."""

    matmul: float  # floating-point operations per second in 16 bits
    attention: float  # the same inside the attention kernel on documents of these lengths
    bandwidth: float  # bytes per second
    launch: float  # seconds between two kernels of a replayed graph


CARDS = {
    "H100": Card(
        780e12, 60e12, 2.92e12, 1e-6
    ),  # all measured; attention: 9.4 ms per step on such short documents
    "T4 at 20": Card(
        20e12, 4e12, 0.75 * 320e9, 2e-6
    ),  # nominal 65 TFLOP/s and 320 GB/s, 70 W hold 20 to 30; attention assumed
    "T4 at 25": Card(25e12, 5e12, 0.75 * 320e9, 2e-6),
    "T4 at 30": Card(30e12, 6e12, 0.75 * 320e9, 2e-6),
}


@dataclass
class Work:
    """Operations, bytes and launches of one pass over some tokens."""

    matmul: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    launches: int = 0

    def seconds(self, card: Card) -> float:
        return (
            self.matmul / card.matmul
            + self.attention / card.attention
            + self.bytes / card.bandwidth
            + self.launches * card.launch
        )


def mean_lengths() -> tuple[float, float]:
    """Mean and mean square of an example's tokens, by the quantiles of the real rows."""
    at = torch.linspace(0, 1, 10_001, dtype=torch.float64) * (len(LENGTHS) - 1)
    low = at.long().clamp(max=len(LENGTHS) - 2)
    values = torch.tensor(LENGTHS, dtype=torch.float64)
    lengths = values[low] + (values[low + 1] - values[low]) * (at - low)
    return float(lengths.mean()), float(lengths.square().mean())


def training_step(all_linear: bool, rows: int = ROWS) -> Work:
    """Forward and backward pass of `rows` examples by fast/train.py, kernel by kernel; frozen weights get no gradient."""
    mean, square = mean_lengths()
    tokens, two = rows * mean, 2  # bytes of a 16-bit number
    linear = WIDTH * QKV_WIDTH + HEADS * DIM * WIDTH + 3 * WIDTH * INNER
    work = Work(matmul=4 * tokens * (LAYERS * linear + WIDTH * VOCABULARY))
    causal = rows * square / 2 * HEADS * DIM * LAYERS  # pairs of a query and a key it sees, times the width
    work.attention = (4 + 10) * causal  # two products forward, five backward
    groups = [(WIDTH, True), (WIDTH, all_linear), (WIDTH, all_linear), (INNER, all_linear)]
    moved = 0.0  # numbers per token and layer
    for width, tuned in groups:
        swiglu = width == INNER
        moved += (
            (2 if swiglu else 1) * width + width if tuned or swiglu or width == WIDTH else 0
        )  # group_input
        if tuned or swiglu:
            moved += 7 * width if swiglu else 3 * width  # group_grad: source, gradient, result
    moved += 2 * 3 * WIDTH + 2 * 4 * WIDTH  # add_rstd, norm_grad
    moved += 2 * 2 * QKV_WIDTH + 2 * QKV_WIDTH  # rope both ways, the concatenation
    moved += (
        2 * 2 * (HEADS * DIM) * 2
    )  # keys and values repeated for the efficient kernel, and their gradients
    work.bytes = tokens * two * (LAYERS * moved + 3 * VOCABULARY + 6 * WIDTH)
    work.bytes += two * 2 * (LAYERS * linear + WIDTH * VOCABULARY)  # each weight is read twice
    work.launches = LAYERS * (60 if all_linear else 40)
    return work


def forward_pass(examples: int) -> Work:
    """Validation: a third of a training step's matrix products (no gradient by the input), half its bytes."""
    step, share = training_step(False), examples / ROWS
    return Work(
        step.matmul / 2 * share,
        step.attention * 4 / 14 * share,
        step.bytes / 2 * share,
        int(step.launches / 2 * share),
    )


def decoding(rows: int, new_tokens: int) -> Work:
    """Greedy decoding of `rows` answers: every weight once per token, keys and values of all earlier ones."""
    linear = LAYERS * (WIDTH * QKV_WIDTH + HEADS * DIM * WIDTH + 3 * WIDTH * INNER) + WIDTH * VOCABULARY
    cache = rows * 2 * LAYERS * KEY_HEADS * DIM * 2 * (30 + new_tokens / 2)
    step = Work(2 * linear * rows, 0.0, 2 * linear + 3 * cache, 22 * 30)
    return Work(step.matmul * new_tokens, 0.0, step.bytes * new_tokens, step.launches * new_tokens)


def main() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    measured = {row["arm"]: row["pass_ms"] for row in rows if "pass_ms" in row}
    print("Per step of 32 examples            counted   H100 by arithmetic   measured")
    ratios = {}
    for name, arm, all_linear in (
        ("q, k, v", "fast, q k v only", False),
        ("all linear layers", "fast", True),
    ):
        work, found = training_step(all_linear), measured[arm]
        ms = 1e3 * work.seconds(CARDS["H100"])
        ratios[all_linear] = found / ms
        print(
            f"{name:18} {work.matmul / 1e12:5.1f} + {work.attention / 1e12:.2f} TFLOP, {work.bytes / 1e9:5.1f} GB {ms:8.1f} ms {found:15.1f} ms"
            f"   (x {found / ms:.2f})"
        )
    print(
        f"\n{'':10} {'q, k, v':>10} {'tokens/s':>9} {'all linear':>11} {'training':>9} {'validation':>11} {'answers':>8} {'11 to 15':>9}"
    )
    tokens = ROWS * mean_lengths()[0]
    for name, card in CARDS.items():
        step = {kind: training_step(kind).seconds(card) * ratios[kind] for kind in (False, True)}
        training = sum(steps * step[run == "exp_005"] for run, steps in STEPS.items())
        passes = sum(-(-steps // 50) for steps in STEPS.values())
        validation = ratios[False] * (
            passes * forward_pass(VALIDATION_PAIRS).seconds(card) + 6 * forward_pass(1_747).seconds(card)
        )
        answers = (
            6 * 2 * decoding(TEST_QUESTIONS, NEW_TOKENS).seconds(card)
        )  # twice: the H100 decodes at half its arithmetic
        total = training + validation + answers
        print(
            f"{name:10} {1e3 * step[False]:7.0f} ms {tokens / step[False]:9,.0f} {1e3 * step[True]:8.0f} ms {training / 60:6.1f} min"
            f" {validation / 60:8.1f} min {answers / 60:5.1f} min {total / 60:6.1f} min"
        )
    print(
        "\nNot in it: imports, data, audits, scoring, merging (these wait for the CPU); the self-test at the start, seconds per run."
    )


if __name__ == "__main__":
    main()
