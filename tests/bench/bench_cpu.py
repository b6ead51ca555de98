"""Training speed of the `cpu` profile (SmolLM2-135M, 8 rows of at most 96 tokens): NF4 at every use, or dequantised once as in training.

`python tests/bench/bench_cpu.py` takes three minutes and writes $OUT (default runs/bench)/training_cpu.json. The arms take turns, so that
other work on the machine hits both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["MEDQA_PROFILE"] = "cpu"
import torch  # noqa: E402

from medqa_lib.config import PROFILES, LoraSettings  # noqa: E402
from medqa_lib.labels import make_collator  # noqa: E402
from medqa_lib.model import add_lora, load_base_model, load_tokenizer  # noqa: E402

OUT = Path(os.environ.get("OUT", ROOT / "runs" / "bench"))
ROUNDS, STEPS = 8, 2


def make_step(model, batch):
    """One optimiser step on a batch; returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model.train()

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    profile, tokenizer = PROFILES["cpu"], load_tokenizer(PROFILES["cpu"])
    generator = torch.Generator().manual_seed(7)
    rows = [
        torch.randint(4, 40_000, (int(n),), generator=generator).tolist()
        for n in torch.randint(40, 97, (8,), generator=generator)
    ]
    batch = make_collator(tokenizer, "aligned", 96)(
        [{"input_ids": row, "labels": [-100] * 20 + row[20:]} for row in rows]
    )
    tokens = sum(map(len, rows))
    settings = LoraSettings(lora_dropout=0.0)  # so that the losses can be compared
    steps = {
        "NF4 at every use": make_step(add_lora(load_base_model(profile), settings), batch),
        "dequantised once": make_step(
            add_lora(load_base_model(profile).dequantize(dtype=torch.float32), settings), batch
        ),
    }
    losses, speeds = {name: [] for name in steps}, {name: [] for name in steps}
    for round_number in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name] += [step() for _ in range(STEPS)]
            if round_number:  # the first one warms up
                speeds[name].append(STEPS * tokens / (time.perf_counter() - start))
    rows = [
        {
            "arm": name,
            "tokens_s": round(statistics.median(speeds[name]), 1),
            "tokens_s_min_max": [round(min(speeds[name]), 1), round(max(speeds[name]), 1)],
            "losses": [round(loss, 6) for loss in losses[name][:5]],
        }
        for name in steps
    ]
    ratio = rows[1]["tokens_s"] / rows[0]["tokens_s"]
    machine = {
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "model": profile.model,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "rows": len(batch["input_ids"]),
        "tokens_a_step": tokens,
        "ratio": round(ratio, 3),
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "training_cpu.json").write_text(json.dumps([machine, *rows], indent=1) + "\n")
    print(json.dumps([machine, *rows], indent=1))


if __name__ == "__main__":
    main()
