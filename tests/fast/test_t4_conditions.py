"""The forbidding mode refuses what a T4 lacks, in forward and backward passes, and leaves nothing behind."""

import pytest
import torch
from t4_conditions import forbid_newer


def test_bfloat16_is_refused_where_it_is_made_and_where_it_is_read():
    half = torch.ones(2, dtype=torch.bfloat16)
    with forbid_newer():
        assert torch.cuda.get_device_capability() == (7, 5)
        for slip in (lambda: torch.ones(2).to(torch.bfloat16), lambda: half.float()):
            with pytest.raises(RuntimeError, match="bfloat16"):
                slip()
        assert torch.ones(2).half().sum() == 2
    assert half.float().sum() == 2


def test_a_backward_pass_in_bfloat16_is_refused():
    class Slip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad.bfloat16().float() * 2

    weight = torch.ones(3, requires_grad=True)
    with forbid_newer(), pytest.raises(RuntimeError, match="bfloat16"):
        Slip.apply(weight).sum().backward()


def test_flash_attention_is_refused():
    states = [torch.ones(1, 2, 8, 16) for _ in range(3)]
    with forbid_newer(), pytest.raises(RuntimeError, match="no such attention"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states)
