"""Answer the test questions, score the answers, compare runs."""
