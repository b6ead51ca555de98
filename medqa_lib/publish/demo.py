"""A page with the untuned and the tuned answers side by side: `python -m medqa_lib.demo`.

They come from one batch; PEFT adapts each row by its own adapter, so one base model serves all of them.
"""

import argparse
import html
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from medqa_lib.config import EXPERIMENTS, Profile, current_profile
from medqa_lib.evaluation.facts import FACTS
from medqa_lib.evaluation.generation import end_ids
from medqa_lib.evaluation.retrieval import Passage, ask, mark
from medqa_lib.model import cache_argument, load_merged, load_tokenizer
from medqa_lib.prompts import encode_prompt
from medqa_lib.publish.hub import find_adapters, load_adapters
from medqa_lib.publish.safety import CRISIS, DISCLAIMER, is_crisis
from medqa_lib.publish.sources import find_disease, link, list_sources, read_training, reads_passages

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 400, 512
RUNNING = 2  # answers in the making at a time; they take turns token by token
WAITING = 20  # questions in the queue; the next one is told that the demo is busy
EMPTY, CUT = "(The model gave no answer.)", " […] (cut off: the longest answer is {} tokens)"
SHOW_ANSWER = "() => document.getElementById('status').scrollIntoView({behavior: 'smooth'})"
NO_ADAPTER = "No adapter was found: the untuned model answers alone. Train one (notebook 14)."
EXAMPLES = ("What is high blood pressure?", "How is malaria diagnosed?", "Is sickle cell disease inherited?",
            "Can I take antibiotics for a cold?",  # as MedQuAD asks; the next one as AfriMed-QA does
            "A patient on warfarin has an INR of 8 and no bleeding. Which drug reverses the effect?\n"
            "A. Protamine\nB. Vitamin K\nC. Naloxone\nD. Flumazenil")
UNCHECKED = "Facts that could not be checked"


class Engine:
    """The base model with all adapters loaded into it, and a lock around each forward pass.

    Args:
        adapters: name -> folder, as `hub.find_adapters` returns it; empty means the untuned model alone.
    Raises:
        ValueError: an adapter does not fit the base model, or uses DoRA, which PEFT cannot mix in a batch.
    """

    def __init__(self, adapters: dict[str, Path], profile: Profile | None = None):
        self.tokenizer = load_tokenizer(profile)
        self.model = load_adapters(load_merged(profile=profile), adapters).eval()
        self.adapters = list(adapters)
        if dora := [name for name in adapters if self.model.peft_config[name].use_dora]:
            raise ValueError(f"{dora[0]} uses DoRA, which cannot share a batch with the untuned model.")
        self._lock = threading.Lock()
        if os.environ.get("SPACES_ZERO_GPU"):  # a Space that borrows a GPU for each answer
            import spaces  # not before the model is loaded: it claims a GPU that is not there yet

            self.model.to("cuda")
            self.stream = spaces.GPU(self.stream)

    def stream(self, ids: list[int], adapters: Sequence[str], max_new_tokens: int) -> Iterator[list[tuple]]:
        """Greedy answers to a prompt's ids, a token longer per step: (text, ended) untuned, then tuned."""
        ends, names = end_ids(self.model, self.tokenizer), ["__base__", *adapters]
        ids = torch.tensor([ids] * len(names), device=self.model.device)
        answers, cache = [[] for _ in names], None
        for _ in range(max_new_tokens):
            ids, cache = self._next_tokens(ids, cache, names)
            for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
                if not answer or answer[-1] not in ends:
                    answer.append(token)
            ended = [answer[-1] in ends for answer in answers]
            texts = [self.tokenizer.decode(answer[:-1] if over else answer, skip_special_tokens=True).strip()
                     for answer, over in zip(answers, ended, strict=True)]
            yield list(zip(texts, ended, strict=True))
            if all(ended):
                return

    @torch.inference_mode()
    def _next_tokens(self, ids: torch.Tensor, cache, names: list[str]):
        """(B, 1) most likely next tokens, and the grown cache; row i is computed with adapter names[i]."""
        options = {cache_argument(): cache, **({"adapter_names": names} if self.adapters else {})}
        with self._lock:
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
        return output.logits[:, -1].argmax(-1, keepdim=True), output[cache_argument()]


