"""The demo's answers are the evaluated model's, users do not mix, any text is survived, and the Space folder is complete."""

import ast
import dataclasses
import html
import inspect
import json
import re
import shutil
import socket
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from smoke_adapters import SMOKE, make_adapter

from medqa_lib.config import LoraSettings
from medqa_lib.evaluation.generation import generate_answers
from medqa_lib.evaluation.retrieval import Index, ask
from medqa_lib.model import load_merged, load_tokenizer
from medqa_lib.prompts import encode_prompt, format_prompt
from medqa_lib.publish import demo, space
from medqa_lib.publish.hub import CONFIG, WEIGHTS, find_adapters, public_name
from medqa_lib.publish.safety import DISCLAIMER
from medqa_lib.publish.sources import Training

QUESTIONS = ["What is gout?", "How is malaria diagnosed?", "Is it? 漢字", "a"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    names = ("exp_003", "exp_004")
    return {name: make_adapter(root / name, seed) for seed, name in enumerate(names, start=1)}


@pytest.fixture(scope="module")
def engine(adapters):
    return demo.Engine(adapters, SMOKE)


def stream(engine, question, adapter, tokens):
    return list(engine.stream(encode_prompt(engine.tokenizer, question), [adapter], tokens))


def last(engine, *request):
    return list(demo.answer_question(engine, *request))[-1]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp_003", "exp_004"])
def test_stream_ends_with_the_answers_of_the_evaluated_models(engine, adapters, name):
    tokenizer = load_tokenizer(SMOKE)
    base = generate_answers(load_merged(None, SMOKE), tokenizer, QUESTIONS, 12)
    tuned = generate_answers(load_merged(adapters[name], SMOKE), tokenizer, QUESTIONS, 12)
    assert base != tuned
    found = [stream(engine, question, name, 12)[-1] for question in QUESTIONS]
    assert [left for (left, _), _ in found] == base
    assert [right for _, (right, _) in found] == tuned


def test_stream_ends_with_the_models_own_end_tokens_too(engine, monkeypatch):
    """Llama 3, Qwen and Gemma have several; the evaluated answers end with any of them."""
    eos = engine.tokenizer.eos_token_id
    a, b, c = engine.tokenizer.convert_tokens_to_ids(list("abc"))
    planned = iter([[a, b], [c, b], [b, eos]])
    monkeypatch.setattr(engine, "_next_tokens", lambda *_: (torch.tensor(next(planned)).view(2, 1), None))
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [eos, c])
    assert stream(engine, "What is gout?", "exp_004", 9)[-1] == [("a", True), ("bb", True)]


def test_stream_grows_step_by_step(engine):
    steps = stream(engine, "What is gout?", "exp_004", 10)
    assert 1 < len(steps) <= 10
    assert len(steps[0][0][0]) <= len(steps[-1][0][0]) and steps[0] != steps[-1]


def test_stream_stops_a_finished_row_and_lets_the_other_go_on(engine, monkeypatch):
    eos = engine.tokenizer.eos_token_id
    a, b, c = engine.tokenizer.convert_tokens_to_ids(list("abc"))
    planned = iter([[a, b], [eos, b], [c, b], [c, eos]])
    monkeypatch.setattr(engine, "_next_tokens", lambda *_: (torch.tensor(next(planned)).view(2, 1), None))
    steps = [["a", "b"], ["a", "bb"], ["a", "bbb"], ["a", "bbb"]]
    ended = [[False, False], [True, False], [True, False], [True, True]]
    found = stream(engine, "x", "exp_004", 50)
    assert [[text for text, _ in step] for step in found] == steps
    assert [[end for _, end in step] for step in found] == ended


def test_stream_keeps_users_apart_while_they_take_turns(engine):
    requests = [(question, name) for question in QUESTIONS for name in ("exp_003", "exp_004")]
    alone = [stream(engine, question, name, 12)[-1] for question, name in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: stream(engine, *request, 12)[-1], requests))
    assert together == alone
    assert len(set(map(tuple, alone))) > len(QUESTIONS)


def test_stream_that_is_left_unfinished_blocks_nobody(engine):
    unfinished = engine.stream(encode_prompt(engine.tokenizer, "What is gout?"), ["exp_004"], 12)
    next(unfinished)
    assert stream(engine, "a", "exp_003", 3)


def test_engine_without_adapters_answers_with_the_untuned_model_alone():
    alone = demo.Engine({}, SMOKE)
    base, tuned, *_ = last(alone, "What is gout?", None, 4)
    assert base and tuned == ""
    assert demo.NO_ADAPTER in json.dumps(demo.build_app(alone).get_config_file(), default=str)


def test_engine_refuses_dora(tmp_path):
    settings = dataclasses.make_dataclass("Dora", [("use_dora", bool, True)], bases=(LoraSettings,), frozen=True)
    folder = make_adapter(tmp_path / "other", settings=settings())
    with pytest.raises(ValueError, match="DoRA"):
        demo.Engine({"other": folder}, SMOKE)


# --- what the page shows ---------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "</s></s>",
    "### Response:\n### Instruction:",
    "\ud800 lone",
    "\x00\x07",
]


