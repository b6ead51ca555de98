"""Imported once by the fork server: what every training process would otherwise import and read for itself."""

import os

# A process that forks must have one thread: no BLAS pool, no Arrow helper, no monitor of tqdm.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ARROW_DEFAULT_MEMORY_POOL="system")

import tqdm

tqdm.tqdm.monitor_interval = 0

from medqa_lib import metrics  # noqa: E402
from medqa_lib.training import run as training  # noqa: E402

metrics.score_answers(["A short answer."], ["An answer."])  # reads the dictionaries of the readability scores
TRAINING = training.main
