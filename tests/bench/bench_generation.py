"""Generation on one GPU: `python tests/bench/bench_generation.py` checks the answers and times the paths, in about three minutes.

Speed: a random model of TinyLlama's size, 256 prompts x 256 new tokens, EOS ignored. Agreement: SmolLM2-135M's real weights.
The questions come from MEDQA_DATA_DIR, else from the bundled sample (repeated with numbers). Results go to
$OUT/generation_<gpu>.json (by default `runs/bench`) after each arm, so a failing arm costs only itself; a table is printed last.
`--t4`: float16, no flash attention; fewer arms. `--cpu` only checks that the script runs: tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
OUT = Path(os.environ.get("OUT", ROOT / "runs" / "bench"))
parser = argparse.ArgumentParser()
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--t4", action="store_true", help="forbid what capability 7.5 lacks")
CPU, T4 = parser.parse_args().cpu, parser.parse_args().t4
ROWS, NEW, ALL, ONE_BY_ONE = (6, 12, 10, (2, 4)) if CPU else (256, 256, 1800, (4, 32))

# SmolLM2 is converted once, about half a minute: beside the imports and the making of the random model
convert = "from medqa_lib.config import PROFILES; from medqa_lib.standin import model_path; model_path(PROFILES['cpu'])"
prepare = subprocess.Popen([sys.executable, "-c", convert], cwd=ROOT)

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.attention import sdpa_kernel  # noqa: E402

if T4:  # before anything of ours asks; to the end of the process
    from t4_conditions import forbid_newer

    FORBIDDEN = contextlib.ExitStack()
    FORBIDDEN.enter_context(forbid_newer(refuse=False))

from medqa_lib.config import PROFILES, LoraSettings  # noqa: E402
from medqa_lib.data.sources import SAMPLE_DIR, load_sources  # noqa: E402
from medqa_lib.evaluation import generation  # noqa: E402
from medqa_lib.fast import decode as fast_decode  # noqa: E402
from medqa_lib.model import add_lora, load_base_model, load_merged, load_tokenizer  # noqa: E402
from medqa_lib.prompts import encode_prompt  # noqa: E402
from medqa_lib.standin import model_path  # noqa: E402

DEVICE = "cpu" if CPU else "cuda"
NEVER = 31_999  # an id that the random model is kept from saying, used as EOS
results: dict = {}


def arm(function):
    """Run at once, keep what it returns under its name, and go on if it fails."""
    start = time.perf_counter()
    if not CPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = function()
    except Exception as error:
        traceback.print_exc()
        found = {"failed": repr(error)[:300]}
    peak = 0.0 if CPU else round(torch.cuda.max_memory_allocated() / 2**30, 2)
    results[function.__name__] = {**found, "peak_gib": peak, "arm_s": round(time.perf_counter() - start, 1)}
    print(function.__name__, json.dumps(results[function.__name__]), flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"generation_{gpu_slug()}.json").write_text(
        json.dumps({"environment": describe(), "arms": results}, indent=1)
    )


def gpu_slug() -> str:
    return "cpu" if CPU else torch.cuda.get_device_name().lower().replace(" ", "_")


def describe() -> dict:
    return {
        "gpu": gpu_slug(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": ROWS,
        "new_tokens": NEW,
        "mean_prompt_tokens": statistics.mean(map(len, prompts)),
    }


def read_questions(count: int) -> list[str]:
    """Different questions in a seeded order."""
    known = sorted(
        set(load_sources(os.environ.get("MEDQA_DATA_DIR") or SAMPLE_DIR)["medquad"]["question"].dropna())
    )
    random.Random(0).shuffle(known)
    return [
        known[i % len(known)] + (f" ({i // len(known)})" if i >= len(known) else "") for i in range(count)
    ]


def timed(function, *args) -> tuple[float, list]:
    """Seconds and result; waits for the GPU on both sides."""
    wait = (lambda: None) if CPU else torch.cuda.synchronize
    wait()
    start = time.perf_counter()
    found = function(*args)
    wait()
    return time.perf_counter() - start, found


def speed(seconds: list[float], tokens: int) -> dict:
    """Tokens/s: median and range over repetitions."""
    rates = sorted(tokens / s for s in seconds)
    return {
        "tokens_s": round(statistics.median(rates), 1),
        "tokens_s_range": [round(rates[0], 1), round(rates[-1], 1)],
        "seconds": [round(s, 3) for s in seconds],
    }


def plain(
    model, eos_id: int, batch: list[list[int]], new_tokens: int, backends=generation.BACKENDS
) -> list[list[int]]:
    """generate() on one left-padded batch; backends None leaves torch's own order."""
    ids, mask = generation.pad_left(batch, eos_id, model.device)
    with generation._greedy_mode(model), sdpa_kernel(backends) if backends else torch.no_grad():
        return generation.decode_plain(model, [eos_id], ids, mask, new_tokens)


