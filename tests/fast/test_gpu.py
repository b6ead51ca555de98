"""On a GPU: 16-bit training with graphs, the loss scale of float16, and the proof that a path must give before a run."""

import importlib.util

import pytest
import torch
from fast_helpers import flattened, loss_and_gradients, make_examples, make_model, padded
from t4_conditions import forbid_newer

from medqa_lib import model as setup
from medqa_lib.fast import paths
from medqa_lib.fast import train as fast_train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.fixture(params=[(8, 0), (7, 5)], ids=["flash", "capability 7.5"])
def dtype(request):
    """bfloat16 with flash attention, and float16 with what capability 7.5 has."""
    if request.param == (7, 5):
        with forbid_newer():
            yield torch.float16
    elif torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no flash attention")
    else:
        yield torch.bfloat16


def make_half(dtype, **options):
    """The tiny model in 16 bits with its adapter in float32, as `model.add_lora` leaves it."""
    model = make_model(**options).to(dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model


def test_replayed_graphs_equal_the_first_pass_for_every_size(dtype):
    sizes = [
        (40, 300, 90),
        (200, 200, 200),
        (40, 300, 90),
        (500, 410, 90),
        (7, 8, 9),
        (200, 312),
        (200, 200, 200),
    ]
    model, batches, results = (
        make_half(dtype, dropout=0.1),
        [flattened(make_examples(size)) for size in sizes],
        [],
    )
    for graphed in (False, True):
        fast_train.install_fast_layers(model)
        step = model.get_base_model().forward.args[1]
        torch.manual_seed(3)
        for batch in batches:
            step.compiled = {True} if graphed else set()  # {}: every pass is a first pass
            results.append(loss_and_gradients(model, batch))
    for (loss, gradients), (replayed_loss, replayed) in zip(
        results[: len(sizes)], results[len(sizes) :], strict=True
    ):
        assert replayed_loss == pytest.approx(loss, abs=1e-4)
        for name, gradient in gradients.items():
            assert (replayed[name] - gradient).norm() <= 2e-2 * gradient.norm(), name


def test_gradients_are_near_those_of_float32(dtype):
    """As near as transformers' own 16-bit gradients, within a factor; the loss is scaled, as a GradScaler does it."""
    examples, scale = make_examples((60, 33, 90)), 1024.0
    exact_loss, exact = loss_and_gradients(make_model(), padded(examples))
    found = {}
    for name in ("transformers", "fast"):
        model = make_half(dtype)
        if name == "fast":
            fast_train.install_fast_layers(model)
        for _ in range(3):  # the second pass records graphs
            model.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = model(**(padded if name == "transformers" else flattened)(examples)).loss
            (loss * scale).backward()
        gradients = {n: p.grad / scale for n, p in model.named_parameters() if p.requires_grad}
        error = sum((gradients[n] - exact[n]).square().sum() for n in exact) / sum(
            exact[n].square().sum() for n in exact
        )
        found[name] = (float(loss), float(error.sqrt()))
    print(dtype, found, exact_loss)
    assert found["fast"][0] == pytest.approx(exact_loss, abs=2e-2)
    assert found["fast"][1] <= 2 * found["transformers"][1] + 1e-3


def test_an_infinite_loss_scale_gives_infinite_gradients_and_a_smaller_one_recovers(dtype):
    model, batch = make_half(dtype), flattened(make_examples((60, 33)))
    fast_train.install_fast_layers(model)
    finite = []
    for scale in (1.0, 2.0**100, 2.0**10):
        model.zero_grad()
        (model(**batch).loss * scale).backward()
        finite.append(all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad))
    assert finite[0] and finite[2]
    assert finite[1] is (dtype == torch.bfloat16)  # bfloat16 has float32's range


@pytest.mark.parametrize("path", ["fast", "padding_free"])
def test_a_sound_path_is_not_disproved_and_leaves_the_model_as_it_was(path, dtype):
    if path == "padding_free" and dtype == torch.float16:
        pytest.skip("padding_free needs flash attention")
    model = make_half(dtype, dropout=0.1)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    assert paths.choose_path(model, path) == (path, "")
    assert paths.disprove(model, path, make_examples((60, 33, 90))) == ""
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and model.training
    assert torch.equal(torch.get_rng_state(), state) and "forward" not in model.get_base_model().__dict__


def wrong_rotation(monkeypatch):
    rotate = fast_train.DecoderLayer.rotate
    monkeypatch.setattr(
        fast_train.DecoderLayer, "rotate", lambda self, qkv, batch, sign: rotate(self, qkv, batch, -sign)
    )


def dropped_start(monkeypatch):
    attend = fast_train.DecoderLayer.attend

    def one_document(self, qkv, batch):
        starts = batch.starts.clone()
        starts[1:-1] = starts[-1:]
        return attend(self, qkv, type(batch)(**{**vars(batch), "starts": starts, "longest": len(batch.ids)}))

    monkeypatch.setattr(fast_train.DecoderLayer, "attend", one_document)


def missing_operator(monkeypatch):
    def attend(self, qkv, batch):
        raise AttributeError("torch has no such operator")

    monkeypatch.setattr(fast_train.DecoderLayer, "attend", attend)


@pytest.mark.parametrize("fault", [wrong_rotation, dropped_start, missing_operator])
def test_a_planted_fault_is_found_before_the_first_step(fault, dtype, monkeypatch):
    model = make_half(dtype)
    fault(monkeypatch)
    path, reason = paths.choose_path(model, "fast", make_examples((60, 33, 90)))
    print(reason)
    assert path == "padded" and any(word in reason for word in ("loss", "gradient", "operator"))


def test_weights_of_the_cpu_are_quantised_on_the_gpu_as_there():
    from bitsandbytes import functional

    weight, options = torch.randn(256, 512), {"quant_type": "nf4", "compress_statistics": True}
    expected = functional.dequantize_4bit(*functional.quantize_4bit(weight, **options))
    with setup._quantize_on("cuda"):
        packed, state = functional.quantize_4bit(weight, **options)
    assert packed.device.type == state.absmax.device.type == "cpu"
    error = (functional.dequantize_4bit(packed, state) - expected).abs()
    assert (error > 1e-3).float().mean() < 1e-3  # a weight halfway between two levels may take either
