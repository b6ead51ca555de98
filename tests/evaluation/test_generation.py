"""Batched greedy answers equal one-by-one ones; the answers file survives torn and damaged lines."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from two_processes import run_in_two

from medqa_lib import labels
from medqa_lib.config import PROFILES
from medqa_lib.evaluation import generation
from medqa_lib.evaluation.answers import Answer, AnswerStore, hash_adapter
from medqa_lib.evaluation.generation import compare_answers, generate_answers, generate_records, pad_left
from medqa_lib.model import load_base_model, load_tokenizer
from medqa_lib.prompts import encode_prompt

QUESTIONS = [
    "What is gout?",
    "Why?",
    "What are the signs of malaria in a small child?",
    "Is asthma inherited?",
    "How is anaemia treated at home?",
]
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PROFILES["smoke"])


@pytest.fixture(scope="module")
def model():
    return load_base_model(PROFILES["smoke"], quantized=False).float()


def decode_greedily(model, prompt: list[int], new_tokens: int) -> list[int]:
    """Independent reference: one row, no padding, no cache, no generate()."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat(
                [ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1
            )
    return ids[0, len(prompt) :].tolist()


def records_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_generate_answers_equals_greedy_decoding_row_by_row(model, tokenizer):
    expected = [
        tokenizer.decode(
            decode_greedily(model, encode_prompt(tokenizer, question), 12), skip_special_tokens=True
        ).strip()
        for question in QUESTIONS
    ]
    assert len(set(expected)) > 1
    assert generate_answers(model, tokenizer, QUESTIONS, 12, batch_size=2) == expected


def test_generate_answers_prompts_with_the_ids_that_training_masks(model, tokenizer, monkeypatch):
    seen = []

    def record(model, eos, ids, mask, max_new_tokens):
        seen.extend(row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True))
        return [[5]] * len(ids)

    monkeypatch.setattr(generation, "decode_plain", record)
    generate_answers(model, tokenizer, QUESTIONS[:1], 4)
    example = labels.encode_example(tokenizer, QUESTIONS[0], "It is an illness of the joints.", 200)
    masked = example["labels"].count(labels.IGNORE_INDEX)
    assert seen == [example["input_ids"][:masked]]


def test_generate_answers_ignores_and_restores_the_models_generation_config(model, tokenizer):
    expected = generate_answers(model, tokenizer, QUESTIONS, 12)
    before = model.generation_config
    leaky = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        max_length=3,
        num_beams=2,
    )
    model.generation_config = leaky
    model.train()
    try:
        assert generate_answers(model, tokenizer, QUESTIONS, 12) == expected
        assert model.generation_config is leaky and model.training
    finally:
        model.generation_config = before
        model.eval()


def test_generate_records_says_whether_an_answer_stopped(model):
    prompt = encode_prompt(load_tokenizer(PROFILES["smoke"]), QUESTIONS[0])
    ids = decode_greedily(model, prompt, 12)
    tokenizer = load_tokenizer(PROFILES["smoke"])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(
        ids[5]
    )  # so the answer ends with its sixth token, or an equal one before
    length = ids.index(ids[5])
    (answer,) = generate_records(model, tokenizer, [prompt], 12)
    assert (answer.stopped, answer.tokens) == (True, length)
    (cut,) = generate_records(model, tokenizer, [prompt], length)
    assert (cut.stopped, cut.tokens) == (False, length)


def test_generation_stops_at_the_models_own_end_tokens_too(model, tokenizer, monkeypatch):
    prompt = encode_prompt(tokenizer, QUESTIONS[0])
    ids = decode_greedily(model, prompt, 12)
    end = ids[5]  # not special to the tokenizer, as <end_of_turn> is not to some
    length = ids.index(end)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])
    (answer,) = generate_records(model, tokenizer, [prompt], 12)
    expected = tokenizer.decode(ids[:length]).strip()
    assert (answer.text, answer.stopped, answer.tokens) == (expected, True, length)


