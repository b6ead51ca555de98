"""Trains the report's first three experiments under label mistakes that it may have made (notebook 21).

    python tests/bench/report_candidates.py exp_003_mask_off_by_one exp_002_full_sequence ...

Names: exp_001, exp_002 or exp_003, then a candidate. `full_sequence` and `padding_supervised` are policies of
the library; the other three are known here only:

    default_collator   DataCollatorForLanguageModeling where pad is EOS: prompt learned, EOS never
    unshifted_loss     a loss of one's own without any shift: position t learns the token it has just read
    mask_off_by_one    prompt tokenised apart, one token too many masked: the answer's first is not learned
"""

import argparse
import dataclasses

from medqa_lib import config, labels
from medqa_lib.training import run

CANDIDATES = ("default_collator", "unshifted_loss", "mask_off_by_one")
label_ids = labels.label_ids


def candidate_labels(input_ids, prompt_tokens, policy="aligned", eos_token_id=None):
    """`labels.label_ids`, for the candidates, too."""
    if policy not in CANDIDATES:
        return label_ids(input_ids, prompt_tokens, policy, eos_token_id)
    if policy == "default_collator":
        return [-100 if token == eos_token_id else token for token in input_ids]
    wanted = label_ids(input_ids, prompt_tokens, "aligned", eos_token_id)
    if policy == "unshifted_loss":  # the model's own shift moves them back onto their places
        return [-100, *wanted[:-1]]
    return [-100] * (prompt_tokens + 1) + input_ids[prompt_tokens + 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    labels.label_ids = candidate_labels
    run.require_policy = lambda report, policy: None  # the audit names these faults; here they are meant
    for name in parser.parse_args().runs:
        experiment = dataclasses.replace(config.get_experiment(name[:7]), name=name, label_policy=name[8:])
        run.run_experiment(experiment)


if __name__ == "__main__":
    main()
