"""What is planned, and that a plan leaves the recipe alone."""

import pytest
import torch
from test_fast_train import make_model

from medqa_lib.planning import FlatCollator, TrainingPlan, plan_training

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is planned without a GPU")


def test_plan_training_without_gpu_is_padded_float32():
    plan = plan_training(make_model(), effective_batch=32)
    assert (plan.path, plan.dtype, plan.micro_batch, plan.accumulation) == ("padded", torch.float32, 8, 4)
    assert plan.collator(len) is len
    assert plan.trainer_arguments()["bf16"] is plan.trainer_arguments()["fp16"] is False


def test_plan_training_divides_the_rows_among_processes():
    plan = plan_training(make_model(), effective_batch=32, processes=2, micro_batch=4)
    assert plan.micro_batch * plan.accumulation * 2 == 32


@pytest.mark.parametrize("choice", [{"path": "fast"}, {"path": "flattened"}, {"path": "best"}, {"micro_batch": 5}])
def test_plan_training_refuses_what_cannot_be_had(choice):
    with pytest.raises(ValueError):
        plan_training(make_model(), **choice)


def test_halved_keeps_the_effective_batch_and_ends_at_one_row():
    plan = TrainingPlan("fast", torch.bfloat16, 2, 16, True, "because")
    assert (plan.halved().micro_batch, plan.halved().accumulation) == (1, 32)
    with pytest.raises(ValueError, match="one row"):
        plan.halved().halved()


def test_collator_of_other_paths_lays_rows_end_to_end():
    assert isinstance(TrainingPlan("fast", torch.bfloat16, 2, 16, True, "because").collator(len), FlatCollator)
