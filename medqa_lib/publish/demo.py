"""A page that shows the base model's answer and the tuned one side by side: `python -m medqa_lib.publish.demo`.

Both answers come from one batch of two rows, of which PEFT adapts only the second: one base model in memory serves all adapters.
A lock guards each forward pass, and between two passes nothing of any user is in the model.
"""

from __future__ import annotations

import argparse
import html
import math
import threading
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

import torch

from medqa_lib.config import EXPERIMENTS, Profile, current_profile
from medqa_lib.model import cache_argument, load_merged, load_tokenizer
from medqa_lib.prompts import encode_prompt
from medqa_lib.publish.hub import find_adapters, load_adapters
from medqa_lib.publish.safety import (
    DISCLAIMER,
    EMERGENCY,
    MAX_CHARACTERS,
    check_question,
    describes_emergency,
)

MAX_NEW_TOKENS = 512
RUNNING = 2  # answers in the making at a time; they take turns token by token
WAITING = 20  # questions in the queue; the next one is told that the demo is busy
SILENT = "(The model gave no answer.)"
NO_ADAPTER = "There is no trained adapter here yet: the base model answers alone. Train one with notebook 14, or start with --adapter."

EXAMPLES = ("What is high blood pressure?", "What are the symptoms of iron deficiency anaemia?", "How is malaria diagnosed?",
            "Can I take antibiotics for a cold?")

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; overflow: clip !important; }  /* hidden would undo sticky */
footer { display: none !important; }
.html-container { padding: 0 !important; }
#title h1 { margin: .4rem 0 0; font-size: 1.5rem; }
#disclaimer { position: sticky; top: 0; z-index: 50; overflow: visible; }
#disclaimer p { margin: 0; padding: .5rem .9rem; border-radius: 8px; background: #fff4ce; border: 1px solid #c9a227; }
#disclaimer p, #disclaimer b { color: #3d2e00; }
#status p { margin: 0 0 .4rem; min-height: 1.5em; padding: .2rem .9rem; border-left: 4px solid #0072b2; color: var(--body-text-color); }
#status p.alarm { padding: .7rem .9rem; border: 0; border-radius: 8px; background: #a4161a; }
#status p.alarm, #status p.alarm b { color: #fff; }
@media (max-width: 640px) { #title h1 { font-size: 1.2rem; } #disclaimer p { font-size: .8rem; line-height: 1.3; } }
"""


class Engine:
    """The base model with all adapters loaded into it, and a lock around each forward pass.

    Args:
        adapters: name -> folder, as `hub.find_adapters` returns it; empty means the base model alone.
    Raises:
        ValueError: an adapter does not fit the base model, or uses DoRA, for which PEFT cannot mix adapters in a batch.
    """

    def __init__(self, adapters: dict[str, Path], profile: Profile | None = None):
        self.tokenizer = load_tokenizer(profile)
        self.model = load_adapters(load_merged(profile=profile), adapters).eval()
        self.adapters = list(adapters)
        for name in adapters:
            if self.model.peft_config[name].use_dora:
                raise ValueError(f"Adapter {name} uses DoRA, which cannot share a batch with the base model. Export it merged instead.")
        self._lock = threading.Lock()

    def stream(self, question: str, adapter: str | None, max_new_tokens: int) -> Iterator[tuple[str, str]]:
        """Greedy answers of base and adapter, a token longer at each step; nothing is computed between two steps.

        Yields:
            (base answer, tuned answer); the tuned one stays "" without an adapter.
        """
        eos = self.tokenizer.eos_token_id
        names = ["__base__", adapter] if adapter else ["__base__"]
        ids = torch.tensor([encode_prompt(self.tokenizer, question)] * len(names), device=self.model.device)
        answers, cache = [[] for _ in names], None
        for _ in range(max_new_tokens):
            ids, cache = self._next_tokens(ids, cache, names)
            for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
                if answer[-1:] != [eos]:
                    answer.append(token)
            yield tuple(self._decode(answer) for answer in answers) + ("",) * (2 - len(names))
            if all(answer[-1] == eos for answer in answers):
                return

    @torch.inference_mode()
    def _next_tokens(self, ids: torch.Tensor, cache, names: list[str]):
        """(B, 1) most likely next tokens, and the grown cache; row i is computed with the adapter names[i]."""
        choice = {"adapter_names": names} if self.adapters else {}
        with self._lock:
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(): cache}, **choice)
        return output.logits[:, -1].argmax(-1, keepdim=True), output[cache_argument()]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def answer_question(engine: Engine, question: str, adapter: str | None, max_new_tokens: float) -> Iterator[tuple[str, str, str]]:
    """What the page shows, step by step: base answer, tuned answer, status line as HTML. Nothing that is asked raises."""
    question = (question or "").encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised
    problem = check_question(question) or check_length(max_new_tokens)
    if problem:
        yield "", "", show_status(problem)
        return
    alarm = describes_emergency(question)
    yield "", "", show_status("Reading the question …", alarm)
    base = tuned = ""
    for base, tuned in engine.stream(question, adapter, int(max(1, min(max_new_tokens, MAX_NEW_TOKENS)))):
        yield base.rstrip("\ufffd"), tuned.rstrip("\ufffd"), show_status("Answering …", alarm)  # half a character is not shown
    yield base or SILENT, tuned or (SILENT if adapter else ""), show_status("Done.", alarm)


def check_length(max_new_tokens: float) -> str:
    """What is wrong with the longest answer's length, in a sentence for the person who asks; "" if nothing is: too large is cut."""
    if isinstance(max_new_tokens, Real) and not math.isnan(max_new_tokens):
        return ""
    return f"Please give the longest answer as a number of tokens from 1 to {MAX_NEW_TOKENS}."


def show_status(text: str, alarm: bool = False) -> str:
    """The status line, below the emergency notice if there is an alarm."""
    notice = f'<p class="alarm" role="alert">{EMERGENCY}</p>' if alarm else ""
    return f'{notice}<p role="status" aria-live="polite">{html.escape(text)}</p>'


def describe_adapter(name: str) -> str:
    """The adapter's name, with its recipe if it is one of the project's experiments."""
    experiment = EXPERIMENTS.get(name)
    return f"{name} ({experiment.label_policy}, rate {experiment.learning_rate:g})" if experiment else name


def build_app(engine: Engine, max_new_tokens: int = 128):
    """The page as gradio Blocks, its queue bounded: RUNNING answers at a time, WAITING questions behind them."""
    import gradio as gr

    adapters = engine.adapters
    with gr.Blocks(title="medqa: base and tuned answers", analytics_enabled=False) as app:
        gr.HTML("<h1>Medical questions: a small model before and after fine-tuning</h1>", elem_id="title")
        gr.HTML(f'<p role="note">{DISCLAIMER}</p>', elem_id="disclaimer")
        question = gr.Textbox(label="Your question", lines=2, max_lines=6, placeholder="What is high blood pressure?",
                              info=f"English, at most {MAX_CHARACTERS:,} characters. It is not stored.")
        gr.Examples([[example] for example in EXAMPLES], question, label="Examples")
        with gr.Row():
            adapter = gr.Dropdown([(describe_adapter(name), name) for name in adapters], value=adapters[0] if adapters else None,
                                  label="Adapter of the tuned answer", visible=bool(adapters), min_width=300)
            length = gr.Slider(1, MAX_NEW_TOKENS, value=max_new_tokens, step=1, label="Longest answer, in tokens", min_width=300)
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", min_width=120)
            stop = gr.Button("Stop", min_width=120)
        status = gr.HTML(show_status("" if adapters else NO_ADAPTER), elem_id="status")
        with gr.Row():
            base = gr.Textbox(label="Base model", lines=8, max_lines=24, interactive=False, min_width=300)
            tuned = gr.Textbox(label="Tuned model", lines=8, max_lines=24, interactive=False, min_width=300,
                               visible=bool(adapters))

        def respond(question, adapter, length):
            yield from answer_question(engine, question, adapter, length)

        running = gr.on([ask.click, question.submit], respond, [question, adapter, length], [base, tuned, status], api_name="ask",
                        concurrency_limit=RUNNING, show_progress="minimal", show_progress_on=base, scroll_to_output=True)
        stopped = stop.click(None, cancels=running)
        stopped.then(lambda asked: show_status("Stopped.", describes_emergency(asked)), question, status, queue=False,
                     api_visibility="private")
    return app.queue(max_size=WAITING)


def launch_app(app, port: int | None = None, block: bool = True) -> str:
    """Serve the page on this machine only (in Colab: in the notebook) and return its address. No public link is made."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from elsewhere
    theme.set(block_info_text_color="*neutral_600", block_label_text_color="*neutral_700", block_title_text_color="*neutral_700",
              body_text_color_subdued="*neutral_600", button_primary_background_fill="*primary_600",
              button_primary_background_fill_hover="*primary_700")  # contrast above 4.5:1
    _, address, _ = app.launch(server_port=port, share=False, ssr_mode=False, run_history=False, css=CSS, theme=theme,
                               prevent_thread_lock=not block)
    return address


def main(arguments: list[str] | None = None) -> None:
    """Load model and adapters, then serve the page until interrupted."""
    parser = argparse.ArgumentParser(prog="medqa_lib.publish.demo", description="Ask the base model and a tuned one, side by side.")
    parser.add_argument("--adapter", help="folder, Hub repository or Space with one or more adapters; default: this profile's runs")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args(arguments)
    profile = current_profile()
    try:
        adapters = find_adapters(options.adapter, profile)
        print(f"Loading {profile.model} with {', '.join(adapters) or 'no adapter'}")
        app = build_app(Engine(adapters, profile), profile.max_new_tokens)
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")
    launch_app(app, options.port)

