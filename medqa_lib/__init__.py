"""Fine-tune a small chat model for medical question answering and evaluate it honestly.

Importing the package costs nothing: each module imports the heavy packages that it needs.
"""

import warnings

__version__ = "0.1.0"

# Libraries import tqdm.auto, which would like ipywidgets; this project's bars are plain text, so that GitHub can show them.
warnings.filterwarnings("ignore", message="IProgress not found")
# PEFT 0.21 asks transformers 5.23 in a way that is deprecated; the warning's text has a path of the machine.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
