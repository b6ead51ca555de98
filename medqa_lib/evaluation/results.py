"""A run's folder: what was run, on what, and what came out. Text of a data set never goes into it.

`metrics.json` is written last: a folder that has it is complete.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from medqa_lib.config import MODELS, Experiment, Profile, home_dir
from medqa_lib.prompts import format_prompt
from medqa_lib.reasons import hub_answers, hub_reason

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "nltk",
            "sacrebleu", "bert_score", "textstat")
PUBLISHED = Path(__file__).parents[2] / "assets" / "results"  # in a checkout: MODEL/RUN
EXPLANATIONS = ("question", "baseline", "changed_fields")  # of an experiment; they change no result
SAMPLE = ["question", "answer"]
# File of a run -> its type, and a key or column that it must have.
FILES = {"config.json": (dict, "identity"), "metrics.json": (dict, "n_test"),
         "scores.csv": (pd.DataFrame, "question_id"), "loss.csv": (pd.DataFrame, "step"),
         "samples.json": (list, None)}
# Raise one whenever a change of the code changes labels, answers or scores: older results are not reused.
VERSIONS = {"labels": 1, "generation": 1, "metrics": 2}
RUN_ORDER = ("base", "exp_001", "exp_002", "exp_003", "exp_004", "exp_005")


@dataclass(frozen=True)
class RunResult:
    """One run, read back from its folder. `scores` has a row per test question, `losses` per logged step."""

    folder: Path
    config: dict
    metrics: dict
    scores: pd.DataFrame
    losses: pd.DataFrame
    samples: pd.DataFrame
    log: str = ""

    @property
    def name(self) -> str:
        return self.folder.name


def run_folder(name: str, profile: Profile, home: Path | None = None) -> Path:
    """Where the results of this run go: HOME/results/MODEL/NAME."""
    return (home or home_dir()) / "results" / profile.model_slug / name


def has_nf4(name: str) -> bool:
    """Whether the base model of the run of this name is in NF4; else it is in the compute dtype."""
    return "without_nf4" not in name


def describe_environment() -> dict:
    """Date, GPU and versions: what a figure must be labelled with."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    return {"date": datetime.date.today().isoformat(), "gpu": gpu, "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES}}


def run_identity(experiment: Experiment | None, profile: Profile, data_hashes: dict) -> dict:
    """What must be equal for a checkpoint or a result to be used again, as JSON values."""
    recipe = dataclasses.asdict(experiment) if experiment else {}
    recipe = {name: value for name, value in recipe.items()  # results from before passages stay valid
              if name not in EXPLANATIONS and (value or name != "passages")}
    evaluation = {name: getattr(profile, name)
                  for name in ("max_new_tokens", "test_questions", "validation_pairs", "bertscore_encoder")}
    folder = Path(profile.model)
    identity = {"experiment": recipe or None, "model": folder.name if folder.is_dir() else profile.model,
                "weights": identify_weights(profile.model), "data": data_hashes, "evaluation": evaluation,
                "versions": {"prompt": format_prompt("?"), **VERSIONS}}
    return json.loads(json.dumps(identity))


