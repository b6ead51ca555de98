"""A tiny Llama with LoRA, its batches, and attention for a machine without a GPU: what tests of the fast path share."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a GPU float32 products would be TF32 otherwise

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM  # noqa: E402

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(targets=ALL_LINEAR, dropout=0.0, rslora=False, **options):
    """A random two-layer Llama with grouped queries and a LoRA adapter whose B is not zero, so that A gets gradients too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=61,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(
            r=4,
            lora_alpha=6,
            lora_dropout=dropout,
            target_modules=list(targets),
            use_rslora=rslora,
            task_type="CAUSAL_LM",
            **options,
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.to(DEVICE)


def make_examples(lengths=(4, 12, 7), prompt=2):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in rows]


def attend_on_cpu(layer, qkv, batch):
    """Stands in for the flash kernel, which the CPU has not."""
    inputs = [part.detach().requires_grad_() for part in layer.split(qkv)]
    with torch.enable_grad():
        documents = zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)
        out = torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(part[start:end].transpose(0, 1)[None] for part in inputs),
                    is_causal=True,
                    scale=layer.scaling,
                    enable_gqa=True,
                )[0].transpose(0, 1)
                for start, end in documents
            ]
        )
    layer.tape = (inputs, out)
    return out.detach().contiguous(), *[torch.zeros(1)] * 3


def attend_backward_on_cpu(layer, grad, qkv, attended, batch):
    return torch.autograd.grad(layer.tape[1], layer.tape[0], grad)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def padded(examples):
    width = max(len(example["input_ids"]) for example in examples)
    return {
        key: torch.tensor(
            [example[source] + [fill] * (width - len(example[source])) for example in examples]
        ).to(DEVICE)
        for key, source, fill in (("input_ids", "input_ids", 0), ("labels", "labels", -100))
    }


def flattened(examples):
    """The batch that the fast path takes."""
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    return {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}