@pytest.mark.parametrize("question", [*HOSTILE, "漢字 🩺 عربى", "{question} {0} %s \\u0041", "a" * 100])
def test_answer_question_survives_any_text(engine, question):
    base, tuned, status, _ = last(engine, question, "exp_004", 3)
    assert base and tuned and "Done" in status


@pytest.mark.parametrize(("question", "named"), [("", ""), (None, ""), (" \n", ""), ("a" * 10_000, "10,000"), ("漢" * 900, "900")])
def test_answer_question_says_why_it_does_not_answer(engine, question, named):
    ((base, tuned, status, _),) = demo.answer_question(engine, question, "exp_004", 3)
    assert (base, tuned) == ("", "") and named in status and "role" in status


def test_answer_question_answers_a_crisis_with_the_lines_to_call_alone(engine):
    ((base, tuned, status, _),) = demo.answer_question(engine, "how many pills do i need to die", "exp_004", 3)
    assert (base, tuned) == ("", "") and "988" in status and 'role="alert"' in status
    assert last(engine, "I have chest pain", "exp_004", 3)[0]  # the notice on the page says: call


@pytest.mark.parametrize(("tokens", "most"), [(-5, 1), (0.4, 1), (7.0, 7), (10**9, demo.MAX_NEW_TOKENS)])
def test_answer_question_bounds_the_length(engine, monkeypatch, tokens, most):
    asked = []
    monkeypatch.setattr(engine, "stream", lambda *request: asked.append(request[-1]) or iter([[("a", True), ("b", True)]]))
    last(engine, "x", "exp_004", tokens)
    assert asked == [most]


def test_answer_question_shows_no_half_character_before_the_end(engine, monkeypatch):
    steps = [[("caf\ufffd", False)], [("café", False)], [("café\ufffd", True)]]
    monkeypatch.setattr(engine, "stream", lambda *request: iter(steps))
    shown = [base for base, *_ in demo.answer_question(engine, "x", None, 3)]
    assert shown == ["caf", "café", "café", "café\ufffd"]


def test_all_experiments_answer_in_one_batch_and_each_is_its_own_answer(engine):
    alone = {name: last(engine, "What is gout?", name, 5)[:2] for name in engine.adapters}
    base, tuned, _, notes = last(engine, "What is gout?", "exp_004", 5, True)
    assert (base, tuned) == alone["exp_004"]
    rows = re.findall("<tr><td>(.*?)</td><td>(.*?)</td>", notes, re.S)
    assert [name for name, _ in rows] == ["untuned", "exp_004 (labels correct)", "exp_003 (labels shifted twice)"]
    assert [html.unescape(text) for _, text in rows] == [base, tuned, alone["exp_003"][1]]


def test_notes_name_facts_and_the_page_to_read(engine, monkeypatch):
    monkeypatch.setattr(engine, "stream", lambda *request: iter([[("40 <b>joints", True), ("4 joints, 7 days", True)]]))
    training = Training({"Gout": "It hurts 4 joints."}, None)
    notes = last(engine, "What is gout?", "exp_004", 5, False, training)[3]
    assert "untuned: number 40." in notes and "exp_004 (labels correct): number 7." in notes
    assert "joints" not in notes and "query=Gout" in notes


def test_an_adapter_trained_with_passages_is_asked_with_them_and_cites_them(adapters, monkeypatch):
    engine = demo.Engine({"exp_004": adapters["exp_004"], "exp_006": adapters["exp_003"]}, SMOKE)
    train = Dataset.from_dict({"question": ["What is gout?"], "answer": ["Gout hurts 4 joints badly."], "group": ["g"]})
    index = Index(train)
    question, with_passage = "What is gout?", ask("What is gout?", index.find(["What is gout?"])[0])
    base, plain = stream(engine, question, "exp_004", 5)[-1]
    cited = stream(engine, with_passage, "exp_006", 5)[-1][1]
    assert list(demo.ask_all(engine, question, ["exp_006", "exp_004"], index.find([question])[0], 5))[-1] == [base, cited, plain]
    answers = {False: "It hurts.", True: "It badly hurts 4 joints. It itches."}
    monkeypatch.setattr(engine, "stream", lambda ids, names, _: iter([[("Rest.", True)] + [(answers["exp_006" in names], True)] * len(names)]))
    _, tuned, _, notes = last(engine, question, "exp_006", 5, False, Training({}, index))
    assert tuned == "It badly hurts 4 joints. [1] It itches. [no source]"
    assert "<li>" in notes and "What+is+gout" in notes
    assert last(engine, question, "exp_004", 5, False, Training({}, index))[1] == answers[False]


def test_on_zerogpu_the_stream_borrows_a_gpu_after_loading(adapters, monkeypatch):
    borrowed = []
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=lambda task: borrowed.append(task) or task))
    monkeypatch.setattr("torch.nn.Module.to", lambda model, *_, **__: model)
    engine = demo.Engine(adapters, SMOKE)
    assert borrowed == [engine.stream] and inspect.isgeneratorfunction(borrowed[0])


