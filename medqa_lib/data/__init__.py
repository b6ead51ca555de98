"""The data end to end: load the sources, clean and merge them, split them by leakage group, keep them.

    sources = load_sources()                 # raw rows; .attrs["origin"] of each frame says where from
    pairs = merge_sources(sources)           # question, answer, ...; pairs.attrs["funnel"] counts every step
    pairs = pairs_from("faq.csv")            # or pairs of your own
    splits = split_pairs(pairs, by="group")  # train, validation, test
    splits = prepare_splits()                # load, merge and split, kept under home_dir()/data
"""

from medqa_lib.data.own import pairs_from
from medqa_lib.data.prepare import load_splits, merge_sources, prepare_splits, save_splits
from medqa_lib.data.sources import load_sources
from medqa_lib.data.splits import COLUMNS, hash_splits, leakage_report, link_groups, split_pairs

__all__ = ["COLUMNS", "hash_splits", "leakage_report", "link_groups", "load_sources", "load_splits",
           "merge_sources", "pairs_from", "prepare_splits", "save_splits", "split_pairs"]
