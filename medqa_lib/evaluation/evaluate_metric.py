"""The panel for users of `evaluate`: `evaluate.load("medqa_lib/evaluation/evaluate_metric.py")`."""

import datasets
import evaluate

from medqa_lib import metrics


class MedicalAnswerPanel(evaluate.Metric):
    """add_batch(predictions=..., references=...), then compute(encoder=None)."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(description=metrics.__doc__, citation="",
                                   inputs_description=metrics.score_answers.__doc__,
                                   features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions: list[str], references: list[str], encoder: str | None = None) -> dict:
        return metrics.corpus_metrics(predictions, references, encoder=encoder)
