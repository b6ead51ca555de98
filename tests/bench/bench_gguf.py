"""GGUF on a CPU by llama.cpp: size, tokens/s, and the answers of F16 and Q4_K_M to all test questions, for non-inferiority.

`python tests/bench/bench_gguf.py OUT [--run exp_005] [--seconds 540] [--processes 16] [--questions N] [--files F16 Q4_K_M]` needs
llama-cpp-python, gguf and the run's adapter (assets/ or the project folder). OUT gets gguf.json and the answers. `--score OUT` compares them,
question by question, with the evaluated model's scores in assets/results (no llama.cpp needed): the paired difference in ROUGE-2 of each
file, and of Q4_K_M to F16, is resampled over groups of related questions; the facts right are counted. 1,494 questions take 70 minutes on 2 cores beside other work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MEDQA_PROFILE", "cpu")
SLOTS, MAX_NEW, CONTEXT = 16, 512, 1024  # sequences decoded together, tokens per answer, tokens per sequence


def open_context(file: str, threads: int, slots: int):
    """(llama.cpp's model, context, vocabulary) with room for `slots` sequences."""
    import llama_cpp as cpp

    cpp.llama_backend_init()
    model = cpp.llama_load_model_from_file(file.encode(), cpp.llama_model_default_params())
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.n_batch = slots * CONTEXT, slots, 2048
    settings.n_threads = settings.n_threads_batch = threads
    return model, cpp.llama_new_context_with_model(model, settings), cpp.llama_model_get_vocab(model)


class Decoder:
    """Greedy answers, `slots` at a time: a slot whose answer has ended takes the next question."""

    def __init__(self, file: str, threads: int, slots: int):
        import llama_cpp as cpp

        self.cpp, self.slots = cpp, slots
        self.model, self.context, vocab = open_context(file, threads, slots)
        self.size, self.eos = cpp.llama_vocab_n_tokens(vocab), cpp.llama_vocab_eos(vocab)
        self.batch = cpp.llama_batch_init(2048, 0, 1)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Feed (token, position, sequence, wanted); the most likely next token of the wanted ones."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if self.cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed on {len(rows)} tokens")
        return [int(np.ctypeslib.as_array(self.cpp.llama_get_logits_ith(self.context, i), (self.size,)).argmax())
                for i, row in enumerate(rows) if row[3]]

    def answer(self, prompts: list[tuple], deadline: float):
        """Yield (index, ids, ended) as answers end; nothing more after `deadline` (time.time())."""
        memory, waiting, busy = self.cpp.llama_get_memory(self.context), list(enumerate(prompts))[::-1], {}
        while (waiting or busy) and time.time() < deadline:
            rows, order = [], []
            for slot in range(self.slots):
                if slot not in busy and waiting:
                    busy[slot] = (*waiting.pop(), [])
                    self.cpp.llama_memory_seq_rm(memory, slot, -1, -1)
                if slot not in busy:
                    continue
                _, prompt, ids = busy[slot]
                new = ids[-1:] or prompt
                start = len(prompt) + len(ids) - len(new)
                if len(rows) + len(new) > 2048:
                    if not ids:  # its prompt waits for the next step
                        waiting.append(busy.pop(slot)[:2])
                    continue
                order.append(slot)
                rows += [(token, start + i, slot, i == len(new) - 1) for i, token in enumerate(new)]
            for slot, token in zip(order, self.step(rows), strict=True):
                index, _, ids = busy[slot]
                ids.append(token)
                if token == self.eos or len(ids) == MAX_NEW:
                    yield index, [i for i in ids if i != self.eos], token == self.eos
                    del busy[slot]


def work(file: str, prompts: list[tuple], deadline: float, path: str) -> None:
    """A process of its own: its answers, a line of JSON each."""
    with open(path, "w") as out:
        for index, ids, ended in Decoder(file, 1, SLOTS).answer([ids for _, ids in prompts], deadline):
            out.write(json.dumps([prompts[index][0], ids, ended]) + "\n")
            out.flush()


def measure_speed(file: str, threads: int, prompt: tuple) -> float:
    """Tokens/s of one answer of 128 tokens with `threads` threads, the better of two."""
    decoder, best = Decoder(file, threads, 1), 0.0
    for _ in range(2):
        decoder.cpp.llama_memory_seq_rm(decoder.cpp.llama_get_memory(decoder.context), 0, -1, -1)
        (token,), start = decoder.step([(t, i, 0, i == len(prompt) - 1) for i, t in enumerate(prompt)]), time.time()
        for i in range(128):
            (token,) = decoder.step([(token, len(prompt) + i, 0, True)])
        best = max(best, 128 / (time.time() - start))
    return best


