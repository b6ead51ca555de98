"""Unsloth on the benchmark's model, examples and order. An arm a process, its own site folder before the others (see bench_training.py)."""

from __future__ import annotations

import os
import sys

ARM = sys.argv[1].split(".")[0]
# what each arm sets: rows at a time, gradient checkpointing, padding-free batches (None: Unsloth chooses), steps, warm-up
SETTINGS = {
    "unsloth_notebook": (4, "unsloth", None, 5, 1),
    "unsloth_tuned": (32, False, True, 14, 6),
    "unsloth_shim": (32, False, True, 40, 8),
}
TITLES = {
    "unsloth_notebook": "Unsloth as in its notebooks, dropout 0",
    "unsloth_tuned": "Unsloth tuned, dropout 0",
    "unsloth_shim": "Unsloth tuned with varlen shim, dropout 0",
}
CPU = "--cpu" in sys.argv
os.environ |= {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "UNSLOTH_COMPILE_LOCATION": f"{sys.argv[2]}/compiled_{sys.argv[1]}",
}
if CPU:
    os.environ["UNSLOTH_FORCE_CPU"] = "1"


def shim_varlen() -> None:
    """Unsloth looks for the keyword `enable_gqa`, which torch has from 2.12; 2.11's varlen attention does without it."""
    import inspect

    import torch.nn.attention.varlen as varlen

    plain = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(plain).parameters:
        return

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        return plain(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            return_aux=return_aux,
            scale=scale,
            window_size=window_size,
        )

    varlen.varlen_attn = varlen_attn


if ARM == "unsloth_shim":
    shim_varlen()
import unsloth  # noqa: E402, I001  first: it patches what the others import
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
import measuring as m  # noqa: E402


def run() -> None:
    per_device_train_batch_size, checkpointing, padding_free, steps, warm = (
        SETTINGS[ARM] if not CPU else (2, SETTINGS[ARM][1], SETTINGS[ARM][2], 7, 6)
    )
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(m.MODEL_DIR),
        max_seq_length=512,
        dtype=None,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=list(m.LINEAR),
        use_gradient_checkpointing=checkpointing,
        random_state=42,
    )
    m.set_adapter(model)
    examples = m.training_examples(steps)
    data = Dataset.from_list(
        [
            {
                "input_ids": example["input_ids"],
                "completion_mask": [int(label != -100) for label in example["labels"]],
            }
            for example in examples
        ]
    )
    chosen = ({} if padding_free is None else {"padding_free": padding_free}) | (
        {} if checkpointing else {"gradient_checkpointing": False}
    )
    # the same recipe as the other arms: AdamW without weight decay, clipped to 1, a constant rate
    config = SFTConfig(
        str(m.WORK / m.NAME),
        max_steps=steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=m.ROWS // per_device_train_batch_size,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=42,
        max_length=512,
        completion_only_loss=True,
        dataset_num_proc=1,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        bf16=not CPU,
        use_cpu=CPU,
        **chosen,
    )
    clock = m.Clock(steps, warm)
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=data, args=config, callbacks=[clock]
    )
    describe(trainer, examples)
    trainer.train()
    m.record(
        **clock.row(TITLES[ARM], trainer, examples, m.ROWS, per_device_train_batch_size, bool(checkpointing))
    )


def describe(trainer, examples) -> None:
    """What Unsloth has made of the settings; and that it trains on the tokens that it was given."""
    batch = next(iter(trainer.get_train_dataloader()))
    facts = {
        "padding_free": trainer.args.padding_free,
        "checkpointing": any(
            getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()
        ),
        "batch": {key: list(value.shape) for key, value in batch.items() if hasattr(value, "shape")},
        "same_tokens": batch["input_ids"][0, :8].tolist() == examples[0]["input_ids"][:8],
    }
    try:
        from unsloth.utils import attention_dispatch

        facts["varlen"] = attention_dispatch._TORCH_VARLEN_ATTN is not None
        facts["backend"] = str(attention_dispatch.select_attention_backend(True))
    except Exception as error:  # another version of Unsloth; only for the log
        facts["backend"] = repr(error)[:200]
    m.record(unsloth=ARM, version=unsloth.__version__, **facts)


m.wait_for_turn()
with m.guarded(ARM):
    run()
os._exit(0)
