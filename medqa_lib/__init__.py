"""Fine-tune a small chat model for medical question answering and evaluate it honestly.

Importing the package costs nothing: each module imports the heavy packages that it needs.
"""

__version__ = "0.1.0"