def test_generate_records_generates_a_repeated_question_once(model, tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    first, second, third = generate_records(
        model, tokenizer, ["Why?", "How is it treated?", "Why?"], 4, store=AnswerStore(path)
    )
    assert first == third != second
    assert len(records_of(path)) == 2


def test_generate_records_reads_without_a_model(model, tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    expected = generate_records(model, tokenizer, QUESTIONS, 4, store=AnswerStore(path))
    written = path.read_bytes()
    assert generate_records(None, tokenizer, QUESTIONS[::-1], 4, store=AnswerStore(path)) == expected[::-1]
    assert path.read_bytes() == written
    with pytest.raises(ValueError, match="1 of 1 answers are not in the store"):
        generate_records(None, tokenizer, ["Is it new?"], 4, store=AnswerStore(path))


@pytest.mark.parametrize("change", ["max_new_tokens", "adapter", "base", "version", "prompt", "eos"])
def test_generate_records_does_not_read_what_another_setting_wrote(model, tmp_path, monkeypatch, change):
    tokenizer, store = load_tokenizer(PROFILES["smoke"]), AnswerStore(tmp_path / "answers.jsonl")
    generate_records(model, tokenizer, QUESTIONS, 4, store)
    again = AnswerStore(tmp_path / "answers.jsonl")
    questions, new_tokens = QUESTIONS, 4
    if change == "max_new_tokens":
        new_tokens = 5
    elif change in ("adapter", "base"):
        again.model[change == "adapter"] = "another"
    elif change == "version":
        monkeypatch.setitem(generation.VERSIONS, "generation", 99)
    elif change == "prompt":
        questions = [[*encode_prompt(tokenizer, question), 7] for question in QUESTIONS]
    else:
        tokenizer.eos_token = "a"
    with pytest.raises(ValueError, match="5 of 5"):
        generate_records(None, tokenizer, questions, new_tokens, again)


def test_generate_records_halves_the_batch_when_memory_runs_out(model, tokenizer, monkeypatch):
    sizes = []

    def decode(model, eos, ids, mask, max_new_tokens):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[5]] * len(ids)

    monkeypatch.setattr(generation, "decode_plain", decode)
    assert len(generate_answers(model, tokenizer, QUESTIONS, 4, batch_size=5)) == 5
    assert sizes == [5, 2, 2, 1]


def test_generate_records_refuses_a_length_that_leaves_no_room_for_a_prompt(model, tokenizer):
    most = model.config.max_position_embeddings
    for length in (most, most + 5):
        with pytest.raises(ValueError, match=f"{most} tokens.* {length} "):
            generate_records(model, tokenizer, QUESTIONS[:1], length)


def test_generate_records_gives_up_when_one_row_does_not_fit(model, tokenizer, monkeypatch):
    def decode(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "decode_plain", decode)
    with pytest.raises(torch.OutOfMemoryError):
        generate_answers(model, tokenizer, QUESTIONS, 4)


def test_answer_store_repairs_a_line_torn_at_any_byte(tmp_path):
    path, settings = tmp_path / "answers.jsonl", {"max_new_tokens": 4}
    answers = {(1, 2): Answer("Rest.", True, 2), (3,): Answer("naïve\u2028œdema", False, 4)}
    for prompt, answer in answers.items():
        AnswerStore(path).append({prompt: answer}, settings)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        store = AnswerStore(path)
        missing = {prompt: answer for prompt, answer in answers.items() if not store.get(prompt, settings)}
        assert len(missing) == (2 if cut <= whole.index(b"\n") else 1)
        store.append(missing, settings)
        assert path.read_bytes() == whole
        assert all(AnswerStore(path).get(prompt, settings) == answer for prompt, answer in answers.items())


def test_answer_store_ignores_a_damaged_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    for prompt in ((1,), (2,)):
        AnswerStore(path).append({prompt: Answer("Rest.", True, 2)}, {})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\0" * 20 + b"\n" + lines[1])
    store = AnswerStore(path)
    assert (store.get((1,), {}), store.get((2,), {})) == (None, Answer("Rest.", True, 2))


def test_answer_store_reads_the_files_of_other_processes(tmp_path):
    store = AnswerStore(tmp_path / "answers.jsonl")
    store.append({(5,): Answer("Rest.", True, 2)}, {}, process=3)
    assert not store.path.exists()
    assert AnswerStore(store.path).get((5,), {}) == Answer("Rest.", True, 2)


def test_pad_left_puts_padding_before_the_prompt():
    ids, mask = pad_left([[5, 6, 7], [8]], 1, "cpu")
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_compare_answers_counts_words_before_the_first_difference():
    # 2 of 3 words, all, none of 2, and two empty answers
    result = compare_answers(["rest and water", "no", "see one", ""], ["rest and sleep", "no", "a", ""])
    assert result == {"n": 4, "identical": 0.5, "common_prefix": pytest.approx((2 / 3 + 1 + 0 + 1) / 4)}


def test_hash_adapter_follows_weights_and_scale_only(tmp_path):
    def save(weights: bytes, **settings) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        return hash_adapter(tmp_path)

    first = save(b"one", r=8, lora_alpha=16, base_model_name_or_path="/here")
    assert save(b"one", lora_alpha=16, r=8, base_model_name_or_path="/there") == first and len(first) == 16
    assert (
        len(
            {
                first,
                save(b"two", r=8, lora_alpha=16),
                save(b"one", r=8, lora_alpha=32),
                hash_adapter(None),
                save(b"one", r=8, lora_alpha=16, rank_pattern={"q_proj": 4}),
            }
        )
        == 5
    )


MANY = [f"What is disease {'x' * (i % 7)} number {i}?" for i in range(24)]
CHILD = """
import json, sys
from pathlib import Path
from medqa_lib.config import PROFILES
from medqa_lib.evaluation.answers import AnswerStore
from medqa_lib.evaluation.generation import generate_answers
from medqa_lib.model import load_base_model, load_tokenizer
model, tokenizer, path = load_base_model(PROFILES["smoke"], quantized=False).float(), load_tokenizer(PROFILES["smoke"]), Path(sys.argv[1])
sys.stdin.readline()
answers = generate_answers(model, tokenizer, json.loads(sys.argv[2]), 40, batch_size=2, store=AnswerStore(path))
"""


NO_END = """
from medqa_lib.evaluation.answers import AnswerStore
import time
append = AnswerStore.append
def append_and_stay(store, *new):
    append(store, *new)
    if store.path.read_bytes().count(b"\\n") >= 20:
        time.sleep(600)
AnswerStore.append = append_and_stay
"""  # no child can finish, however late it is killed


@pytest.mark.faults
def test_generation_killed_at_random_moments_and_resumed_writes_the_same_file(model, tokenizer, tmp_path):
    generate_answers(model, tokenizer, MANY, 40, batch_size=2, store=AnswerStore(tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    moment = random.Random(0)
    paths = [tmp_path / f"killed{attempt}.jsonl" for attempt in range(3)]
    program = [sys.executable, "-c", NO_END + CHILD]
    children = [
        subprocess.Popen([*program, str(path), json.dumps(MANY)], cwd=REPO, stdin=subprocess.PIPE)
        for path in paths
    ]  # all three import their libraries at once and then wait for a line
    for path, child in zip(paths, children, strict=True):
        lines, deadline = moment.randrange(1, 13), time.monotonic() + 600
        child.stdin.write(b"go\n")
        child.stdin.flush()
        while (
            (not path.exists() or path.read_bytes().count(b"\n") < lines)
            and child.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        time.sleep(moment.random() * 0.1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        killed = path.read_bytes()
        assert whole.startswith(killed) and 0 < len(killed) < len(whole), (
            f"killed after {lines} lines, {len(killed)} bytes"
        )
        generate_answers(model, tokenizer, MANY, 40, batch_size=2, store=AnswerStore(path))
        assert path.read_bytes() == whole


@pytest.mark.slow
def test_generate_records_splits_questions_between_processes(model, tokenizer, tmp_path):
    expected = generate_answers(model, tokenizer, MANY, 40, batch_size=2)
    program, path = tmp_path / "program.py", tmp_path / "answers.jsonl"
    program.write_text(
        CHILD + "import os\npath.with_name(os.environ['RANK']).write_text(json.dumps(answers))\n"
    )
    run_in_two(program, path, json.dumps(MANY))
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [expected, expected]
    assert [len(records_of(tmp_path / name)) for name in ("answers.jsonl", "answers.1.jsonl")] == [12, 12]
