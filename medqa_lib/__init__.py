"""Fine-tune a small chat model for medical question answering and evaluate it honestly.

Importing the package costs nothing: each module imports the heavy packages that it needs.
"""

import logging
import os
import warnings

__version__ = "0.1.0"

# Read when torch is imported. By default a thread that waits for another one spins. Where two threads shared
# two cores with other processes, a training step of the small model took 20 s, and 5 s without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Libraries import tqdm.auto, which asks for ipywidgets; this project's bars are plain text that GitHub shows.
warnings.filterwarnings("ignore", message="IProgress not found")
# PEFT 0.21 asks transformers 5.23 in a way that is deprecated; the warning's text has a path of the machine.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

# Logger -> words of a warning that this project does not need.
CHATTER = {
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward",  # proposes to fetch native code at run time
    "transformers.integrations.bitsandbytes": "are dequantized",  # what model.load_merged does on purpose
    "torchao": "Failed to load",  # extensions for other builds of torch
    "torch.utils._pytree": "natively supported",
    "transformers.tokenization_utils_tokenizers": "clean_up_tokenization_spaces",  # not for BPE
}
for _name, _words in CHATTER.items():
    logging.getLogger(_name).addFilter(lambda record, words=_words: words not in str(record.msg))
