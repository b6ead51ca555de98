"""Ablations of retrieval: exp_005 and exp_006, three seeds, asked with the nearest passages, random ones and none.

    python tests/bench/bench_retrieval.py OUT [--seconds 330] [--processes 7]

Trains the adapters that the project folder lacks (the study's in assets/adapters are taken), asks them, takes MedQA with passages, and
times answers last, alone on the GPU. Each task is a process of its own; none is started after --seconds, the most wanted come first.
OUT/results/MODEL/RUN: a run's five files. OUT/losses: training's. OUT/exp_006: its adapter as float16. OUT/tasks.json: seconds per task.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEEDS = ("", "_seed43", "_seed44")
ROOT = Path(__file__).parents[2]


def list_tasks() -> list[str]:
    """COMMAND:RUN:PASSAGES:PART, the most wanted first."""
    runs = [f"{name}{seed}" for name in ("exp_006", "exp_005", "exp_006_random_passages") for seed in SEEDS]
    asked = ["ask:exp_006:nearest:validation"]
    for recipe, kinds in (("exp_006", ("none", "random")), ("exp_005", ("nearest",)), ("exp_006_random_passages", ("random",)),
                          ("exp_006", ("nearest",)), ("exp_005", ("none",))):
        asked += [f"ask:{recipe}{seed}:{kind}:test" for kind in kinds for seed in SEEDS]
    return [*(f"train:{run}" for run in runs), *asked, *(f"exam:exp_006{seed}" for seed in SEEDS), "time:exp_006"]


def do_task(out: Path, command: str, name: str, passages: str = "", part: str = "") -> None:
    from medqa_lib.config import current_profile, home_dir

    profile, home = current_profile(), home_dir()
    adapter = home / "adapters" / profile.model_slug / name
    if command == "ask":
        from medqa_lib.evaluation.run import ask_again

        run = ask_again(name, passages, part)
        shutil.copytree(run.folder, out / "results" / profile.model_slug / run.name, dirs_exist_ok=True)
    elif command == "train":
        study = ROOT / "assets/adapters" / profile.model_slug / name
        if study.exists():
            shutil.copytree(study, adapter, dirs_exist_ok=True)
        if not (adapter / "adapter_model.safetensors").exists():
            train(name, profile, home, out, adapter)
        if name == "exp_006":
            keep_half(adapter, out / name)
    elif command == "exam":
        take_medqa(name, profile, adapter, out)
    else:
        time_answers(profile, adapter, out)


def train(name, profile, home, out, adapter) -> None:
    """train_adapter with checkpoints in a folder that is not kept."""
    from medqa_lib.config import get_experiment
    from medqa_lib.data import hash_splits, prepare_splits
    from medqa_lib.evaluation.results import run_identity
    from medqa_lib.training.run import train_adapter
    from medqa_lib.training.session import CheckpointSession

    experiment, splits = profile.scale(get_experiment(name)), prepare_splits(home=home)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with CheckpointSession(folder, folder, run_identity(experiment, profile, hash_splits(splits))) as session:
            losses, numbers = train_adapter(experiment, splits, profile, session, folder / "adapter")
        adapter.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder / "adapter", adapter, dirs_exist_ok=True)
    (out / "losses").mkdir(parents=True, exist_ok=True)
    losses.to_csv(out / "losses" / f"{name}.csv", index=False, float_format="%.6g")
    (out / "losses" / f"{name}.json").write_text(json.dumps(numbers, indent=1))


def keep_half(adapter: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(adapter / "adapter_config.json", folder)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


def take_medqa(name, profile, adapter, out) -> None:
    """MedQA alone: three quarters of the other exam's questions are training questions, whose answers would be the passages."""
    from medqa_lib.data import prepare_splits
    from medqa_lib.evaluation import exam, retrieval
    from medqa_lib.model import load_merged, load_tokenizer

    exams = exam.load_exams()
    exams = exams[exams["exam"] == "medqa"].reset_index(drop=True).head(profile.test_questions or 5000)
    index = retrieval.Index(prepare_splits()["train"])
    table = exam.take_exam(load_merged(adapter, profile), load_tokenizer(profile), exams, index)
    folder = out / "results" / profile.model_slug / name
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "exam_medqa.csv", index=False, float_format="%.6g")


def time_answers(profile, adapter, out, rows: int = 256) -> None:
    """Seconds for the first test questions, with and without passages, the second of two times."""
    import torch

    from medqa_lib.data import prepare_splits
    from medqa_lib.evaluation import retrieval
    from medqa_lib.evaluation.generation import generate_records
    from medqa_lib.model import load_merged, load_tokenizer
    from medqa_lib.prompts import encode_prompt

    splits, model, tokenizer, found = prepare_splits(), load_merged(adapter, profile), load_tokenizer(profile), {}
    questions = list(splits["test"]["question"])[:rows]
    for kind in ("none", "nearest"):
        start = time.time()
        asked = list(map(retrieval.ask, questions, retrieval.Index(splits["train"]).find(questions, kind=kind)))
        searched = time.time() - start
        for _ in range(2):
            start = time.time()
            answers = generate_records(model, tokenizer, asked, profile.max_new_tokens)
            seconds = time.time() - start
        found[kind] = {"questions": len(asked), "index_and_search_s": searched, "answers_s": seconds,
                       "prompt_tokens": sum(len(encode_prompt(tokenizer, each)) for each in asked) / len(asked),
                       "answer_tokens": sum(each.tokens for each in answers) / len(answers)}
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    (out / "cost.json").write_text(json.dumps(found, indent=1))


def run_all(out: Path, seconds: float, processes: int) -> int:
    """Start tasks as their adapters are there; what failed or was not started is said."""
    start, waiting, running, done = time.time(), list_tasks(), {}, {}
    while waiting or running:
        for task, (process, began) in list(running.items()):
            if process.poll() is not None:
                done[task] = {"rc": process.returncode, "s": round(time.time() - began), "ended": round(time.time() - start)}
                print(f"{done[task]['ended']:4} s  {task}: rc {process.returncode}, {done[task]['s']} s", flush=True)
                del running[task]
                (out / "tasks.json").write_text(json.dumps(done, indent=1))
        if time.time() - start > seconds:
            waiting = []
        ready = [task for task in waiting if is_ready(task, done, running)]
        if ready and len(running) < processes:
            task = ready[0]
            waiting.remove(task)
            log = open(out / f"{task.replace(':', '_')}.log", "w")
            running[task] = subprocess.Popen([sys.executable, __file__, str(out), "--task", task], stdout=log,
                                             stderr=subprocess.STDOUT), time.time()
        elif waiting and not running and not ready:
            break  # what they need has failed
        time.sleep(0.3)
    missing = [task for task in list_tasks() if done.get(task, {"rc": 1})["rc"]]
    print(f"{time.time() - start:.0f} s; not done: {', '.join(missing) or 'nothing'}")
    return bool(missing)


def is_ready(task: str, done: dict, running: dict) -> bool:
    command, name = task.split(":")[:2]
    if command == "time":
        return not running and done.get(f"train:{name}", {"rc": 1})["rc"] == 0
    return command == "train" or done.get(f"train:{name}", {"rc": 1})["rc"] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.task:
        do_task(options.out, *options.task.split(":"))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "2")
        from medqa_lib import standin
        from medqa_lib.config import current_profile
        from medqa_lib.data import prepare_splits

        if encoder := current_profile().bertscore_encoder:
            standin.fetch_encoder(encoder)
        prepare_splits()  # once, before the processes read them
        sys.exit(run_all(options.out, options.seconds, options.processes))


if __name__ == "__main__":
    main()
