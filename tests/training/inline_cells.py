# ruff: noqa
# fmt: off
# %% 1. The base model in four bits
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

name = standin.model_path(profile)  # a name on the Hub, such as "TinyLlama/TinyLlama-1.1B-Chat-v1.0", or a folder
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama has no padding token of its own
on_gpu, dtype = torch.cuda.is_available(), model.compute_dtype()  # bfloat16; float16 on a T4; float32 on a CPU
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",  # 16 levels, placed where normally distributed weights are
    bnb_4bit_use_double_quant=True,  # the scale of each 64 weights is quantised too
    bnb_4bit_compute_dtype=dtype,  # weights are dequantised to it for every multiplication
)
base = AutoModelForCausalLM.from_pretrained(
    name, quantization_config=nf4, dtype=dtype, device_map={"": 0 if on_gpu else "cpu"}, attn_implementation="sdpa")
base.config.use_cache = False  # the cache of keys and values is for generation
if not on_gpu:
    base = base.dequantize(dtype=torch.float32)  # the quantised numbers, dequantised once: faster on a CPU

# %% 2. LoRA
from peft import LoraConfig, get_peft_model

lora = LoraConfig(
    r=8,  # rank: each update of a weight matrix is B @ A with 8 columns and 8 rows
    lora_alpha=16,  # the update is scaled by alpha / r = 2
    lora_dropout=0.05,
    target_modules=["q_proj", "k_proj", "v_proj"],
    bias="none",
    task_type="CAUSAL_LM",
)
torch.manual_seed(42)  # A starts random, B at zero: the first step starts from the untuned model
tuned = get_peft_model(base, lora)
tuned.print_trainable_parameters()  # of a 4-bit base PEFT counts the real number of weights

# %% 3. Labels: encode, then decode one example without its masked tokens
label_policy = "preshifted"  # the original's labels, shifted by hand; "aligned" is correct
train, counts = labels.encode_split(tokenizer, splits["train"], experiment.max_length, label_policy)
validation, _ = labels.encode_split(tokenizer, splits["validation"], experiment.max_length, "aligned")
print(counts)
example = train[0]
learned = [token for token in example["labels"] if token != -100]  # -100: the loss leaves this position out
print("READ   ", repr(tokenizer.decode(example["input_ids"])))
print("LEARNED", repr(tokenizer.decode(learned)))

# %% 4. The Trainer
import math
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

learning_rate, steps, batch = 5e-5, experiment.max_steps, experiment.total_batch_size
rows = min(8, batch)  # at a time; the gradients of batch / rows forward passes are added up to one step
recipe = f"{label_policy}_rate{learning_rate:g}_rank{lora.r}_steps{steps}"  # another recipe, another folder
folder = home / "checkpoints" / profile.model_slug / f"notebook_11_{recipe}"
arguments = TrainingArguments(
    str(folder), max_steps=steps, learning_rate=learning_rate, seed=42, optim="adamw_torch_fused",
    lr_scheduler_type="linear", warmup_steps=math.ceil(0.03 * steps), weight_decay=0.0,
    per_device_train_batch_size=rows, gradient_accumulation_steps=batch // rows,
    logging_steps=experiment.logging_steps, save_steps=experiment.save_steps, save_total_limit=2,
    bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, dataloader_pin_memory=on_gpu, report_to="none")
collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)  # pads ids with EOS and labels with -100
trainer = Trainer(tuned, arguments, train_dataset=train, data_collator=collator)

# %% 5. Train, or go on from the newest checkpoint
from transformers.trainer_utils import get_last_checkpoint

folder.mkdir(parents=True, exist_ok=True)
latest_checkpoint = get_last_checkpoint(folder)  # None at the first start
print("Resuming from", latest_checkpoint)
if latest_checkpoint and latest_checkpoint.endswith(f"-{steps}"):
    tuned.load_adapter(latest_checkpoint, "default")  # trained to the end already
else:
    trainer.train(resume_from_checkpoint=latest_checkpoint)
tuned.save_pretrained(folder / "adapter")
print(f"Validation loss, correct labels: {likelihood.completion_loss(tuned, validation):.4f}")
