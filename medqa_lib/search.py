"""Run the search for exp_005 that `search_plan` describes: three rounds, chosen on validation loss; no trial answers a test question.

`python -m medqa_lib.search --workers 6` runs six trials at a time. After an interruption the same command goes on: a finished trial is
read from HOME/results/MODEL/search/NAME.json, an unfinished one resumes, one that failed is tried again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from medqa_lib import likelihood
from medqa_lib.checkpoint_session import CheckpointSession
from medqa_lib.checkpoints import checkpoint_folders, identity_differences, write_json_atomically
from medqa_lib.config import Experiment, current_profile, get_experiment, home_dir
from medqa_lib.data import hash_splits, prepare_splits
from medqa_lib.evaluation import encode_validation
from medqa_lib.model import load_merged, load_tokenizer
from medqa_lib.results import describe_environment, run_identity
from medqa_lib.search_plan import MAX_SHARE, changed_fields, measure_tinyllama_share, plan_round
from medqa_lib.training import train_adapter

COLUMNS = ("round", "name", "validation_loss", "changes", "tinyllama_share", "trainable_parameters", "train_time_s", "peak_memory_gib",
           "training_path", "status")


class Search:
    """The search on this profile's scale, in `home_dir()`."""

    def __init__(self) -> None:
        self.profile, self.home = current_profile(), home_dir()
        self.splits = prepare_splits(home=self.home)
        self.hashes = hash_splits(self.splits)
        self.folder = self.home / "results" / self.profile.model_slug / "search"

    def plan(self, number: int) -> list[Experiment]:
        """The trials of a round, given what the rounds before it have found."""
        return plan_round(number, {trial["name"]: trial["validation_loss"] for trial in read_trials(self.folder)
                                   if trial["validation_loss"] is not None})

    def run(self, workers: int = 1) -> None:
        """All three rounds. A trial that fails is recorded, and the others go on."""
        for number in (1, 2, 3):
            trials = self.plan(number)
            waiting = [trial for trial in trials if not self.is_finished(trial)]
            print(f"Round {number}: {len(trials)} trials, {len(trials) - len(waiting)} finished before", flush=True)
            for trial, error in (self.run_here if workers == 1 else self.run_in_children)(number, waiting, workers):
                if error:
                    self.save({**self.describe(number, trial), "error": error})
                    print(f"{trial.name} FAILED: {error}", flush=True)
                else:
                    result = json.loads((self.folder / f"{trial.name}.json").read_text(encoding="utf-8"))
                    print(f"{trial.name}: validation loss {result['validation_loss'] or math.nan:.4f}", flush=True)

    def describe(self, number: int, trial: Experiment) -> dict:
        """What is known of a trial before it has run."""
        scaled, reference = (self.profile.scale(experiment) for experiment in (trial, get_experiment("exp_004")))
        return {"name": trial.name, "round": number, "changes": changed_fields(scaled, reference), "validation_loss": None,
                "identity": run_identity(scaled, self.profile, self.hashes)}

    def save(self, result: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.folder / f"{result['name']}.json", result)

    def is_finished(self, trial: Experiment) -> bool:
        """Whether the trial has a result.

        Raises:
            ValueError: the result is another recipe's, model's or data set's; the message lists what differs.
        """
        path = self.folder / f"{trial.name}.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"error": "not run yet"}
        if "error" in result:
            return False
        if differences := identity_differences(result["identity"], self.describe(0, trial)["identity"]):
            raise ValueError(f"{path} is the result of another trial:\n  " + "\n  ".join(differences) +
                             f"\nMove {self.folder} away, or set MEDQA_HOME to another folder.")
        return True

    def run_trial(self, number: int, trial: Experiment) -> None:
        """Train, measure the merged model's loss on the whole validation split, and write the result.

        Raises:
            ValueError: the trial would train more than MAX_SHARE of TinyLlama.
        """
        share = measure_tinyllama_share(trial.lora)
        if share > MAX_SHARE:
            raise ValueError(f"Trial {trial.name} would train {share:.3%} of TinyLlama; expected at most {MAX_SHARE:.1%}. "
                             "Lower r or take fewer target_modules.")
        result, profile = self.describe(number, trial), self.profile
        adapter_dir = self.home / "adapters" / profile.model_slug / f"search_{trial.name}"
        folders = checkpoint_folders(self.home, profile.model_slug, adapter_dir.name)
        with CheckpointSession(*folders, result["identity"]) as session:
            _, numbers = train_adapter(profile.scale(trial), self.splits, profile, session, adapter_dir)
        validation = encode_validation(load_tokenizer(profile), self.splits["validation"], profile)
        loss = likelihood.answer_loss(load_merged(adapter_dir, profile), validation)
        self.save({**result, **numbers, "tinyllama_share": share, "validation_loss": loss if math.isfinite(loss) else None,
                   "n_validation": len(validation), "environment": describe_environment()})
        for folder in set(folders):  # two dozen trials' checkpoints would fill a Drive
            shutil.rmtree(folder)
        gc.collect()
        torch.cuda.empty_cache()

    def run_here(self, number: int, trials: list[Experiment], workers: int = 1):
        """Run trials one after the other; yields (trial, error or "")."""
        for trial in trials:
            try:
                self.run_trial(number, trial)
                yield trial, ""
            except Exception as error:
                yield trial, f"{type(error).__name__}: {error}"

    def run_in_children(self, number: int, trials: list[Experiment], workers: int):
        """Run each trial in a process of its own, `workers` at a time; yields (trial, "" or the last lines of its log)."""
        waiting, running = list(trials), {}
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    trial = waiting.pop(0)
                    with open(logs / f"search_{trial.name}.log", "w") as log:
                        running[trial] = subprocess.Popen(child_command(number, trial), stdout=log, stderr=subprocess.STDOUT)
                time.sleep(0.2)
                for trial in [trial for trial, child in running.items() if child.poll() is not None]:
                    status = running.pop(trial).returncode
                    lines = (logs / f"search_{trial.name}.log").read_text(errors="replace").strip().split("\n")
                    yield trial, "\n".join([f"exit status {status}", *lines[-5:]]) if status else ""
        finally:
            for child in running.values():  # they save a checkpoint first
                child.terminate()


