"""The fast decoder gives generate()'s greedy answers, with rows leaving early and buffers used again."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from medqa_lib.config import PROFILES
from medqa_lib.evaluation.generation import cut_after_eos, pad_left
from medqa_lib.fast import decode as fast_decode
from medqa_lib.fast.decode import FastDecoder, attend_grouped, is_supported
from medqa_lib.model import load_base_model, load_tokenizer
from medqa_lib.prompts import encode_prompt

VOCABULARY = 97
NEVER = VOCABULARY  # an EOS that no row can say


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    """Three query heads a key head, as in SmolLM2, and weights large enough that answers differ."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def make_batch(rows: int, longest: int, seed: int = 0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(1, VOCABULARY, (longest - row % (longest - 1),), generator=generator).tolist()
        for row in range(rows)
    ]
    return pad_left(prompts, 0, device)


def decode_with_generate(model, ids, mask, new_tokens: int, eos_id: int) -> list[list[int]]:
    """generate() without EOS, cut afterwards."""
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    output = model.generate(ids, attention_mask=mask, generation_config=config)
    return [cut_after_eos(row, eos_id) for row in output[:, ids.shape[1] :].tolist()]


@pytest.fixture
def small_buckets(monkeypatch):
    """So small that a short answer crosses several buckets and a small batch shrinks."""
    for name, value in {"SLOT_BUCKET": 8, "ROW_BUCKET": 2, "CHECK_STEPS": 3}.items():
        monkeypatch.setattr(fast_decode, name, value)


def record_advances(monkeypatch) -> list[tuple[int, int]]:
    """(rows, steps) of each call of _advance from now on."""
    calls, advance = [], FastDecoder._advance

    def record(self, rows, length, steps):
        calls.append((rows, steps))
        advance(self, rows, length, steps)

    monkeypatch.setattr(FastDecoder, "_advance", record)
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"num_key_value_heads": 6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
)
def test_fast_decoder_equals_generate(small_buckets, changes):
    model = make_model(**changes)
    ids, mask = make_batch(rows=5, longest=11)
    expected = decode_with_generate(model, ids, mask, 30, NEVER)
    assert len({tuple(row) for row in expected}) == 5
    assert FastDecoder(model, NEVER)(ids, mask, 30) == expected


def test_fast_decoder_lets_finished_rows_leave(small_buckets, monkeypatch):
    model = make_model()
    ids, mask = make_batch(rows=12, longest=11)
    whole = decode_with_generate(model, ids, mask, 40, NEVER)
    eos_id = max(range(VOCABULARY), key=lambda token: sum(token in row for row in whole))
    expected = decode_with_generate(model, ids, mask, 40, eos_id)
    assert len({len(row) for row in expected}) > 3  # rows end at different steps
    calls = record_advances(monkeypatch)
    assert FastDecoder(model, eos_id)(ids, mask, 40) == expected
    sizes = [rows for rows, _ in calls]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 12 and len(set(sizes)) > 2


def test_fast_decoder_stops_when_all_rows_have_finished(small_buckets, monkeypatch):
    model = make_model()
    ids, mask = make_batch(rows=1, longest=6)
    (row,) = decode_with_generate(model, ids, mask, 40, NEVER)
    calls = record_advances(monkeypatch)
    assert FastDecoder(model, row[4])(ids, mask, 40) == [cut_after_eos(row, row[4])]
    assert (
        sum(steps for _, steps in calls) <= 6
    )  # EOS is at most the fifth token; the look at it comes every third step


def test_fast_decoder_uses_its_buffers_again(small_buckets):
    model = make_model()
    decoder = FastDecoder(model, NEVER)
    for rows, longest, new_tokens in [(6, 20, 12), (4, 9, 12), (9, 30, 5), (2, 3, 1)]:
        ids, mask = make_batch(rows, longest, seed=rows)
        assert decoder(ids, mask, new_tokens) == decode_with_generate(model, ids, mask, new_tokens, NEVER)


def test_fast_decoder_leaves_the_model_as_it_was_after_an_error(monkeypatch):
    model = make_model()
    monkeypatch.setattr(FastDecoder, "_advance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FastDecoder(model, NEVER)(*make_batch(2, 4), 5)
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_attend_grouped_equals_attention_with_repeated_keys():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 4, generator=generator) for heads, length in ((6, 1), (2, 5), (2, 5))
    )
    bias = torch.tensor([[0, 0, 0, 0, float("-inf")], [float("-inf"), 0, 0, 0, 0]])[:, None, None]
    out, _ = attend_grouped(None, query, key, value, bias, scaling=0.3)
    for head in range(6):
        scores = 0.3 * query[:, head] @ key[:, head // 3].transpose(1, 2) + bias[:, 0]
        torch.testing.assert_close(out[:, :, head], scores.softmax(-1) @ value[:, head // 3])


def test_is_supported_wants_a_plain_llama_and_a_gpu_with_bfloat16(monkeypatch):
    model = make_model()
    assert not is_supported(model)
    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert is_supported(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        assert not is_supported(model)
    model.model.layers[1].self_attn.q_proj = type("Linear4bit", (torch.nn.Linear,), {})(48, 48)
    assert not is_supported(model)


def test_is_supported_refuses_an_adapter(monkeypatch):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model = make_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert not is_supported(adapted) and not is_supported(model)


def test_cut_after_eos_keeps_the_first_eos():
    assert cut_after_eos([5, 2, 6, 2], 2) == [5, 2]
    assert cut_after_eos([5, 6], 2) == [5, 6]


@pytest.mark.slow
def test_fast_decoder_equals_generate_on_real_weights():
    model, tokenizer = (
        load_base_model(PROFILES["cpu"], quantized=False).float(),
        load_tokenizer(PROFILES["cpu"]),
    )
    questions = ["What is gout?", "What are the signs of malaria in a small child?", "Is asthma inherited?"]
    ids, mask = pad_left(
        [encode_prompt(tokenizer, question) for question in questions], tokenizer.eos_token_id, model.device
    )
    expected = decode_with_generate(model, ids, mask, 24, tokenizer.eos_token_id)
    assert FastDecoder(model, tokenizer.eos_token_id)(ids, mask, 24) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fast_decoder_equals_generate_with_graphs(small_buckets, dtype):
    model = make_model().to("cuda", dtype)
    assert is_supported(model)
    decoder = FastDecoder(model, 5)
    for rows, longest in [(12, 20), (8, 9), (14, 30)]:
        ids, mask = make_batch(rows, longest, seed=rows, device="cuda")
        expected = decode_with_generate(model, ids, mask, 40, 5)
        same = [row == other for row, other in zip(decoder(ids, mask, 40), expected, strict=True)]
        assert (
            sum(same) >= (1.0 if dtype == torch.float32 else 0.7) * rows
        )  # in 16 bits near ties may fall otherwise
