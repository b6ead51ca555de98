"""Training speed, memory and agreement of the paths on one GPU: `python tests/bench/bench_training.py`, about seven minutes.

A job is a group of arms in a process of its own (training_arms.py, unsloth_arms.py). All processes import while the first prepares the
model, then they measure one after another; the leading arms come twice, in another order. Unsloth's jobs need MEDQA_UNSLOTH_SITE, a
folder with Unsloth and what it needs (`pip install --target`). Results go to $OUT (default `runs/bench`) as training_<gpu>.json, which
is written after every job, and a table is printed last; notebook 40 draws it.

    --quick            the leading arms and the padded Trainer's only
    --jobs fast,nf4    only these
    --limit 360        end after so many seconds, with what is measured by then
    --small            SmolLM2-135M's size instead of TinyLlama's
    --cpu              only check that the script runs: a tiny model, Triton's interpreter; writes training_check.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("OUT", ROOT / "runs" / "bench"))
WORK = Path(tempfile.gettempdir()) / "medqa_bench"  # the model, and what parent and children tell each other
UNSLOTH_SITE = os.environ.get("MEDQA_UNSLOTH_SITE", "")
# name -> seconds allowed, in the order of importance; after the dot: the repetition
JOBS = {
    "fast": 90,
    "padding_free": 60,
    "unsloth_shim": 120,
    "padded": 130,
    "unsloth_shim.2": 80,
    "fast.2": 60,
    "padding_free.2": 40,
    "nf4": 50,
    "nf4_16": 50,
    "settings": 80,
    "unsloth_tuned": 100,
    "unsloth_notebook": 120,
    "ablation": 150,
    "growth": 120,
    "memory": 90,
}
QUICK = list(JOBS)[:7]
IMPORTS_S = 75  # all imports together are waited for at most so long
# ingredient or choice -> the arm without it
ABLATIONS = {
    "CUDA graphs": "fast less graphs",
    "kept weights": "fast, NF4 at every use",
    "B inside the matmul": "fast less B inside the matmul",
    "own cross-entropy": "fast less own cross-entropy",
    "fused AdamW": "fast less fused AdamW",
    "non-blocking copies": "fast less non-blocking copies",
    "losses not filtered": "fast less unfiltered losses",
    "no loader workers": "fast, two loader workers",
    "graphs for multiples of 512, not 256": "fast, graphs for multiples of 256",
    "graphs for multiples of 512, not 1024": "fast, graphs for multiples of 1024",
}


def main(options) -> None:
    for folder in (OUT, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    for old in (
        *WORK.glob("*.jsonl"),
        *WORK.glob("*.log"),
        *WORK.glob("go_*"),
        *WORK.glob("ready_*"),
        *WORK.glob("quiet"),
    ):
        old.unlink()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the children are ended below
    start = time.time()
    jobs = options.jobs.split(",") if options.jobs else QUICK if options.quick else list(JOBS)
    if not Path(UNSLOTH_SITE or "-").is_dir():
        print(
            f"Unsloth's arms are left out: MEDQA_UNSLOTH_SITE is {UNSLOTH_SITE or 'unset'}, no folder with Unsloth."
        )
        jobs = [name for name in jobs if not name.startswith("unsloth")]
    children = {
        name: start_child(name, options) for name in (["prepare"] if options.cpu else ["prepare", *jobs])
    }
    results = []
    (WORK / "go_prepare").touch()
    for name, child in children.items():
        wait_until_imported(name, child, IMPORTS_S - (time.time() - start))
    (WORK / "quiet").touch()  # nothing is measured while others import
    try:
        for name in ("prepare", *jobs):
            left_s = options.limit - (time.time() - start)
            if left_s < 20:
                results.append({"failed": name, "error": f"not started: the {options.limit} s are over"})
                continue
            if name not in children:  # --cpu: two cores, so one at a time
                children[name] = start_child(name, options)
            results += finish_child(
                name, children[name], min(left_s, 1200 if options.cpu else JOBS.get(name, 120))
            )
            write(results, jobs, options)
    finally:
        for child in children.values():
            child.kill()
    print_report(results)
    print(f"{time.time() - start:.0f} s, written: {write(results, jobs, options)}")


def start_child(name: str, options) -> subprocess.Popen:
    script = "unsloth_arms.py" if name.startswith("unsloth") else "training_arms.py"
    paths = [UNSLOTH_SITE] * name.startswith("unsloth") + [
        str(ROOT),
        str(ROOT / "tests"),
        os.environ.get("PYTHONPATH", ""),
    ]
    flags = [flag for flag, wanted in (("--cpu", options.cpu), ("--small", options.small)) if wanted]
    with open(WORK / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, HERE / script, name, WORK, *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )


def wait_until_imported(name: str, child: subprocess.Popen, limit_s: float = 120) -> None:
    start = time.time()
    while child.poll() is None and not (WORK / f"ready_{name}").exists() and time.time() - start < limit_s:
        time.sleep(0.05)


def finish_child(name: str, child: subprocess.Popen, limit_s: int) -> list[dict]:
    """Let the child measure, wait for it, and read what it has found, even if it failed half-way."""
    wait_until_imported(name, child)
    (WORK / f"go_{name}").touch()
    start = time.time()
    try:
        child.wait(limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    lines = WORK / f"{name}.jsonl"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    print(f"{name}: {time.time() - start:.0f} s, exit {child.returncode}, {len(results)} results", flush=True)
    if child.returncode:
        results.append(
            {"failed": name, "error": f"exit {child.returncode} after {time.time() - start:.0f} s"}
        )
    if child.returncode or any("failed" in row for row in results):
        print("\n".join((WORK / f"{name}.log").read_text().splitlines()[-12:]), flush=True)
    return results


def write(results: list[dict], jobs: list[str], options) -> Path:
    machine = results[0] if results else {}
    gpu = (
        "check" if options.cpu else re.sub(r"\W+", "_", machine.get("gpu", "failed").lower())
    )  # bench_cpu.py writes training_cpu.json
    path = OUT / f"training_{gpu}{'_small' if options.small else ''}.json"
    path.write_text(json.dumps(results + summarize(results), indent=1))
    logs = {
        name: (WORK / f"{name}.log").read_text()[-20_000:]
        for name in ("prepare", *jobs)
        if (WORK / f"{name}.log").exists()
    }
    (OUT / "training_logs.txt").write_text("\n".join(f"##### {name}\n{log}" for name, log in logs.items()))
    return path


def summarize(results: list[dict]) -> list[dict]:
    """What the arms say together: the mean of repeated arms, ratios, agreement, gains, memory."""
    arms: dict[str, list[dict]] = {}
    for row in results:
        if "arm" in row:
            arms.setdefault(row["arm"], []).append(row)
    speed = {name: sum(row["tokens_s"] for row in rows) / len(rows) for name, rows in arms.items()}
    found = []
    rivals = [name for name in speed if name.startswith("Unsloth")]
    peak = {name: max(row.get("peak_gib", 0.0) for row in rows) for name, rows in arms.items()}
    if "fast" in speed:
        others = [name for name in ("padded", "padded to 512", "flattened", *rivals) if name in speed]
        found.append(
            {
                "summary": "fast / other arms",
                "fast": round(speed["fast"]),
                "runs": [row["tokens_s"] for row in arms["fast"]],
                **{name: round(speed["fast"] / speed[name], 2) for name in others},
            }
        )
        found.append(
            {
                "summary": "low memory: tokens/s, peak GiB",
                **{
                    name: [round(speed[name]), peak[name]]
                    for name in speed
                    if name.startswith(("fast, NF4", "Unsloth tuned"))
                },
            }
        )
        for name, arm in ABLATIONS.items():
            if arm in speed:
                found.append(
                    {
                        "summary": "ablation",
                        "ingredient": name,
                        "without": arm,
                        "tokens_s": round(speed[arm]),
                        "gain_percent": round(100 * (speed["fast"] / speed[arm] - 1), 1),
                    }
                )
        first = arms["fast"][0]
        if "record_ms" in first:
            recording_s = first["recordings_in_400_steps"] * first["record_ms"] / 1e3
            found.append(
                {
                    "summary": "graphs",
                    "record_ms": first["record_ms"],
                    "in_400_steps": first["recordings_in_400_steps"],
                    "share_of_400_steps": round(recording_s / (recording_s + 0.4 * first["step_ms"]), 3),
                }
            )
    reference = arms.get("padded, dropout 0", [{}])[0]
    for name, rows in arms.items():
        if name.endswith("dropout 0") and len(rows[0]["losses"]) == len(reference.get("losses", [])) > 0:
            losses, norms = (
                max(measure(a, b) for row in rows for a, b in zip(row[key], reference[key], strict=True))
                for key, measure in (
                    ("losses", lambda a, b: abs(a - b)),
                    ("norms", lambda a, b: abs(a / b - 1)),
                )
            )
            found.append(
                {
                    "summary": "agreement with the padded Trainer, first 5 steps",
                    "agrees": losses <= 1e-3 and norms <= 0.01,
                    "compared": name,
                    "loss": float(f"{losses:.1e}"),
                    "norm": float(f"{norms:.1e}"),
                }
            )
    return found


def print_report(results: list[dict]) -> None:
    for row in results + summarize(results):
        if "arm" in row:
            low, median, high = row["tokens_s_10_50_90"]
            print(
                f"{row['arm']:42} {row['tokens_s']:>7,} tokens/s (steps {low:,} {median:,} {high:,}) {row['step_ms']:>7.1f} ms"
                f" pass {row.get('pass_ms', 0):.1f} peak {row['peak_gib']:5.2f} GiB floor {row.get('floor_share', 0):.1%}"
            )
        else:
            print(json.dumps(row)[:400])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--quick", "--small", "--cpu"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--jobs", help="comma-separated, of: " + ", ".join(JOBS))
    parser.add_argument("--limit", type=int, default=10_000, help="end after so many seconds")
    options = parser.parse_args()
    main(options)
