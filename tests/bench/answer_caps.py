"""What the report's readings give if answers had stopped earlier (notebook 21): python tests/bench/answer_caps.py OUT.csv

Nothing is generated. Greedy answers are the same up to the cut, so the first N tokens of a stored answer of 512 are the answer that a
limit of N gives. Without BERTScore, which takes an hour on two cores. Needs the answers and adapters of the runs in the project folder
(notebook 16 makes them).
"""

import json
import sys

import pandas as pd

from medqa_lib import metrics
from medqa_lib.config import current_profile, home_dir
from medqa_lib.data.prepare import prepare_splits
from medqa_lib.evaluation.answers import AnswerStore
from medqa_lib.evaluation.generation import generate_records
from medqa_lib.evaluation.results import identify_weights
from medqa_lib.model import load_tokenizer
from medqa_lib.prompts import encode_chat_prompt

CAPS = (100, 150, 256, 512)
UNTUNED = ("base", "baseline_chat_template")
RUNS = (*UNTUNED, "exp_001", "exp_002", "exp_003", "exp_004", "exp_001_aligned", "exp_002_aligned")
SHOWN = ("rouge1", "rouge2", "rougeL", "bleu", "sentence_bleu")


def read_answers(name: str, questions: list, tokenizer, profile) -> list:
    """The run's stored answers, in the order of the questions."""
    folder = home_dir() / "adapters" / profile.model_slug / name
    path = home_dir() / "answers" / profile.model_slug / f"{name}.jsonl"
    store = AnswerStore(path, None if name in UNTUNED else folder, identify_weights(profile.model))
    asked = [encode_chat_prompt(tokenizer, each) for each in questions] if "chat" in name else questions
    return generate_records(None, tokenizer, asked, max(CAPS), store)


def cut(tokenizer, answer, cap: int) -> str:
    """The text of the answer's first `cap` tokens."""
    if answer.tokens <= cap:
        return answer.text
    return tokenizer.decode(tokenizer(answer.text, add_special_tokens=False)["input_ids"][:cap]).strip()


def main(out: str) -> None:
    profile, test = current_profile(), prepare_splits()["test"]
    tokenizer = load_tokenizer(profile)
    references = [[row["answer"], *json.loads(row["references"] or "[]")] for row in test]
    is_free = [not choices for choices in test["choices"]]
    rows = []
    for name in RUNS:
        answers = read_answers(name, list(test["question"]), tokenizer, profile)
        for cap in CAPS:
            scores = metrics.score_answers([cut(tokenizer, answer, cap) for answer in answers], references)
            for questions, part in {"all": scores, "free": scores[is_free]}.items():
                numbers = metrics.summarize_scores(part)
                rows.append({"run": name, "cap": cap, "questions": questions, "n": len(part), **{key: numbers[key] for key in SHOWN}})
            print(name, cap, flush=True)
            pd.DataFrame(rows).to_csv(out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main(sys.argv[1])
