"""Train one experiment: audited, checkpointed, resumable."""

from medqa_lib.training.run import run_experiment

__all__ = ["run_experiment"]
