"""Imported once by the fork server: what every training process would otherwise import and read for itself."""

import os
import threading

# A process that forks must have one thread: no BLAS pool, no Arrow helper, no monitor of tqdm.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ARROW_DEFAULT_MEMORY_POOL="system")

import tqdm

tqdm.tqdm.monitor_interval = 0
# tqdm's own lock is a semaphore that all forked processes share: one killed while it prints would stop all later ones.
tqdm.tqdm.set_lock(threading.RLock())

from medqa_lib import metrics  # noqa: E402
from medqa_lib.training import run as training  # noqa: E402

metrics.score_answers(["A short answer."], ["An answer."])  # reads the dictionaries of the readability scores
TRAINING = training.main
