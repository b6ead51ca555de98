"""What a T4 lacks (capability 7.5), forbidden on a larger GPU, so that a slip is an error. Triton goes on compiling for the card that is there.

That kernels fit a T4 is another test's: test_compile_for_t4.py compiles them for 7.5 and reads their shared memory.
"""

import contextlib
from unittest import mock

import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CAPABILITY = (7, 5)
NEWER = ("flash_attention", "cudnn_attention", "varlen_attn")  # operators from capability 8.0


class Refuse(TorchDispatchMode):
    """Raises at an operator that needs capability 8.0, or that takes or gives bfloat16. A graph is seen when it is recorded."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor))
        if any(name in str(operator) for name in NEWER) or any(t.dtype == torch.bfloat16 for t in tensors):
            raise RuntimeError(f"{operator}: a T4 has no bfloat16 and no such attention")
        return out


@contextlib.contextmanager
def forbid_newer(refuse: bool = True):
    """Capability 7.5 for whoever asks, without flash, cuDNN and TF32. `refuse` looks at every operator, which takes time."""
    from medqa_lib.evaluation import generation

    if torch.cuda.is_available():
        import triton

        triton.runtime.driver.active.get_current_target()  # it asks once, and keeps whom it asks: the real function
    switches = torch.backends.cuda
    before = switches.flash_sdp_enabled(), switches.cudnn_sdp_enabled(), switches.matmul.allow_tf32
    backends = [each for each in generation.BACKENDS if each != SDPBackend.FLASH_ATTENTION]
    with (mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
          mock.patch.object(generation, "BACKENDS", backends),
          Refuse() if refuse else contextlib.nullcontext()):
        try:
            switches.enable_flash_sdp(False)
            switches.enable_cudnn_sdp(False)
            switches.matmul.allow_tf32 = False
            yield
        finally:
            switches.enable_flash_sdp(before[0])
            switches.enable_cudnn_sdp(before[1])
            switches.matmul.allow_tf32 = before[2]
