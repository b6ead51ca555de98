"""The fast path in float32 against transformers and PEFT, gradients in float64: on a GPU if there is one, else in Triton's interpreter."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from fast_helpers import (
    ALL_LINEAR,
    DEVICE,
    attend_backward_on_cpu,
    attend_on_cpu,
    flattened,
    loss_and_gradients,
    make_examples,
    make_model,
    padded,
)

from medqa_lib.fast import paths
from medqa_lib.fast import train as fast_train

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def assert_near(found, exact):
    """Each weight's gradient by its norm. transformers' own in float32 are within 2e-6 of float64's, in TF32 it would be 1e-3."""
    for name, gradient in exact.items():
        assert gradient.abs().max() > 0
        error = float((found[name].double() - gradient).norm() / gradient.norm())
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.fixture
def cpu_attention(monkeypatch):
    """Without a GPU torch's own attention stands in for the GPU's; with one everything is the real thing."""
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(fast_train.DecoderLayer, "attend", attend_on_cpu)
    monkeypatch.setattr(fast_train.DecoderLayer, "attend_backward", attend_backward_on_cpu)


@needs_triton
@pytest.mark.parametrize(
    ("options", "keep_weights"),
    [
        ({}, True),
        ({"targets": ("q_proj", "v_proj")}, False),
        ({"targets": ("down_proj", "up_proj"), "rslora": True}, True),
    ],
)
def test_fast_forward_equals_transformers_and_peft(options, keep_weights, cpu_attention):
    model, examples = make_model(**options), make_examples()
    expected_loss, expected = loss_and_gradients(make_model(**options).double(), padded(examples))
    fast_train.install_fast_layers(model, keep_weights)
    loss, gradients = loss_and_gradients(model, flattened(examples))
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_near(gradients, expected)


@needs_triton
def test_filling_up_to_a_size_changes_neither_loss_nor_gradients(cpu_attention):
    model, batch = make_model(), flattened(make_examples())
    fast_train.install_fast_layers(model)
    expected_loss, expected = loss_and_gradients(model, batch)
    step, (run, replay) = model.get_base_model().forward.args[1], (fast_train.FastStep.run, [])

    def filled_up(self, real, need_grad):
        static = self.blank(real, 64)
        self.fill(
            static, make_namespace(real, ids=real.ids.new_full((60,), 7), targets=real.ids.new_full((60,), 7))
        )  # an earlier batch
        self.fill(static, real)
        replay.append(len(static.ids))
        return run(self, static, need_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_train.FastStep, "run", filled_up)
        loss, gradients = loss_and_gradients(model, batch)
    assert replay == [64] and loss == pytest.approx(expected_loss, abs=1e-6)
    assert_near(gradients, expected)
    assert step.gradient.numel() == sum(gradient.numel() for gradient in expected.values())


def make_namespace(batch, **changes):
    return SimpleNamespace(**{**vars(batch), **changes})


class FixedDropout(torch.nn.Module):
    """Dropout with the mask that the kernels draw, computed here in 64-bit integers."""

    def __init__(self, seed, multiplier, p):
        super().__init__()
        self.seed, self.multiplier, self.p = seed, multiplier, p

    def forward(self, x):
        bits = torch.arange(x.numel(), device=x.device).view(x.shape)
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        bits = bits ^ (bits >> 15) ^ self.seed
        bits = (bits ^ (bits >> 17)) * 0x846CA68B & 0xFFFFFFFF
        bits = (bits ^ (bits >> 16)) * self.multiplier & 0xFFFFFFFF
        return x * (bits >= round(self.p * 2**32)) / (1 - self.p)


def fix_dropout(model, p):
    """Give every adapter the mask that the next fast forward pass will give it."""
    state = torch.get_rng_state()
    layers = model.get_base_model().model.layers
    seeds = torch.randint(2**31, (len(layers), 4), dtype=torch.int32).tolist()
    torch.set_rng_state(state)
    multipliers = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
    for layer, layer_seeds in zip(layers, seeds, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        for group, seed in zip(groups, layer_seeds, strict=True):
            for module, multiplier in zip(group, multipliers, strict=False):
                module.lora_dropout["default"] = FixedDropout(seed, multiplier, p)


@needs_triton
def test_fast_forward_draws_one_mask_an_adapter_and_repeats_it_backward(cpu_attention):
    p = 0.3
    model, batch = make_model(dropout=p), flattened(make_examples(lengths=(11,)))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fast_train.install_fast_layers(model)
    loss, gradients = loss_and_gradients(model, batch)
    fast_train.remove_fast_layers(model)
    torch.set_rng_state(state)
    fix_dropout(model.double(), p)
    expected_loss, expected = loss_and_gradients(model, {key: batch[key] for key in ("input_ids", "labels")})
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_near(gradients, expected)


def test_dropout_masks_are_independent_bernoulli_draws():
    p, size = 0.05, (400, 576)
    dropped = [
        FixedDropout(seed, multiplier, p)(torch.ones(size)) == 0
        for seed in (11, 2**30 + 5)
        for multiplier in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
    ]
    cells = size[0] * size[1]
    for i, mask in enumerate(dropped):
        assert abs(mask.float().mean() - p) < 5 * (p / cells) ** 0.5
        for neighbour in (
            mask[1:] & mask[:-1],
            mask[:, 1:] & mask[:, :-1],
            *(mask & other for other in dropped[:i]),
        ):
            assert abs(neighbour.float().mean() - p**2) < 5 * p / cells**0.5


@needs_triton
def test_fast_forward_without_training_drops_nothing_and_leaves_other_calls_alone(cpu_attention):
    model, examples = make_model(dropout=0.5).eval(), make_examples()
    with torch.no_grad():
        expected = model(**padded(examples)).loss.item()
        fast_train.install_fast_layers(model)
        assert model(**flattened(examples)).loss.item() == pytest.approx(expected, abs=1e-5)
        assert model(**padded(examples)).loss.item() == expected
        assert model(**flattened(examples), num_items_in_batch=torch.tensor(1)).loss.item() == pytest.approx(
            expected * sum(len(example["input_ids"]) - 2 for example in examples), rel=1e-5
        )


@needs_triton
def test_layers_without_lora_keep_nothing_for_it(cpu_attention, monkeypatch):
    kept, forward = [], fast_train.LinearGroup.forward

    def watched(group, *arguments):
        out, xa = forward(group, *arguments)
        kept.append((bool(group.slots), 0 if xa is None else xa.untyped_storage().nbytes()))
        return out, xa

    monkeypatch.setattr(fast_train.LinearGroup, "forward", watched)
    model = make_model(targets=ALL_LINEAR[:3])
    fast_train.install_fast_layers(model)
    loss_and_gradients(model, flattened(make_examples()))
    assert {has_lora for has_lora, _ in kept} == {True, False}
    assert all((size > 0) == has_lora for has_lora, size in kept), "the storage behind xa, in bytes"


@needs_triton
@pytest.mark.parametrize(
    ("options", "supported"),
    [
        ({}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
        ({"rank_pattern": {"q_proj": 2}}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
)
def test_supports_architecture_refuses_what_it_would_compute_wrongly(options, supported):
    assert (paths.refuse_architecture(make_model(**options)) == "") is supported
