"""What is planned, that a plan leaves the recipe alone, and what is said of it before the start."""

from pathlib import Path

import pytest
import torch
from fast_helpers import make_model
from transformers import DataCollatorWithFlattening
from two_processes import run_in_two

from medqa_lib.training.plan import TrainingPlan, plan_training

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is planned without a GPU")


def test_plan_training_without_gpu_is_padded_float32():
    plan = plan_training(make_model(), total_batch_size=32)
    assert (plan.path, plan.dtype, plan.per_device_train_batch_size, plan.gradient_accumulation_steps) == (
        "padded",
        torch.float32,
        8,
        4,
    )
    assert plan.collator(len) is len


def test_plan_training_divides_the_rows_among_processes():
    plan = plan_training(make_model(), total_batch_size=32, processes=2)
    assert plan.per_device_train_batch_size * plan.gradient_accumulation_steps * 2 == 32


@pytest.mark.parametrize("processes", [5, 33, 64])
def test_plan_training_refuses_processes_that_would_change_the_recipe(processes):
    with pytest.raises(
        ValueError,
        match=f"32 .* {processes} processes.*1, 2, 4, 8, 16, 32",
    ):
        plan_training(make_model(), total_batch_size=32, processes=processes)


@pytest.mark.parametrize(("rows", "chosen"), [(4, 4), (12, 6), (18, 6), (11, 1)])
def test_plan_training_chooses_among_the_divisors(rows, chosen):
    plan = plan_training(make_model(), total_batch_size=rows)
    assert (
        plan.per_device_train_batch_size,
        plan.per_device_train_batch_size * plan.gradient_accumulation_steps,
    ) == (chosen, rows)


@pytest.mark.slow
def test_all_processes_take_what_the_smallest_can_hold(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom medqa_lib.training.plan import _smallest_of_all\n"
        "number = _smallest_of_all(4 if os.environ['RANK'] == '1' else 16, 2)\n"
        f"open(os.path.join({str(tmp_path)!r}, os.environ['RANK']), 'w').write(str(number))\n"
        "import torch\ntorch.distributed.destroy_process_group()\n"
    )  # as in training.main
    run_in_two(program)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4", "4"]


@pytest.mark.parametrize(
    "choice",
    [{"path": "fast"}, {"path": "padding_free"}, {"path": "best"}],
)
def test_plan_training_refuses_what_cannot_be_had(choice):
    with pytest.raises(ValueError):
        plan_training(make_model(), **choice)


def test_halved_keeps_the_effective_batch_and_ends_at_one_row():
    plan = TrainingPlan("fast", torch.bfloat16, 2, 16, "because")
    assert (plan.halved().per_device_train_batch_size, plan.halved().gradient_accumulation_steps) == (1, 32)
    with pytest.raises(ValueError, match="one row"):
        plan.halved().halved()


@pytest.mark.parametrize("rows", [6, 12, 24, 32, 45])
def test_halved_keeps_any_number_of_rows(rows):
    plan = TrainingPlan("fast", torch.bfloat16, rows, 1, "because")
    while plan.per_device_train_batch_size > 1:
        smaller = plan.halved()
        assert (
            smaller.per_device_train_batch_size * smaller.gradient_accumulation_steps == rows
            and smaller.per_device_train_batch_size <= plan.per_device_train_batch_size / 2
        )
        plan = smaller


def test_collator_of_other_paths_lays_rows_end_to_end():
    assert isinstance(
        TrainingPlan("fast", torch.bfloat16, 2, 16, "because").collator(len), DataCollatorWithFlattening
    )
