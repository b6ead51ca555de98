"""Imported once by the fork server: what every training process would otherwise import and read for itself."""

from medqa_lib import metrics
from medqa_lib.training import run as training

metrics.score_answers(["A short answer."], ["An answer."])  # reads the dictionaries of the readability scores
TRAINING = training.main
