"""Which runs a comparison shows: yours, published ones in the gaps where the two can be compared, and whose they are."""

import dataclasses
import json
import shutil

import pytest

from medqa_lib import config
from medqa_lib.evaluation import results

PROFILE = dataclasses.replace(config.PROFILES["gpu"], model="smollm2-135m")
STUDY, RUNS = results.PUBLISHED / "smollm2-135m", ("base", "exp_003", "exp_004")


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch):
    """Three of the published runs: reading all of them takes a second."""
    folder = tmp_path / "published" / "smollm2-135m"
    for name in RUNS:
        shutil.copytree(STUDY / name, folder / name)
    monkeypatch.setattr(results, "PUBLISHED", folder.parent)
    return folder


@pytest.fixture
def own(tmp_path):
    """A home with runs that are copies of published ones."""

    def make(*names):
        for name in names:
            shutil.copytree(STUDY / name, tmp_path / "results" / "smollm2-135m" / name)
        return tmp_path

    return make


def test_without_own_runs_all_are_published(own):
    runs, names = results.gather_runs(PROFILE, home=own())
    assert names == [] and set(runs) == set(RUNS)


def test_a_model_without_published_runs_gets_those_of_another(tmp_path):
    profile = dataclasses.replace(PROFILE, model="tinyllama-1.1b-chat")
    assert "exp_004" in results.gather_runs(profile, home=tmp_path)[0]


def test_published_runs_fill_the_gaps(own, published):
    runs, names = results.gather_runs(PROFILE, home=own("base", "exp_004"))
    assert names == ["base", "exp_004"] and "exp_003" in runs
    assert runs["exp_004"].folder.parent != published and runs["exp_003"].folder.parent == published


def test_runs_that_cannot_be_compared_do_not_mix(own):
    home = own("base", "exp_004")
    path = home / "results" / "smollm2-135m" / "base" / "config.json"
    saved = json.loads(path.read_text())
    saved["identity"]["evaluation"]["max_new_tokens"] = 64
    path.write_text(json.dumps(saved))
    assert list(results.gather_runs(PROFILE, home=home)[0]) == ["base", "exp_004"]


def test_own_runs_wait_for_the_needed_ones(own):
    home = own("base", "exp_004")
    assert results.gather_runs(PROFILE, needed=("base", "exp_003"), home=home)[1] == []
