"""What the experiments declare about themselves is true."""

import dataclasses

import pytest

from medqa_lib.config import EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_experiment_differs_from_its_partner_in_what_it_declares_only(experiment):
    partner = EXPERIMENTS[experiment.partner or experiment.name]  # exp_001, the first, has none
    recipe = {field.name for field in dataclasses.fields(experiment)} - {"name", "question", "partner", "differs_in"}
    assert {field for field in recipe if getattr(experiment, field) != getattr(partner, field)} == set(experiment.differs_in)