def answer_all(out: Path, options: argparse.Namespace) -> None:
    from medqa_lib.data.prepare import prepare_splits
    from medqa_lib.evaluation.results import question_id
    from medqa_lib.model import load_tokenizer
    from medqa_lib.prompts import encode_prompt
    from medqa_lib.publish import export, hub

    end, folder = time.time() + options.seconds, Path(options.gguf)
    f16 = folder / f"medqa-{options.run}-F16.gguf"
    if not f16.exists():
        export.export_gguf(export.export_merged(hub.find_adapters()[options.run], folder / "merged"), f16)
    files = {"F16": f16, "Q4_K_M": f16.with_name(f16.name.replace("F16", "Q4_K_M"))}
    if not files["Q4_K_M"].exists():
        export.quantize_gguf(f16)
    tokenizer, test = load_tokenizer(), prepare_splits()["test"].shuffle(seed=42)
    questions = [row for row in test["question"] if "\nA. " not in row][:options.questions]  # texts of choices never count
    prompts = [(question_id(text), tuple(encode_prompt(tokenizer, text))[:CONTEXT - MAX_NEW]) for text in questions]
    cpu = next((line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    report = {"run": options.run, "questions": len(prompts), "cpu": cpu.strip(), "cores": os.cpu_count(),
              "date": time.strftime("%F"), "python": platform.python_version(), "files": {}}
    for number, name in enumerate(options.files):
        file, threads = str(files[name]), min(4, os.cpu_count())
        speed, start = measure_speed(file, threads, prompts[0][1]), time.time()
        limit = start + (end - start) / (len(options.files) - number) if options.share else end
        shares = [prompts[i::options.processes] for i in range(options.processes)]
        paths = [out / f"part_{name}_{i}.jsonl" for i in range(options.processes)]
        workers = [multiprocessing.get_context("spawn").Process(target=work, args=(file, share, limit, str(path)))
                   for share, path in zip(shares, paths, strict=True)]
        for process in workers:
            process.start()
        for process in workers:
            process.join()
        found = [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]
        answers = {key: [tokenizer.decode(ids, skip_special_tokens=True).strip(), ended] for key, ids, ended in found}
        (out / f"answers_{name}.json").write_text(json.dumps(answers))
        tokens, seconds = sum(len(ids) for _, ids, _ in found), time.time() - start
        report["files"][name] = {"megabytes": round(files[name].stat().st_size / 1e6, 1), "threads": threads,
                                 "tokens_per_second": round(speed, 1), "answered": len(answers), "seconds": round(seconds, 1),
                                 "tokens_per_second_batched": round(tokens / seconds, 1), "processes": options.processes}
        for path in paths:
            path.unlink(missing_ok=True)
        (out / "gguf.json").write_text(json.dumps(report, indent=1))
        print(name, report["files"][name], flush=True)


def score(out: Path, run: str) -> None:
    """Add to gguf.json: paired differences in ROUGE-2 and facts right over the questions that both answered."""
    import pandas as pd

    from medqa_lib.data.prepare import prepare_splits
    from medqa_lib.evaluation.facts import score_facts
    from medqa_lib.evaluation.results import load_run, question_id
    from medqa_lib.evaluation.significance import compare_runs
    from medqa_lib.metrics import score_answers

    scores = load_run(ROOT / "assets" / "results" / "smollm2-135m" / run).scores.set_index("question_id", drop=False)
    rows = {question_id(row["question"]): row for row in prepare_splits()["test"]}
    frames = {"evaluated": scores[scores["kind"] == "free"]}
    for path in sorted(out.glob("answers_*.json")):
        answers = json.loads(path.read_text())
        keys = [key for key in frames["evaluated"].index if key in answers]
        texts, asked = [answers[key][0] for key in keys], [rows[key] for key in keys]
        references = [[row["answer"], *json.loads(row.get("references") or "[]")] for row in asked]
        facts = [score_facts(row["question"], text, known) for row, text, known in zip(asked, texts, references, strict=True)]
        frame = pd.concat([score_answers(texts, references), pd.DataFrame(facts)], axis=1).set_axis(keys)
        about = frames["evaluated"].loc[keys, ["question_id", "source", "group", "kind"]]
        frames[path.stem.removeprefix("answers_")] = pd.concat([about, frame], axis=1)
    report, table = json.loads((out / "gguf.json").read_text()), []
    pairs = [("evaluated", name) for name in frames if name != "evaluated"] + [("F16", "Q4_K_M")]
    for base, tuned in pairs:
        if {base, tuned} <= frames.keys():
            keys = frames[base].index.intersection(frames[tuned].index)
            left, right = (frames[name].loc[keys].reset_index(drop=True) for name in (base, tuned))
            for row in compare_runs(left, right, ["rouge2", "fact_accuracy"]).itertuples():
                table.append({"base": base, "file": tuned, "metric": row.metric, "n": int(row.n), "groups": int(row.groups),
                              "of_base": row.base, "of_file": row.tuned, "low": row.ci_low, "high": row.ci_high,
                              "low_percent": 100 * row.ci_low / row.base if row.base else None,
                              "facts_right": [int(f["fact_right"].sum()) for f in (left, right)],
                              "facts_asked": int(left["fact_asked"].sum())})
    report["non_inferiority"] = table
    (out / "gguf.json").write_text(json.dumps(report, indent=1))
    print(pd.DataFrame(table).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", default="exp_005")
    parser.add_argument("--gguf", default="/tmp/medqa-gguf", help="where the GGUF files are, or are made")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--questions", type=int)
    parser.add_argument("--files", nargs="+", default=["Q4_K_M", "F16"])
    parser.add_argument("--share", action="store_true", help="split the time between the files")
    parser.add_argument("--score", action="store_true")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    score(chosen.out, chosen.run) if chosen.score else answer_all(chosen.out, chosen)