def answer_question(engine: Engine, question: str, adapter: str | None, max_new_tokens: float,
                    compare: bool = False, training=None):
    """Yield what the page shows, step by step: untuned answer, tuned answer, status line and notes as HTML.

    Args:
        compare: answer with all adapters; the notes are a table of all answers.
        training: `sources.Training`; the notes link to the disease asked about and to an answer's passages.
    """
    question = (question or "").strip()
    ids = encode_prompt(engine.tokenizer, question[:10 * MAX_PROMPT_TOKENS])  # more is too long
    if not question:
        yield "", "", show_status("Please write a question first."), ""
    elif len(ids) > MAX_PROMPT_TOKENS or len(question) > 10 * MAX_PROMPT_TOKENS:
        yield "", "", show_status(f"Your question is too long ({len(question):,} characters, at least "
                                  f"{len(ids):,} tokens); please shorten it to {MAX_PROMPT_TOKENS}."), ""
    elif is_crisis(question):
        yield "", "", show_status(CRISIS, "alert"), ""
    else:
        length, rows = max(1, min(int(max_new_tokens), MAX_NEW_TOKENS)), []
        names = [adapter] if adapter else []
        names += [name for name in engine.adapters if compare and name != adapter]
        about = question if len(question) <= 80 else f"{question[:79]}…"
        passages = training.index.find([question])[0] if training and any(map(reads_passages, names)) else []
        for rows in ask_all(engine, question, names, passages, length):  # half a character is not shown
            texts = [text.rstrip("\ufffd") for text, _ in rows]
            yield *[*texts, ""][:2], show_status(f"Answering: {about}"), show_answers(names, texts, compare)
        disease = find_disease(question, training.diseases if training else {})
        known = f"{question} {training.diseases[disease]}" if disease else question
        facts, sources = [list_facts(text, known) for text, _ in rows], ""
        for place, name in enumerate(names, 1):
            if passages and reads_passages(name):
                sources += list_sources(describe_adapter(name), rows[place][0], passages, question)
                rows[place] = mark(rows[place][0], passages, question), rows[place][1]
        texts = [(text or EMPTY) + ("" if ended else CUT.format(length)) for text, ended in rows]
        notes = show_answers(names, texts, compare, facts) + sources
        notes += f"<p>Read more: {link(disease)}</p>" if disease else ""
        yield *[*texts, ""][:2], show_status(f"Done: {about}"), notes


def ask_all(engine: Engine, question: str, names: Sequence[str], passages: Sequence[Passage],
            length: int) -> Iterator[list[tuple]]:
    """`Engine.stream` of all; adapters trained with passages are asked with them, in a second batch."""
    with_them = [name for name in names if passages and reads_passages(name)]
    without = [name for name in names if name not in with_them]
    streams = [engine.stream(encode_prompt(engine.tokenizer, question), without, length)]
    if with_them:
        ids = encode_prompt(engine.tokenizer, ask(question, passages))
        streams.append(engine.stream(ids, with_them, length))
    found: dict[str, tuple] = {}
    for steps in zip_longest(*streams):  # the untuned model's row of the second batch is not wanted
        for step, asked in zip(steps, (["", *without], with_them), strict=False):
            found |= zip(asked, (step or [])[-len(asked):], strict=False)
        yield [found[name] for name in ("", *names)]


def list_facts(answer: str, known: str) -> str:
    """The numbers, genes and modes of inheritance in an answer that `known` does not state, as words."""
    found = {kind: find(answer) - find(known) for kind, (_, find) in FACTS.items()}
    words = {kind: sorted(f"{fact:,.10g}" if isinstance(fact, float) else fact for fact in facts)
             for kind, facts in found.items() if facts}
    return "; ".join(f"{kind.replace('prevalence', 'number')} {', '.join(facts)}"
                     for kind, facts in words.items()) or "none found"


def show_answers(names: Sequence[str], texts: Sequence[str], compare: bool,
                 facts: Sequence[str] = ()) -> str:
    """HTML: a line per answer, with its text if all experiments are compared, and its unchecked facts."""
    labels = ["untuned", *map(describe_adapter, names)]
    if not compare:
        return "".join(f"<p><b>{UNCHECKED}</b>, {html.escape(label)}: {html.escape(text)}.</p>"
                       for label, text in zip(labels, facts, strict=False))
    cells = zip(labels, texts, facts or [""] * len(texts), strict=True)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells)
    return ("<table><caption>All experiments</caption><thead><tr><th>Model</th><th>Answer</th>"
            f"<th>{UNCHECKED}</th></tr></thead><tbody><tr>{'</tr><tr>'.join(rows)}</tr></tbody></table>")


def show_status(text: str, role: str = "status") -> str:
    """The status line; screen readers announce it."""
    return f'<p role="{role}">{html.escape(text)}</p>'