def fast(decoder, batch: list[list[int]], new_tokens: int) -> list[list[int]]:
    ids, mask = generation.pad_left(batch, decoder.eos_id, decoder.model.device)
    with sdpa_kernel(generation.BACKENDS):
        return decoder(ids, mask, new_tokens)


def first_tokens_equal(a: list[list[int]], b: list[list[int]], count: int = 16) -> float:
    """Share of the first `count` positions with the same token; positions that only one of them has count as different."""
    pairs = [
        (x[i : i + 1], y[i : i + 1])
        for x, y in zip(a, b, strict=True)
        for i in range(min(count, max(len(x), len(y))))
    ]
    return round(sum(x == y for x, y in pairs) / len(pairs), 4)


def gap_at_first_difference(model, prompt: list[int], a: list[int], b: list[int]) -> dict:
    """Where two answers part, and how far the logits of the two tokens are from each other there."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if at >= min(len(a), len(b)):
        return {"at": at, "gap": None}
    with torch.no_grad():
        logits = (
            model(input_ids=torch.tensor([prompt + a[:at]], device=model.device), use_cache=False)
            .logits[0, -1]
            .float()
        )
    return {"at": at, "gap": float(logits[a[at]] - logits[b[at]])}


def make_tiny_llama() -> Path:
    """Random weights of TinyLlama's shape, saved, so that the project's own loaders read them."""
    size = (64, 128, 2, 4, 2) if CPU else (2048, 5632, 22, 32, 4)
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    settings = dict(zip(names, size, strict=True))
    config = transformers.LlamaConfig(
        vocab_size=32_000, max_position_embeddings=2048, rms_norm_eps=1e-5, **settings
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.lm_head.weight.data[NEVER] = 0  # logit 0 is never the largest of 32,000
    folder = Path(tempfile.gettempdir()) / f"medqa_tinyllama_{DEVICE}"
    model.save_pretrained(folder)
    return folder


def one_by_one_nf4():
    """The usual notebook: 4-bit model with its adapter, a question at a time."""
    model = add_lora(load_base_model(tiny), LoraSettings()).eval()
    count, new = ONE_BY_ONE
    plain(model, NEVER, prompts[:1], 4)
    return speed([timed(plain, model, NEVER, [prompt], new)[0] for prompt in prompts[:count]], new) | {
        "prompts": count,
        "new_tokens": new,
    }


def generate_nf4():
    """Batch of all prompts, 4-bit model with its adapter, generate()."""
    model, new = add_lora(load_base_model(tiny), LoraSettings()).eval(), min(NEW, 64)
    plain(model, NEVER, prompts, 4)
    return speed([timed(plain, model, NEVER, prompts, new)[0]], ROWS * new) | {"new_tokens": new}


def generate_merged():
    """Batch of all prompts, merged model, generate()."""
    plain(merged, NEVER, prompts, 4)
    return speed([timed(plain, merged, NEVER, prompts, NEW)[0]], ROWS * NEW)


def fast_decode_merged():
    """Ours. The first call captures the graphs, the others use them again."""
    decoder = fast_decode.FastDecoder(merged, NEVER)
    first, answers = timed(fast, decoder, prompts, NEW)
    again = [timed(fast, decoder, prompts, NEW)[0] for _ in range(3)]
    assert all(len(answer) == NEW for answer in answers)
    return speed(again, ROWS * NEW) | {
        "first_call_s": round(first, 2),
        "first_call_tokens_s": round(ROWS * NEW / first),
        "prefill_s": round(timed(fast, decoder, prompts, 1)[0], 3),
    }


def kernel_profile():
    """Milliseconds and launches a token of the most expensive kernels."""
    from torch.profiler import ProfilerActivity, profile

    decoder = fast_decode.FastDecoder(merged, NEVER)
    fast(decoder, prompts, NEW)
    if CPU:
        return {}
    (rows, length), steps = max(decoder.graphs), 8
    decoder.slot.fill_(length - 2 * steps)
    decoder.step.zero_()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        decoder._advance(rows, length, steps)
        torch.cuda.synchronize()
    times = {
        event.key[:70]: (round(event.self_device_time_total / 1e3 / steps, 3), event.count // steps)
        for event in trace.key_averages()
    }
    top = sorted(times.items(), key=lambda item: -item[1][0])[:16]
    return {
        "ms": round(sum(ms for ms, _ in times.values()), 2),
        "launches": sum(n for _, n in times.values()),
        "top": dict(top),
    }


def ablation():
    """Tokens/s of ours less one ingredient. The model's own RMSNorm is seven kernels, which round twice."""
    grouped = fast_decode.attend_grouped
    sdpa = transformers.AttentionInterface()["sdpa"]
    width = -(-(len(prompts[0]) + NEW) // 8) * 8
    found = {
        "ours": repeat_fast(),
        "ours_slots_64": repeat_fast(SLOT_BUCKET=64),
        "one_slot_bucket": repeat_fast(SLOT_BUCKET=width),
    }
    transformers.AttentionInterface.register("medqa_grouped", sdpa)
    found["transformers_sdpa"] = repeat_fast()
    transformers.AttentionInterface.register("medqa_grouped", grouped)
    with mock.patch.object(
        fast_decode.FastDecoder, "_capture", lambda self, *shape: lambda: self._forward(*shape)
    ):
        found["no_graphs"] = repeat_fast(min(NEW, 24))
    with mock.patch.object(fast_decode, "LlamaRMSNorm", None):
        found["models_rms_norm"] = repeat_fast()
    return found


def repeat_fast(new_tokens: int | None = None, **constants) -> int:
    """Tokens/s of a second call, with some of fast_decode's constants changed."""
    new_tokens = new_tokens or NEW
    with mock.patch.multiple(fast_decode, **constants) if constants else contextlib.nullcontext():
        decoder = fast_decode.FastDecoder(merged, NEVER)
        fast(decoder, prompts, new_tokens)
        return round(ROWS * new_tokens / timed(fast, decoder, prompts, new_tokens)[0])


def all_questions():
    """generate_answers on as many questions as the test split holds, graphs captured on the way, against one-by-one generation."""
    seconds, records = timed(lambda: generation.generate_records(merged, tokenizer, prompts_all, NEW))
    rates = results["one_by_one_nf4"]["tokens_s_range"]
    slow = [len(questions) * NEW / rate for rate in rates[::-1]]
    tokens = sum(record.tokens for record in records)
    return {
        "questions": len(questions),
        "tokens_s": round(tokens / seconds),
        "seconds": round(seconds, 2),
        "one_by_one_estimate_s": [round(s) for s in slow],
        "times_as_fast": [round(s / seconds) for s in slow],
    }


@functools.cache
def real_model():
    return load_merged(profile=PROFILES["cpu"])


def float32_equality():
    """Real weights, float32: the answers of ours and of generate()."""
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(model_path(PROFILES["cpu"]), dtype=torch.float32)
        .to(DEVICE)
        .eval()
    )
    expected, found = plain(model, eos, real, NEW), fast(fast_decode.FastDecoder(model, eos), real, NEW)
    different = [i for i in range(ROWS) if expected[i] != found[i]]
    gaps = [gap_at_first_difference(model, real[i], expected[i], found[i]) for i in different[:8]]
    return {
        "questions": ROWS,
        "equal": ROWS - len(different),
        "eos_rate": sum(a[-1] == eos for a in expected),
        "differences": gaps,
    }


