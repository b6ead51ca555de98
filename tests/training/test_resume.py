"""Interrupted and resumed equals never interrupted; a poisoned checkpoint runs no code; memory that runs out changes no result."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict

from medqa_lib.config import PROFILES, LoraSettings, get_experiment
from medqa_lib.data import hash_splits
from medqa_lib.evaluation.results import run_identity
from medqa_lib.training import plan as planning
from medqa_lib.training import trainer
from medqa_lib.training.checkpoints import ResumeRefused, list_checkpoints, write_manifest
from medqa_lib.training.run import train_adapter
from medqa_lib.training.session import CheckpointSession
from medqa_lib.training.trainer import AnswerTrainer

SMOKE = dataclasses.replace(PROFILES["smoke"], step_divisor=50)  # exp_004: 8 steps, saved every 2


def make_splits(train_rows=14):
    """Made-up pairs of several lengths."""

    def pairs(n, first=0):
        rows = [
            (f"What is disease {i}?", f"Disease {i} is an illness. " + "It passes. " * (i % 5 + 1))
            for i in range(first, first + n)
        ]
        return Dataset.from_dict(
            {
                "question": [q for q, _ in rows],
                "answer": [a for _, a in rows],
                "source": ["medquad"] * n,
                "group": [str(i) for i in range(first, first + n)],
                "choices": [""] * n,
                "focus_area": [""] * n,
            }
        )

    return DatasetDict(train=pairs(train_rows), validation=pairs(4, 100), test=pairs(4, 200))


@pytest.fixture(scope="module")
def splits():
    return make_splits()  # 14 rows in batches of 4, so the data is passed through more than once


def train(splits, folder, path=None, **changes):
    """What run_experiment does before it evaluates."""
    experiment = dataclasses.replace(SMOKE.scale(get_experiment("exp_004")), **changes)
    with CheckpointSession(folder, folder, run_identity(experiment, SMOKE, hash_splits(splits))) as session:
        losses, numbers = train_adapter(experiment, splits, SMOKE, session, folder / "adapter", path)
    adapter = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    return SimpleNamespace(
        folder=folder,
        losses=losses,
        adapter=adapter,
        tokens=numbers["trained_tokens"],
        steps=numbers["trained_steps"],
        time_s=numbers["train_time_s"],
    )


@pytest.fixture(scope="module")
def uninterrupted(splits, tmp_path_factory):
    return train(splits, tmp_path_factory.mktemp("uninterrupted"))


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def interrupted(splits, tmp_path_factory):
    """The folder of a run that ended in its third step; its checkpoint is of the second."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 3)
        train(splits, folder)
    return folder


def interrupt_after(monkeypatch, step, learning_rates=None):
    """Raise after `step`; collect (step, learning rate) on the way."""
    original = CheckpointSession.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if learning_rates is not None:
            learning_rates.append((state.global_step, kwargs["lr_scheduler"].get_last_lr()[0]))
        if state.global_step == step:
            raise Interrupted
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(CheckpointSession, "on_step_end", on_step_end)


def record_batches(monkeypatch, seen):
    original = AnswerTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.append(
                (
                    self.state.global_step,
                    hashlib.sha256(inputs["input_ids"].cpu().numpy().tobytes()).hexdigest(),
                )
            )
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute_loss)


def assert_same(run, other):
    """The same tokens, and at each logged step the same loss and rate: bit for bit on a CPU, to 1e-3 on a GPU (unordered sums)."""
    assert run.tokens == other.tokens
    if torch.cuda.is_available():
        pd.testing.assert_frame_equal(run.losses, other.losses, rtol=0, atol=1e-3)
    else:
        assert run.adapter == other.adapter
        pd.testing.assert_frame_equal(run.losses, other.losses)


