"""What the experiments declare about themselves is true."""

import dataclasses

import pytest

from medqa_lib import config
from medqa_lib.config import EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_experiment_differs_from_its_partner_in_what_it_declares_only(experiment):
    baseline = EXPERIMENTS[experiment.baseline or experiment.name]  # exp_001, the first, has none
    recipe = {field.name for field in dataclasses.fields(experiment)} - {
        "name",
        "question",
        "baseline",
        "changed_fields",
    }
    assert {field for field in recipe if getattr(experiment, field) != getattr(baseline, field)} == set(
        experiment.changed_fields
    )


def test_seed_zero_is_a_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    monkeypatch.setenv("MEDQA_PROFILE", "smoke")
    config.write_settings(seed=0)
    assert config.current_profile().seed == 0