def bfloat16_agreement():
    """Real weights, merged model: first 16 tokens of ours and generate()'s, and how far generate() agrees with itself."""
    model, half, new = real_model(), ROWS // 2, min(NEW, 64)
    expected, found = plain(model, eos, real, new), fast(fast_decode.FastDecoder(model, eos), real, new)
    short = min(new, 16)
    halves = plain(model, eos, real[:half], short) + plain(model, eos, real[half:], short)
    equal = sum(a == b for a, b in zip(expected, found, strict=True))
    return {
        "first_16_equal": first_tokens_equal(expected, found),
        "answers_equal": equal,
        "questions": ROWS,
        "new_tokens": new,
        "generate_in_half_batches": first_tokens_equal(expected, halves),
        "generate_in_torch_order": first_tokens_equal(expected, plain(model, eos, real, short, None)),
        "dtype": str(model.dtype),
    }


start_s = time.perf_counter()
questions = read_questions(ALL)
tiny = dataclasses.replace(PROFILES["gpu"], model=str(make_tiny_llama()))
prepare.wait()
tokenizer = load_tokenizer(PROFILES["cpu"])
eos = tokenizer.eos_token_id
real_all = [encode_prompt(tokenizer, question) for question in questions]
real = sorted(real_all[:ROWS], key=len, reverse=True)
prompts_all = [[token % 31_000 for token in ids] for ids in real_all]
prompts = [[token % 31_000 for token in ids] for ids in real]
print(f"prepared after {time.perf_counter() - start_s:.0f} s", flush=True)
for function in (float32_equality, bfloat16_agreement, one_by_one_nf4, generate_nf4):
    arm(function)
merged = load_merged(profile=tiny)
whole = (all_questions, generate_merged, ablation, kernel_profile)
for function in (fast_decode_merged, *(() if T4 else whole)):
    arm(function)

print(f"\n{describe()}\n")
for name, found in results.items():
    rate = found.get("tokens_s", "")
    print(
        f"{name:28s} {rate:>10} tokens/s  {found['peak_gib']:6.2f} GiB  {found['arm_s']:6.1f} s  {found.get('failed', '')}"
    )
for name in [each for each in results if each in ("float32_equality", "bfloat16_agreement", "all_questions", "ablation")]:
    print(name, {key: value for key, value in results[name].items() if key not in ("peak_gib", "arm_s")})
print(f"Whole: {time.perf_counter() - start_s:.0f} s")