def identify_weights(model: str) -> str:
    """What names a base model's weights: its pinned source, the Hub's commit, or a hash of its folder."""
    source = MODELS.get(model, model)
    if source.startswith(("wheel:", "random:")):
        return source
    if not Path(source).is_dir():
        return _find_commit(source)
    digest = hashlib.sha256()
    for path in sorted(Path(source).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@functools.cache
def _find_commit(repository: str) -> str:
    """The Hub's newest commit, or the cache's where the Hub does not answer."""
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(repository, "config.json", local_files_only=not hub_answers())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{repository!r} could not be found: {hub_reason(error)}.") from None
    return Path(file).parent.name  # .../snapshots/COMMIT/config.json


def identity_differences(saved: dict, wanted: dict) -> list[str]:
    """One line for each field that differs, nested fields by their dotted name."""
    old, new = (pd.json_normalize(each).to_dict("records")[0] for each in (saved, wanted))
    return [f"{name}: checkpoint {old.get(name)!r}, this run {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def question_id(question: str) -> str:
    """First 16 hexadecimal digits of the question's SHA-256: names a test question without showing it."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def save_run(folder: Path, config: dict, metrics: dict, scores: pd.DataFrame,
             losses: pd.DataFrame | None = None, samples: Sequence[dict] = ()) -> RunResult:
    """Write a run's five files, `metrics.json` last, and read them back."""
    if losses is None:
        losses = pd.DataFrame(columns=["step", "split", "loss", "learning_rate", "tokens"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    write_json_atomically(folder / "config.json", config)
    scores.to_csv(folder / "scores.csv", index=False, float_format="%.6g")
    losses.to_csv(folder / "loss.csv", index=False, float_format="%.6g")
    write_json_atomically(folder / "samples.json", list(samples))
    write_json_atomically(folder / "metrics.json", metrics)
    return load_run(folder)


def write_json_atomically(path: Path, content: dict | list) -> None:
    """Write beside `path`, flush, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class UnfinishedRun(ValueError):
    """A run's folder lacks a file, or holds one that cannot be read or has numbers that are not finite."""


def load_run(folder: str | Path) -> RunResult:
    """Read a run's folder; `log.txt` may be missing.

    Raises:
        UnfinishedRun: the message names the file.
    """
    folder, contents = Path(folder), []
    for name, (kind, needed) in FILES.items():
        try:
            content = (json.loads((folder / name).read_text("utf-8")) if name.endswith(".json") else
                       pd.read_csv(folder / name, dtype={"question_id": str, "group": str}))
        except (OSError, ValueError) as error:
            raise UnfinishedRun(f"{folder / name} cannot be read ({error}). Run it again.") from None
        if not isinstance(content, kind) or (needed and needed not in content):
            raise UnfinishedRun(f"{folder / name} is damaged: it has no {needed or kind}. Run it again.")
        contents.append(content)
    config, metrics, scores, losses, samples = contents
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    if infinite := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise UnfinishedRun(f"{folder / 'metrics.json'}: {', '.join(infinite)} not finite. Run it again.")
    if len(scores) != metrics["n_test"]:
        raise UnfinishedRun(f"{folder / 'scores.csv'} has {len(scores)} of {metrics['n_test']} rows.")
    log = folder / "log.txt"
    return RunResult(folder, config, metrics, scores, losses, pd.DataFrame(samples, columns=SAMPLE),
                     log.read_text("utf-8", "replace") if log.exists() else "")


def load_runs(root: str | Path) -> dict[str, RunResult]:
    """All finished runs under `root`, those of RUN_ORDER first, the others by name; the rest are named."""
    folders = [path.parent for path in sorted(Path(root).glob("*/metrics.json"))]
    runs = {folder.name: _load_finished(folder) for folder in folders}
    return {name: runs[name] for name in dict.fromkeys((*RUN_ORDER, *runs)) if runs.get(name)}


def _load_finished(folder: Path) -> RunResult | None:
    """The run in `folder`; None if there is none, or if it is not finished, which is said."""
    try:
        return load_run(folder) if (folder / "metrics.json").exists() else None
    except UnfinishedRun as error:
        print(f"Not finished: {error}")
        return None


def gather_runs(profile: Profile, needed: Sequence[str] = ("base",),
                home: Path | None = None) -> tuple[dict[str, RunResult], list[str]]:
    """Runs to show, and the names of those that are yours: the others are published ones (assets/results).

    Your runs count once the needed ones are there and another. Published runs then fill the gaps if their
    untuned model was evaluated as yours: the same model, data and questions.
    """
    own = load_runs(run_folder("", profile, home))
    bases = sorted(PUBLISHED.glob("*/base"), key=lambda base: (base.parent.name != profile.model_slug, base))
    published = load_runs(bases[0].parent) if bases else {}  # this model's if there are some
    if published and not (set(needed) <= own.keys() and len(own) > 1):
        return published, []
    if published and published["base"].config["identity"] == own["base"].config["identity"]:
        return published | own, list(own)
    return own, list(own)


def find_finished(folder: Path, identity: dict) -> RunResult | None:
    """The finished run in `folder`, or None if there is none yet; of an unfinished one it says what is wrong.

    Raises:
        ValueError: it is another run's; the message lists what differs.
    """
    run = _load_finished(folder)
    if run and (differences := identity_differences(run.config["identity"], identity)):
        raise ValueError(f"{folder} holds the results of another run:\n  " + "\n  ".join(differences) +
                         "\nMove that folder away, or set MEDQA_HOME to another one.")
    return run


def describe_origin(runs: Iterable[RunResult]) -> str:
    """Model, test questions, GPU and date of runs, in words: what a table or figure must be labelled with."""
    facts = [(run.config["identity"]["model"], f"{run.metrics['n_test']:,}", run.config["gpu"],
              run.config["date"]) for run in runs]
    models, sizes, gpus, dates = (" / ".join(sorted(set(values))) for values in zip(*facts, strict=True))
    return f"{models}, n = {sizes} test questions, GPU {gpus}, {dates}"