def child_command(number: int, trial: Experiment) -> list[str]:
    return [sys.executable, "-m", "medqa_lib.search", "--trial", str(number), trial.name]


def read_trials(folder: str | Path) -> list[dict]:
    """The JSON of every trial under `folder`, finished or failed."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]


def search_table(folder: str | Path) -> pd.DataFrame:
    """A row a trial, by round and validation loss; status says "failed" and why, or "diverged"."""
    rows = []
    for trial in read_trials(folder):
        error = trial.get("error", "").strip().split("\n")[-1]
        status = f"failed: {error}" if error else "diverged" if trial["validation_loss"] is None else "done"
        rows.append({**trial, "status": status, "changes": ", ".join(map(format_change, trial["changes"].items()))})
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"validation_loss": float})
    return table.sort_values(["round", "validation_loss", "name"], ignore_index=True)


def format_change(change: tuple[str, object]) -> str:
    field, value = change
    value = "/".join(name.removesuffix("_proj") for name in value) if isinstance(value, list) else value
    return f"{field.removeprefix('lora.')} {value}"


def best_trial(folder: str | Path) -> dict:
    """The trial with the lowest validation loss, as its JSON says it.

    Raises:
        ValueError: no trial under `folder` has one.
    """
    finished = [trial for trial in read_trials(folder) if trial["validation_loss"] is not None]
    if not finished:
        raise ValueError(f"There is no finished trial in {folder}; make them with `python -m medqa_lib.search`.")
    return min(finished, key=lambda trial: trial["validation_loss"])


def main() -> None:
    """Run the search, or the one trial that a search has started this process for."""
    parser = argparse.ArgumentParser(prog="python -m medqa_lib.search", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1, help="trials at a time, each in a process of its own; 1: in this one")
    parser.add_argument("--trial", nargs=2, metavar=("ROUND", "NAME"), help="run this trial only")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}; expected 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children are stopped too
    search = Search()
    if options.trial:
        number, name = int(options.trial[0]), options.trial[1]
        search.run_trial(number, next(trial for trial in search.plan(number) if trial.name == name))
        return
    search.run(options.workers)
    best = best_trial(search.folder)
    print(f"\n{search_table(search.folder).drop(columns='changes').to_string()}\n\nBest: {best['name']}, validation loss "
          f"{best['validation_loss']:.4f}. It differs from exp_004 in {best['changes']}")


if __name__ == "__main__":
    main()
