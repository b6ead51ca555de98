"""A T4's conditions on a larger GPU: capability 7.5, float16, no flash attention, 15 GB. One job per process.

    bench_t4.py bf16 WORK     tokens/s of the fast path in bfloat16 (a folder with another medqa_lib first in PYTHONPATH: of that one)
    bench_t4.py t4 WORK       float16: fast against the padded Trainer, losses, gradient norms, memory, 400 steps, an overflow
    bench_t4.py learn WORK    SmolLM2: 100 steps on real rows (MEDQA_DATA_DIR) by both paths, validation losses
    bench_t4.py tolerance WORK  what the proof at the start measures, with and without planted faults

Random weights in TinyLlama's configuration (`learn`: SmolLM2's own). Results are appended to WORK/NAME.jsonl. `--cpu` tries
it out with a tiny model in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
import measuring as m
import t4_conditions
import torch
from measuring import CPU, DEVICE, ROWS, guarded, record
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

QKV = ("q_proj", "k_proj", "v_proj")
HALF = m.NAME in ("t4", "learn")
DTYPE = torch.float32 if CPU else torch.float16 if HALF else torch.bfloat16
CAP_BYTES = 15e9
if HALF and not CPU:
    FORBIDDEN = contextlib.ExitStack()  # to the end of the process
    FORBIDDEN.enter_context(t4_conditions.forbid_newer(refuse=False))
from medqa_lib.fast import train as fast_train  # noqa: E402


class SequentialTrainer(Trainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


def save_random_model() -> None:
    size = (64, 2, 4, 2, 96, 96) if CPU else (2048, 22, 32, 4, 5632, 32_000)
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    config = LlamaConfig(
        **dict(zip(names, size, strict=True)), max_position_embeddings=2048, rms_norm_eps=1e-5
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        LlamaForCausalLM(config).to(DTYPE).save_pretrained(folder())


def profile():
    from medqa_lib.config import PROFILES

    return dataclasses.replace(PROFILES["gpu"], model="smollm2-135m")


def real_examples(n_train: int = 3200, n_validation: int = 400) -> list[dict]:
    """Encoded rows of the real splits, with correct labels."""
    from medqa_lib.data.prepare import prepare_splits
    from medqa_lib.labels import encode_split
    from medqa_lib.model import load_tokenizer

    splits, tokenizer, examples = prepare_splits(), load_tokenizer(profile()), []
    for name, n in (("train", n_train), ("validation", n_validation)):
        rows = splits[name].shuffle(seed=42).select(range(n + 100))  # some have no answer within 512 tokens
        encoded, _ = encode_split(tokenizer, rows, 512, "aligned")
        examples += [{key: row[key] for key in ("input_ids", "labels")} for row in encoded.select(range(n))]
    return examples


def folder():
    if m.NAME != "learn":
        return m.WORK / f"model_{m.NAME}"
    from medqa_lib.standin import model_path

    return model_path(profile())


def load(targets=QKV, dropout: float = 0.05):
    quantization = (
        None
        if CPU
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=DTYPE,
            bnb_4bit_use_double_quant=True,
        )
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder(),
        quantization_config=quantization,
        dtype=DTYPE,
        device_map={"": DEVICE},
        attn_implementation="sdpa",
    )
    base.config.use_cache = False
    return add_adapter(base, targets, dropout)


def add_adapter(base, targets=QKV, dropout: float = 0.05):
    torch.manual_seed(42)
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    m.set_adapter(model)
    return model


def renew(model, targets=QKV, dropout: float = 0.05):
    fast_train.remove_fast_layers(model)
    base = model.unload()
    m.free_memory()
    return add_adapter(base, targets, dropout)


def pad(examples: list[dict]) -> dict:
    width = math.ceil(max(len(example["input_ids"]) for example in examples) / 8) * 8
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    fill = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    return {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
        for key, value in fill.items()
    }


def make_trainer(model, path: str, size: int, steps: int, data, callbacks=(), **extra) -> Trainer:
    if path == "fast":
        fast_train.install_fast_layers(model)
    arguments = dict(
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=ROWS // size,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=CPU,
        seed=42,
        label_names=["labels"],
        optim="adamw_torch_fused",
        bf16=DTYPE == torch.bfloat16,
        fp16=DTYPE == torch.float16,
    )
    if path == "fast" and not CPU:
        arguments |= {"logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": True}}
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if path == "fast" else pad
    return SequentialTrainer(
        model,
        TrainingArguments(str(m.WORK / m.NAME), **arguments | extra),
        train_dataset=data,
        data_collator=collator,
        callbacks=list(callbacks),
    )


def arm(model, name: str, path: str, size: int, steps: int, warm: int) -> None:
    """Train and record tokens/s, losses, gradient norms and memory."""
    clock = m.Clock(steps, warm)
    data = m.training_examples(steps)
    trainer = make_trainer(model, path, size, steps, data, [clock])
    trainer.train()
    scaler = getattr(trainer.accelerator, "scaler", None)
    about = {"loss_scale": scaler.get_scale()} if scaler else {}
    record(**clock.row(name, trainer, data, ROWS, size), **about, dtype=str(DTYPE))


def run_bf16() -> None:
    model = load()
    m.wait_for_turn()
    steps = (3, 1) if CPU else (40, 16)
    for name, targets in (
        ("fast, q k v", QKV),
        ("fast, all linear layers", m.LINEAR),
        ("fast, q k v again", QKV),
    ):
        model = renew(model, targets)
        with guarded(name):
            arm(model, name, "fast", ROWS, *steps)


def run_t4() -> None:
    model = load(dropout=0.0)
    m.wait_for_turn()
    if not CPU:
        torch.cuda.set_per_process_memory_fraction(
            CAP_BYTES / torch.cuda.get_device_properties(0).total_memory
        )
    for name, path, size, steps in (
        ("float16 fast", "fast", ROWS, (3, 1) if CPU else (40, 16)),
        ("float16 padded", "padded", ROWS // 4, (2, 1) if CPU else (6, 1)),
    ):
        model = renew(model, dropout=0.0)
        with guarded(name):
            arm(model, name, path, size, *steps)
    model = renew(model)
    with guarded("400 steps"):
        trainer = make_trainer(model, "fast", ROWS, 3 if CPU else 400, m.training_examples(3 if CPU else 400))
        start = time.perf_counter()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        record(
            steps=trainer.state.global_step,
            seconds=time.perf_counter() - start,
            finite=all(map(math.isfinite, losses)),
            losses=losses[-2:],
        )
    if not CPU:  # a CPU has no loss scale
        with guarded("overflow"), t4_conditions.Refuse():
            overflow(renew(model))


def overflow(model) -> None:
    """A loss scale far too large: the scaler must skip steps and halve it until gradients are finite, and then go on."""
    trainer = make_trainer(model, "fast", ROWS, 12, m.training_examples(12), logging_steps=1)
    scaler, seen = trainer.accelerator.scaler, []
    scaler._init_scale = 2.0**28
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    class Watch(m.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            moved = any(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)
            seen.append((scaler.get_scale(), moved))

    trainer.add_callback(Watch())
    trainer.train()
    record(overflow=[(math.log2(scale), moved) for scale, moved in seen])


def run_learn() -> None:
    rows = real_examples()
    train, validation = rows[:3200], rows[3200:]
    model = load(dropout=0.0)
    m.wait_for_turn()
    steps = 2 if CPU else 100
    for path, size in (("fast", ROWS), ("padded", ROWS // 4)):
        model = renew(model, dropout=0.0)
        with guarded(path):
            start_loss = validation_loss(model, validation)
            trainer = make_trainer(model, path, size, steps, train)
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
            fast_train.remove_fast_layers(model)
            record(
                path=path,
                seconds=seconds,
                before=start_loss,
                validation_loss=validation_loss(model, validation),
                losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                loss_scale=trainer.accelerator.scaler.get_scale() if not CPU else None,
            )


@torch.no_grad()
def validation_loss(model, examples) -> float:
    model.eval()
    total = tokens = 0
    for start in range(0, len(examples), 16):
        batch = {key: value.to(DEVICE) for key, value in pad(examples[start : start + 16]).items()}
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast(DEVICE, DTYPE, enabled=not CPU):
            total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


def run_tolerance() -> None:
    """Largest error of a kind of weight in `disprove`, for a sound kernel and for planted faults."""
    from medqa_lib.fast import paths

    model = load(m.LINEAR)
    m.wait_for_turn()
    rotate, attend = fast_train.DecoderLayer.rotate, fast_train.DecoderLayer.attend

    def wrong_sign(self, qkv, batch, sign):
        rotate(self, qkv, batch, -sign)

    def one_document(self, qkv, batch):
        starts = batch.starts.clone()
        starts[1:-1] = starts[-1]
        return attend(self, qkv, type(batch)(**{**vars(batch), "starts": starts, "longest": len(batch.ids)}))

    errors = {}
    compare = paths._compare

    def watch(found, expected):
        kinds = {
            kind: round(float((found[1][kind] - g).norm() / g.norm()), 4) for kind, g in expected[1].items()
        }
        errors.update(loss=abs(found[0] - expected[0]), worst=max(kinds.values()), best=min(kinds.values()))
        return compare(found, expected)

    paths._compare = watch
    faults = {"none": {}, "rope sign": {"rotate": wrong_sign}, "dropped start": {"attend": one_document}}
    for name, fault in faults.items():
        for examples in (None, m.make_examples(4)):
            for attribute, value in {"rotate": rotate, "attend": attend, **fault}.items():
                setattr(fast_train.DecoderLayer, attribute, value)
            with guarded(name):
                start = time.perf_counter()
                reason = paths.disprove(model, "fast", examples)
                record(
                    fault=name,
                    examples=len(examples or ()),
                    said=reason,
                    seconds=time.perf_counter() - start,
                    **errors,
                )


if CPU:
    import fast_helpers

    fast_train.DecoderLayer.attend = fast_helpers.attend_on_cpu
    fast_train.DecoderLayer.attend_backward = fast_helpers.attend_backward_on_cpu
if m.NAME != "learn":
    save_random_model()
globals()[f"run_{m.NAME}"]()
os._exit(0)