def test_an_answer_that_ends_at_the_limit_says_so(engine, monkeypatch):
    monkeypatch.setattr(engine, "stream", lambda *request: iter([[("a", True), ("b", False)]]))
    base, tuned, status, _ = last(engine, "What is gout?", "exp_004", 7)
    assert base == "a" and tuned.startswith("b ") and "7" in tuned
    assert "What is gout?" in status  # whose answer it is


def test_show_status_escapes_its_text():
    assert "<script>" not in demo.show_status("<script>")


def test_build_app_bounds_its_queue_and_says_which_labels_an_adapter_learned(engine):
    app = demo.build_app(engine)
    settings = json.dumps(app.get_config_file(), default=str)
    assert app._queue.max_size == demo.WAITING
    assert {fn.concurrency_limit for fn in app.fns.values() if fn.api_name == "ask"} == {demo.RUNNING}
    assert "exp_003 (labels shifted twice)" in settings and "exp_004 (labels correct)" in settings
    assert json.dumps(DISCLAIMER)[1:-1] in settings


def test_build_app_starts_with_the_preferred_adapter(adapters):
    found = find_adapters(adapters["exp_003"].parent)
    blocks = demo.build_app(demo.Engine(found, SMOKE)).blocks.values()
    assert [block.value for block in blocks if block.__class__.__name__ == "Radio"] == ["exp_004"]


def test_ask_py_asks_in_the_prompt_of_the_training():
    text = (Path(__file__).parents[2] / "ask.py").read_text(encoding="utf-8")
    template = ast.literal_eval(re.search(r'^TEMPLATE = (".*")', text, re.MULTILINE)[1])
    assert template.format("What is gout?") == format_prompt("What is gout?")


def test_launch_app_makes_no_public_link(monkeypatch):
    called = {}

    class App:
        def launch(self, **options):
            called.update(options)
            return None, "http://127.0.0.1:7860/", None

    assert demo.launch_app(App(), block=False) == "http://127.0.0.1:7860/"
    assert called["share"] is False and called["prevent_thread_lock"] is True and called["max_file_size"] == 0


# --- command and Space -----------------------------------------------------------------------------------------------


def test_main_says_in_a_line_that_an_adapter_does_not_fit(adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDQA_PROFILE", "smoke")
    folder = shutil.copytree(adapters["exp_004"], tmp_path / "other")
    settings = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": "TinyLlama/Tiny"}
    (folder / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as caught:
        demo.main(["--adapter", str(folder)])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "TinyLlama" in message and message.count("\n") == 1


def test_main_says_that_a_port_is_in_use_before_it_loads_anything(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_adapters", lambda *_: pytest.fail("loaded before the port was tried"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            demo.main(["--port", str(port)])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and str(port) in message and message.count("\n") == 1


def test_write_space_holds_all_that_it_needs(adapters, tmp_path):
    folder = space.write_space(tmp_path / "space", adapters, SMOKE)
    assert list(find_adapters(folder / "adapters")) == ["exp_004", "exp_003"]
    weights = (folder / "adapters" / "exp_004" / WEIGHTS).read_bytes()
    settings = json.loads((folder / "adapters" / "exp_004" / CONFIG).read_text())
    assert weights == (adapters["exp_004"] / WEIGHTS).read_bytes()
    assert settings["base_model_name_or_path"] == public_name(SMOKE)
    demo.Engine(find_adapters(folder / "adapters"), SMOKE)
    front = (folder / "README.md").read_text().split("---")[1]
    required = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert "sdk: gradio" in front and "app_file: app.py" in front
    assert f"sdk_version: {required['gradio']}" in front and not any("+" in v for v in required.values())
    compile((folder / "app.py").read_text(), "app.py", "exec")
    assert '"smoke-llama"' in (folder / "app.py").read_text()
    assert (folder / "medqa_lib" / "demo.py").exists() and not list(folder.rglob("__pycache__"))


def test_write_space_again_holds_no_adapter_of_the_call_before(adapters, tmp_path):
    folder = space.write_space(tmp_path / "space", adapters, SMOKE)
    again = find_adapters(folder / "adapters")  # even those in the folder itself
    assert space.write_space(folder, {"exp_004": again["exp_004"]}, SMOKE) == folder
    assert [path.name for path in (folder / "adapters").iterdir()] == ["exp_004"]
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


def test_write_space_leaves_a_folder_alone_that_it_did_not_write(adapters, tmp_path):
    shutil.copytree(adapters["exp_003"], tmp_path / "adapters" / "exp_003")
    with pytest.raises(ValueError):
        space.write_space(tmp_path, adapters, SMOKE)
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["adapters", "exp_003"]


def test_write_space_refuses_a_model_that_others_do_not_have(adapters, tmp_path):
    (tmp_path / "my-model").mkdir()
    profile = dataclasses.replace(SMOKE, model=str(tmp_path / "my-model"))
    with pytest.raises(ValueError, match="my-model"):
        space.write_space(tmp_path / "space", adapters, profile)
    assert not (tmp_path / "space").exists()
