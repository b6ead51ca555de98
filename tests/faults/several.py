"""`accelerate launch` starts this: `python -m medqa_lib.training exp_004` (smoke profile, 16 steps) in which one process may die.

FAULT is "RANK POINT": that process kills itself at the step, at the save, at its first answers or before it scores.
"""

import dataclasses
import os
import signal
import sys

from fault_harness import EXPERIMENT, STEP_DIVISOR, before

from medqa_lib import config, metrics
from medqa_lib.evaluation.answers import AnswerStore
from medqa_lib.training import checkpoints, session
from medqa_lib.training import run as training

RANK, POINT = os.environ.get("FAULT", "none none").split()


def die(*args, **kwargs):
    if os.environ["RANK"] == RANK:
        os.kill(os.getpid(), signal.SIGKILL)


POINTS = {
    "step": (
        session.CheckpointSession,
        "on_step_end",
        lambda session, args, state, *_, **__: die() if state.global_step == 7 else None,
    ),
    "save": (checkpoints, "hash_file", lambda path: die() if "checkpoint-8" in str(path) else None),
    "answers": (AnswerStore, "append", die),
    "scores": (metrics, "score_answers", die),
}

config.PROFILES["smoke"] = dataclasses.replace(config.PROFILES["smoke"], step_divisor=STEP_DIVISOR)
if POINT in POINTS:
    before(*POINTS[POINT])
sys.argv = ["medqa_lib.training", EXPERIMENT]
training.main()
