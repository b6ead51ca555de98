"""An end token that the model knows, and weights that a CPU does not repack."""

import pytest
import torch

from medqa_lib import model
from medqa_lib.config import PROFILES


@pytest.mark.parametrize(
    ("own", "right"), [(1, True), ([7, 1], True), (None, True), (2, False), ([7, 2], False)]
)
def test_require_end_token_compares_tokenizer_and_model(own, right):
    smoke = PROFILES["smoke"]
    tokenizer, base = model.load_tokenizer(smoke), model.load_base_model(smoke, quantized=False)
    base.generation_config.eos_token_id = own
    if right:
        assert model.check_eos_token(base, tokenizer) is None
    else:
        with pytest.raises(ValueError, match=r"end token is '</s>' \(1\), the model's is .*\(2\)"):
            model.check_eos_token(base, tokenizer)


def test_base_model_keeps_its_weights_on_a_cpu_for_which_bitsandbytes_repacks_them(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base, tokens = model.load_base_model(PROFILES["smoke"]), torch.arange(2, 20).view(1, -1)
    with torch.no_grad():
        four_bit = base(tokens).logits
        dequantised = base.dequantize(dtype=torch.float32)(tokens).logits
    fresh = model.load_base_model(PROFILES["smoke"]).dequantize(dtype=torch.float32)(tokens).logits
    assert torch.equal(dequantised, fresh)
    assert torch.allclose(four_bit, fresh, atol=1e-6)