def test_train_adapter_resumed_equals_uninterrupted(splits, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        train(splits, tmp_path)
    seen, learning_rates = [], []
    with monkeypatch.context() as patch:
        record_batches(patch, seen)
        interrupt_after(patch, None, learning_rates)
        resumed = train(splits, tmp_path)
    assert [step for step, _ in learning_rates] == [5, 6, 7, 8], "goes on from checkpoint-4"
    assert len(seen) == len(set(seen)) == 4
    assert_same(resumed, uninterrupted)


def test_train_adapter_does_not_train_a_finished_run_again(splits, uninterrupted, tmp_path, monkeypatch):
    seen, folder = [], shutil.copytree(uninterrupted.folder, tmp_path / "again")
    record_batches(monkeypatch, seen)
    again = train(splits, folder)
    assert seen == [] and again.steps == uninterrupted.steps == 8
    assert_same(again, uninterrupted)


def test_train_time_is_that_of_every_process_up_to_its_last_checkpoint(
    splits, uninterrupted, tmp_path, monkeypatch
):
    clock, original = SimpleNamespace(now=0.0), AnswerTrainer.training_step

    def training_step(self, *args, **kwargs):
        clock.now += 10
        return original(self, *args, **kwargs)

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(AnswerTrainer, "training_step", training_step)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)  # the fifth step is lost
        train(splits, tmp_path)
    assert clock.now == 50
    clock.now = 1000.0  # another process, perhaps on another machine
    resumed = train(splits, tmp_path)
    assert (resumed.time_s, clock.now) == (80, 1040)
    assert_same(resumed, uninterrupted)
    clock.now = 7.0
    assert train(splits, tmp_path).time_s == 80, "a start that finds the last step done adds no training"


def test_train_adapter_refuses_checkpoints_of_another_recipe_or_data_set(splits, interrupted):
    with pytest.raises(ResumeRefused, match="experiment.learning_rate: checkpoint 0.0002, this run 0.0001"):
        train(splits, interrupted, learning_rate=1e-4)
    with pytest.raises(ResumeRefused, match="data.train: checkpoint"):
        train(DatasetDict({**splits, "train": splits["train"].select(range(13))}), interrupted)


class Poison:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt"])
def test_resume_never_executes_what_a_checkpoint_holds(splits, interrupted, tmp_path, name):
    folder = shutil.copytree(interrupted, tmp_path / "poisoned")
    checkpoint = list_checkpoints(folder)[0]
    identity = json.loads((checkpoint / "manifest.json").read_text())["identity"]
    torch.save(Poison(tmp_path / "executed"), checkpoint / name)
    write_manifest(checkpoint, identity)  # whoever poisons a checkpoint can write its manifest too
    with pytest.raises(Exception, match="Weights only load failed"):
        train(splits, folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts the rows of padded batches, the plan of a machine without a GPU"
)
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_one(
    splits, tmp_path, monkeypatch, capsys
):
    # Without dropout, whose masks are drawn a micro-batch at a time.
    short = {"lora": LoraSettings(lora_dropout=0.0), "max_steps": 4}
    expected = train(splits, tmp_path / "enough", **short)
    original = AnswerTrainer.compute_loss
    rows = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        if model.training:
            rows.append((self.state.global_step, len(inputs["input_ids"])))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute_loss)
    run = train(splits, tmp_path / "little", **short)
    assert "2 rows x 2: 4 did not fit" in capsys.readouterr().out
    assert sum(n for step, n in rows if step == 0) == 4
    assert run.tokens == expected.tokens
    assert list(run.losses["loss"]) == pytest.approx(list(expected.losses["loss"]), abs=1e-5)


def test_out_of_memory_on_one_of_several_processes_ends_all():
    """Halving in one process alone would leave the others waiting for it; an error makes the launcher end them."""

    class OneOfTwo:
        args, model = SimpleNamespace(world_size=2, process_index=1), torch.nn.Linear(1, 1)

        def train(self, _checkpoint):
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    plan = planning.TrainingPlan("padded", torch.float32, 4, 2, "made here")
    with pytest.raises(RuntimeError, match="process 1 of 2"):
        trainer.fit(lambda _plan: OneOfTwo(), plan, SimpleNamespace(resume_from=lambda: None))


def test_training_that_diverges_is_neither_finished_nor_saved(splits, tmp_path):
    with pytest.raises(trainer.TrainingDiverged, match="step 2"):
        train(splits, tmp_path, learning_rate=1e30)
    assert not (tmp_path / "adapter").exists() and list_checkpoints(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(splits, tmp_path, monkeypatch):
    """The last step's update can spoil the weights after its loss was logged."""

    def spoil(build_trainer, plan, session):
        built = build_trainer(plan)
        next(value for value in built.model.parameters() if value.requires_grad).data[0, 0] = float("inf")
        return built

    monkeypatch.setattr(trainer, "fit", spoil)
    with pytest.raises(trainer.TrainingDiverged):
        train(splits, tmp_path)
    assert not (tmp_path / "adapter").exists()
