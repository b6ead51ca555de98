"""Every kernel compiles for a T4 (capability 7.5) in float16 on a machine without a GPU, and fits its shared memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_BYTES = 64 * 1024  # per block on a T4
PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from medqa_lib.fast import kernels

POINTERS = {"rstd_ptr": "*fp32", "loss_ptr": "*fp32", "scale_ptr": "*fp32", "da_ptr": "*fp32", "a0_ptr": "*fp32", "a1_ptr": "*fp32",
            "a2_ptr": "*fp32", "seed_ptr": "*i32", "target_ptr": "*i64"}
SCALARS = {"eps": "fp32", "sign": "fp32", "factor": "fp32", "rows": "i32"}
LORA = dict(RANK=8, PAD=16, THRESHOLD=214748365)

def cases():
    for width, mode, n in ((2048, 1, 3), (2048, 1, 2), (2048, 1, 0), (2048, 0, 1), (5632, 2, 1), (5632, 2, 0)):
        yield kernels.group_input_kernel, dict(W=width, STRIDE=width + n * 16, MODE=mode, N=n, BT=16, BK=128, **LORA)
        if n or mode == 2:
            yield kernels.group_grad_kernel, dict(W=width, MODE=mode, N=n, NEED_INPUT=True, BT=32, BK=64, CHUNK=512, **LORA)
    for add in (False, True):
        yield kernels.add_rstd_kernel, dict(W=2048, ADD=add, BLOCK=2048)
        yield kernels.norm_grad_kernel, dict(W=2048, ADD=add, BLOCK=2048)
        yield kernels.cross_entropy_kernel, dict(V=32000, GRAD=add, BLOCK=4096)
    yield kernels.rope_kernel, dict(STRIDE=2560, HEADS=36, D=64, BLOCK=64, HALF=32)

def pointer_or_scalar(name):
    return POINTERS.get(name) or SCALARS.get(name) or "*fp16"

for kernel, constants in cases():
    signature = {name: "constexpr" if name in constants else pointer_or_scalar(name) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 75, 32))
    print(kernel.__name__, compiled.metadata.shared)
"""


@pytest.mark.slow  # 18 compilations
def test_every_kernel_compiles_for_a_t4(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [line.split() for line in done.stdout.splitlines()]
    print("largest shared memory:", max((int(size), name) for name, size in shared))
    assert {name for name, _ in shared} == {
        "group_input_kernel",
        "group_grad_kernel",
        "add_rstd_kernel",
        "norm_grad_kernel",
        "cross_entropy_kernel",
        "rope_kernel",
    }
    assert all(int(size) <= SHARED_BYTES for _, size in shared)