def describe_adapter(name: str) -> str:
    """The adapter's name, with its label policy if it is one of the project's experiments."""
    policy = EXPERIMENTS[name].label_policy if name in EXPERIMENTS else ""
    words = {"": "", "aligned": " (labels correct)", "preshifted": " (labels shifted twice)"}
    return name + words.get(policy, f" ({policy})")


def build_app(engine: Engine, max_new_tokens: int = 128):
    """The page as gradio Blocks. RUNNING questions are answered at a time, WAITING more are queued."""
    import gradio as gr

    adapters, training = engine.adapters, read_training()
    boxes = {"lines": 4, "max_lines": 1000, "interactive": False, "min_width": 300}  # only the page scrolls
    with gr.Blocks(title="medqa: untuned and tuned answers", analytics_enabled=False) as app:
        gr.Markdown("# Medical questions: a small model before and after fine-tuning")
        gr.HTML(f'<p role="note">{DISCLAIMER}</p>', elem_id="disclaimer")
        question = gr.Textbox(label="Your question", lines=2, max_lines=6, placeholder=EXAMPLES[0],
                              info="English, at most about 250 words. It is not stored.")
        gr.Examples([[example] for example in EXAMPLES], question, label="Examples",
                    example_labels=[example.splitlines()[0] for example in EXAMPLES])
        adapter = gr.Radio([(describe_adapter(name), name) for name in adapters], visible=bool(adapters),
                           value=adapters[0] if adapters else None, label="Adapter of the tuned answer")
        compare = gr.Checkbox(label="All experiments in a table (takes longer)", visible=len(adapters) > 1)
        length = gr.Slider(1, MAX_NEW_TOKENS, value=max_new_tokens, step=1, label="Longest answer, in tokens")
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", min_width=120)
            stop = gr.Button("Stop", min_width=120)
        status = gr.HTML(show_status("" if adapters else NO_ADAPTER), elem_id="status")
        with gr.Row():
            base = gr.Textbox(label="Untuned model", **boxes)
            tuned = gr.Textbox(label="Tuned model", visible=bool(adapters), **boxes)
        notes = gr.HTML(elem_id="notes")

        def respond(question, adapter, length, compare, session):
            session["newest"] = mine = object()  # ends the answer to the question before it
            for shown in answer_question(engine, question, adapter, length, compare, training):
                if session["newest"] is not mine:
                    yield [gr.skip()] * 4
                    return
                yield shown

        running = gr.on([ask.click, question.submit], respond,
                        [question, adapter, length, compare, gr.State({})],
                        [base, tuned, status, notes], api_name="ask", concurrency_limit=RUNNING,
                        trigger_mode="multiple", show_progress="minimal", show_progress_on=base)
        gr.on([ask.click, question.submit], None, js=SHOW_ANSWER)
        stop.click(None, cancels=running).then(lambda: show_status("Stopped."), None, status, queue=False,
                                               api_visibility="private")
    return app.queue(max_size=WAITING)


def launch_app(app, port: int | None = None, block: bool = True) -> str:
    """Serve the page on this machine (in Colab: in the notebook), without a public link; its address."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(block_info_text_color="*neutral_600", block_label_text_color="*neutral_700",
              block_title_text_color="*neutral_700", body_text_color_subdued="*neutral_600",
              button_primary_background_fill="*primary_600")  # contrast above 4.5:1
    options = {"share": False, "ssr_mode": False, "run_history": False, "max_file_size": 0}
    return app.launch(server_port=port, css_paths=Path(__file__).with_name("demo.css"), theme=theme,
                      prevent_thread_lock=not block, **options)[1]


def main(arguments: list[str] | None = None) -> None:
    """Load model and adapters, then serve the page until interrupted."""
    parser = argparse.ArgumentParser(prog="medqa_lib.demo", description="Ask the untuned and a tuned model.")
    parser.add_argument("--adapter", help="folder, Hub name or Space; default: your runs or the study's")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args(arguments)
    try:
        if options.port:
            socket.create_server(("127.0.0.1", options.port)).close()
    except OSError:
        parser.exit(2, f"Port {options.port} is in use; choose another with --port.\n")
    try:
        profile = current_profile()
        adapters = find_adapters(options.adapter, profile)
        print(f"Loading {profile.model}, adapters: {', '.join(adapters) or 'none (the untuned model alone)'}")
        app = build_app(Engine(adapters, profile))
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"{error}\n")
    launch_app(app, options.port)
