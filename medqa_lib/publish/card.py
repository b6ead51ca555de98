"""The model card of a run: `card.md`, filled in from the run's own files."""

import json
from pathlib import Path

from medqa_lib.config import home_dir
from medqa_lib.data import leakage_report, load_splits
from medqa_lib.data.sources import AFRIMEDQA_HUB
from medqa_lib.evaluation.baselines import BASELINES
from medqa_lib.evaluation.results import RunResult, load_run
from medqa_lib.evaluation.run import SAMPLE_QUESTIONS
from medqa_lib.evaluation.significance import compare_runs
from medqa_lib.prompts import format_prompt

METRICS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu": "BLEU",
           "token_f1": "token F1", "bertscore_f1": "BERTScore F1"}


def write_card(run: RunResult, base: RunResult, repository: str, base_model: str,
               home: Path | None = None) -> str:
    """Text of the README.md that describes this adapter on the Hub, with its scores as `model-index`.

    Args:
        run: the adapter's run.
        base: the untuned model's run on the same test questions.
        repository: where it will be published, "owner/name".
        base_model: the base model's Hub name.
        home: where the run's splits are kept, by default `config.home_dir()`. Without them the card says
            neither how many rows there were nor what leaks.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    data = find_data(run, home or home_dir())
    shown = [name for name in METRICS if name == "bleu" or name in run.scores]
    results = list(compare_runs(base.scores, run.scores, metrics=shown).itertuples())
    header = ModelCardData(
        base_model=base_model, license="cc-by-nc-sa-4.0", language="en", library_name="peft",
        model_name=run.name, pipeline_tag="text-generation", tags=["lora", "medical", "question-answering"],
        widget=[{"text": format_prompt(text), "example_title": text} for text in SAMPLE_QUESTIONS[:3]],
        eval_results=[*(EvalResult(task_type="text-generation", dataset_type="medqa", metric_type=row.metric,
                                   dataset_name="MedQuAD and AfriMed-QA, held-out questions",
                                   metric_name=METRICS[row.metric], metric_value=round(row.tuned, 4))
                        for row in results),
                      *(EvalResult(task_type="question-answering", dataset_type=AFRIMEDQA_HUB,
                                   metric_type="accuracy", metric_name="accuracy (%)",
                                   dataset_name=f"AfriMed-QA, {asked} held-out questions, by likelihood",
                                   metric_value=round(100 * run.metrics["mcq_accuracy"], 1))
                        for asked in [run.metrics.get("mcq_questions")] if asked)])
    lines = {text: run.folder.parent / name for name, text in BASELINES.items()
             if name != "baseline_random_option"}  # that has no text scores of free questions
    return str(ModelCard.from_template(
        header, template_path=str(Path(__file__).with_name("card.md")), run=run, base=base, metrics=METRICS,
        repository=repository, recipe=run.config["identity"]["experiment"], results=results,
        answers=dict(zip(run.samples["question"], run.samples["answer"], strict=True)),
        baselines={text: load_run(line).metrics for text, line in lines.items() if line.exists()},
        question=SAMPLE_QUESTIONS[0], multiple_choice=SAMPLE_QUESTIONS[-1],
        leakage=list(leakage_report(load_splits(data)).itertuples()) if data else [],
        data=json.loads((data / "manifest.json").read_text(encoding="utf-8")) if data else None))


def find_data(run: RunResult, home: Path) -> Path | None:
    """Folder of the splits whose hashes the run has noted, if it is there."""
    manifests = (home / "data").glob("*/*/manifest.json")
    return next((path.parent for path in manifests if json.loads(path.read_text(encoding="utf-8"))["sha256"]
                 == run.config["identity"]["data"]), None)
