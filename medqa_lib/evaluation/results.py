"""A run's folder: what was run, on what, and what came out. Text of a data set never goes into it.

`metrics.json` is written last: a folder that has it is complete.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medqa_lib.config import Experiment, Profile, home_dir

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "rouge_score", "sacrebleu", "bert_score", "textstat")
RUN_ORDER = ("base", "exp_001", "exp_002", "exp_003", "exp_004", "exp_005")


@dataclass(frozen=True)
class RunResult:
    """One run, read back from its folder. `scores` has a row a test question, `losses` a row a logged step."""

    folder: Path
    config: dict
    metrics: dict
    scores: pd.DataFrame
    losses: pd.DataFrame
    samples: pd.DataFrame

    @property
    def name(self) -> str:
        return self.folder.name


def run_folder(name: str, profile: Profile, home: Path | None = None) -> Path:
    """Where the results of this run go: HOME/results/MODEL/NAME."""
    return (home or home_dir()) / "results" / profile.model_slug / name


def describe_environment() -> dict:
    """Date, GPU and versions: what a figure must be labelled with."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    return {"date": datetime.date.today().isoformat(), "gpu": gpu, "python": platform.python_version(), "versions": versions}


def run_identity(experiment: Experiment | None, profile: Profile, data_hashes: dict) -> dict:
    """What must be equal for a checkpoint or a result to be used again, as JSON values."""
    recipe = {key: value for key, value in dataclasses.asdict(experiment).items()
              if key not in ("question", "baseline", "changed_fields")} if experiment else None
    identity = {"experiment": recipe, "model": profile.model, "data": data_hashes,
                "evaluation": {"max_new_tokens": profile.max_new_tokens, "test_questions": profile.test_questions,
                               "validation_pairs": profile.validation_pairs, "bertscore_encoder": profile.bertscore_encoder}}
    return json.loads(json.dumps(identity))


def question_id(question: str) -> str:
    """First 16 hexadecimal digits of the question's SHA-256: names a test question without showing it."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def save_run(folder: Path, config: dict, metrics: dict, scores: pd.DataFrame, losses: pd.DataFrame, samples: Sequence[dict]) -> RunResult:
    """Write a run's five files, `metrics.json` last, and read them back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    write_json_atomically(folder / "config.json", config)
    scores.to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    losses.to_csv(folder / "loss.csv", index=False, float_format="%.6g")
    write_json_atomically(folder / "samples.json", list(samples))
    write_json_atomically(folder / "metrics.json", metrics)
    return load_run(folder)


def write_json_atomically(path: Path, content: dict) -> None:
    """Write beside `path`, flush to disk, then rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def identity_differences(saved: dict, wanted: dict) -> list[str]:
    """One line for each field that differs, nested fields by their dotted name."""
    def flatten(value, name=""):
        if not isinstance(value, dict):
            return {name: value}
        return {key: leaf for child, sub in value.items() for key, leaf in flatten(sub, f"{name}.{child}" if name else child).items()}

    old, new = flatten(saved), flatten(json.loads(json.dumps(wanted)))
    return [f"{name}: checkpoint {old.get(name)!r}, this run {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def load_run(folder: str | Path) -> RunResult:
    """Read a run's folder.

    Raises:
        FileNotFoundError: the folder is not a complete run; the message names the file that is missing.
    """
    folder = Path(folder)
    for name in ("config.json", "metrics.json", "scores.csv", "loss.csv", "samples.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a complete run: {name} is missing. Run its notebook, or run_experiment, to the end.")
    read = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "metrics", "samples")}
    return RunResult(folder, read["config"], read["metrics"], pd.read_csv(folder / "scores.csv", dtype={"question_id": str, "group": str}),
                     pd.read_csv(folder / "loss.csv"), pd.DataFrame(read["samples"], columns=["question", "answer"]))


def load_runs(root: str | Path) -> dict[str, RunResult]:
    """All complete runs under `root`, the base first, then the experiments by name."""
    names = [folder.parent.name for folder in Path(root).glob("*/metrics.json")]
    names.sort(key=lambda name: (RUN_ORDER.index(name) if name in RUN_ORDER else len(RUN_ORDER), name))
    return {name: load_run(Path(root) / name) for name in names}


def find_finished(folder: Path, identity: dict) -> RunResult | None:
    """The finished run in `folder`, or None if there is none yet.

    Raises:
        ValueError: it is another run's; the message lists what differs.
    """
    if not (folder / "metrics.json").exists():
        return None
    run = load_run(folder)
    differences = identity_differences(run.config["identity"], identity)
    if differences:
        raise ValueError(f"{folder} holds the results of another run:\n  " + "\n  ".join(differences) +
                         "\nMove that folder away, or set MEDQA_HOME to another one.")
    return run


def summary_table(runs: dict[str, RunResult], columns: Sequence[str] = ("validation_loss", "rouge1", "rouge2", "rougeL", "bleu",
                                                                        "token_f1", "bertscore_f1")) -> pd.DataFrame:
    """One row a run, one column a metric, with n; a metric that a run lacks is left out everywhere."""
    table = pd.DataFrame({name: run.metrics for name, run in runs.items()}).T
    kept = [column for column in columns if column in table and table[column].notna().any()]
    return table[[*kept, "n_test"]].astype({**dict.fromkeys(kept, float), "n_test": int})


def describe_origin(runs: Iterable[RunResult]) -> str:
    """Model, sizes, GPU and date of runs, in words: what a table or figure of them must be labelled with."""
    runs = list(runs)

    def values(of: Callable[[RunResult], str]) -> str:
        return " / ".join(sorted({of(run) for run in runs}))

    return (f"{values(lambda run: run.config['identity']['model'])}, n = {values(lambda run: format(run.metrics['n_test'], ','))} "
            f"test questions, GPU {values(lambda run: run.config['gpu'])}, {values(lambda run: run.config['date'])}")


def describe_gpu_time(runs: dict[str, RunResult], dollars_per_hour: float = 3.0) -> str:
    """GPU time of a study and what it costs at an assumed price, in words. Training and answering count, loading and scoring do not.

    A lower bound: what a killed process had done since its last checkpoint is in no run's `train_time_s`.
    """
    if all(run.config["gpu"].startswith("none") for run in runs.values()):
        return "No GPU was used."
    trained = [run.metrics["train_time_s"] for run in runs.values() if "train_time_s" in run.metrics]
    answer_s = sum(run.metrics.get("answer_time_s", 0) for run in runs.values())
    total_s = sum(trained) + answer_s
    return (f"{len(trained)} runs trained for at least {sum(trained) / 60:.0f} minutes, and with the untuned model's they answered for "
            f"{answer_s / 60:.0f}: at least {total_s / 3600:.2f} GPU hours, or ${dollars_per_hour * total_s / 3600:.2f} at an assumed "
            f"${dollars_per_hour:.0f} an hour. What was lost between a checkpoint and a stop is not counted.")
