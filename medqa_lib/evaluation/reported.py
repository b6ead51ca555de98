"""The original report's changes against its untuned model, in percent. We have its text, not its code."""

REPORTED = {
    "exp_001": {"rouge2": 46.79, "bleu": 114.61},
    "exp_003": {"rouge2": 0.21, "bleu": 3.36},
    "exp_004": {"rouge1": 16.15, "rouge2": 64.02, "rougeL": 20.87, "bleu": 223.28, "bertscore_f1": 0.75},
}
