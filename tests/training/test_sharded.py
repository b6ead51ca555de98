"""FSDP on a 4-bit base, two processes on CPUs: half the bytes each, the loss and gradients of the whole model, an adapter as ever.

In bfloat16, and what copies many tensors at once goes by way of float32 as on a GPU: a NaN does not keep its bits.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from two_processes import run_in_two

from medqa_lib.training.trainer import AnswerTrainer

SCRIPT = """
import os
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from medqa_lib import model as setup
from medqa_lib.config import LoraSettings, current_profile
from medqa_lib.model import add_lora, load_base_model, whole
from medqa_lib.training.trainer import gather_bytes

setup.compute_dtype = lambda: torch.bfloat16

def copy_by_float(targets, sources, *rest):
    for target, source in zip(targets, sources, strict=True):
        source = source.float() if source.is_floating_point() else source
        number = torch.where(source.isnan(), torch.nan, source) if source.is_floating_point() else source
        target.copy_(number)

torch._foreach_copy_ = copy_by_float

def build(sharded):
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    model = add_lora(load_base_model(current_profile()), LoraSettings(lora_dropout=0.0), 42)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.02)
    return model

def step(model):
    ids = torch.arange(5, 45)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())

def size(weights):
    return sum(weight.numel() * weight.element_size() for weight in weights)

torch.distributed.init_process_group("gloo")
plain, sharded, damaged = build(False), build(True), build(True)
assert all(weight.is_floating_point() for weight in sharded.parameters())  # accelerate does not shard others
sharded.gradient_checkpointing_enable({"use_reentrant": False})
mesh = init_device_mesh("cpu", (2,))
usual = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
for model, policy in ((sharded, gather_bytes(usual)), (damaged, usual)):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
assert abs(size(w.to_local() for w in sharded.parameters()) / size(plain.parameters()) - 0.5) < 0.01
for model, keeps_bits in ((sharded, True), (damaged, False)):  # the usual policy shows that the copy above does harm
    for layer in model.get_base_model().model.layers:
        layer.unshard()
    expected = dict(plain.get_base_model().model.layers.named_parameters())
    packed = {name: weight for name, weight in model.get_base_model().model.layers.named_parameters()
              if "base_layer" in name}
    assert len(packed) == 6  # q, k and v of two layers
    assert keeps_bits == all(torch.equal(weight.view(torch.uint8).flatten(), expected[name].flatten())
                             for name, weight in packed.items())
    for layer in model.get_base_model().model.layers:
        layer.reshard()
assert abs(step(plain) - step(sharded)) < 1e-6
expected = dict(plain.named_parameters())
for name, weight in sharded.named_parameters():
    if weight.requires_grad:
        torch.testing.assert_close(whole(weight.grad), expected[name].grad)
        torch.testing.assert_close(whole(weight), expected[name])
torch.distributed.destroy_process_group()
"""


def test_the_trainer_casts_nothing_that_fsdp_gathers(monkeypatch):
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16))

    def start(trainer, *args, **kwargs):
        trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))

    monkeypatch.setattr(Trainer, "__init__", start)
    AnswerTrainer(session=None)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(None, torch.float32, None)


@pytest.mark.slow
def test_sharded_equals_whole(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_in_two(script, MEDQA_PROFILE="smoke", OMP_NUM_THREADS="1")
