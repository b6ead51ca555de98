"""The data end to end: load both sources, clean and merge them, split them by leakage group, keep the splits.

    sources = load_sources()                    # raw rows: Kaggle and Hub, MEDQA_DATA_DIR, or the bundled sample
    pairs = merge_sources(sources)              # question, answer, ...; pairs.attrs["funnel"] counts every step
    splits = split_pairs(pairs, by="group")     # train, validation, test
    splits = prepare_splits()                   # all of it, kept under home_dir()/data
"""

from medqa_lib.data.prepare import load_splits, merge_sources, prepare_splits, save_splits
from medqa_lib.data.sources import load_sources
from medqa_lib.data.splits import COLUMNS, hash_splits, leakage_report, link_groups, split_pairs

__all__ = ["COLUMNS", "hash_splits", "leakage_report", "link_groups", "load_sources", "load_splits", "merge_sources", "prepare_splits",
           "save_splits", "split_pairs"]
