"""The answers file: generated answers as JSON lines that survive a crash or a disconnect."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

SCALES = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Answer:
    """One answer. `stopped`: it ended with EOS, not at the token limit. `tokens`: its length, without EOS."""

    text: str
    stopped: bool
    tokens: int


class AnswerStore:
    """Append-only JSON lines, one answer of one model per line with its key.

    A torn last line is not read, and is cut off before the next write. Under `accelerate launch` each process
    writes a file of its own (`answers.jsonl`, `answers.1.jsonl`, ...) and reads all.
    """

    def __init__(self, path: Path | str, adapter_dir: Path | None = None, base: str = ""):
        """The answers of the untuned model, or of the one with the adapter in `adapter_dir`.

        Args:
            base: names the base model's weights (`results.identify_weights`).
        """
        self.path, self.model = Path(path), [base, hash_adapter(adapter_dir)]
        self._answers: dict[str, Answer] = {}
        for file in (self.path, *self.path.parent.glob(f"{self.path.stem}.[0-9]*.jsonl")):
            for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else ():
                with contextlib.suppress(ValueError):  # a damaged line: its answer is generated again
                    key, *answer = json.loads(line)
                    self._answers[key] = Answer(*answer)

    def _key(self, prompt: Sequence[int], settings: dict) -> str:
        """Names an answer: the model, the prompt's token ids and how it was decoded."""
        content = json.dumps([self.model, [*prompt], settings], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def get(self, prompt: Sequence[int], settings: dict) -> Answer | None:
        """The answer to these token ids, decoded with these settings."""
        return self._answers.get(self._key(prompt, settings))

    def append(self, answers: dict[Sequence[int], Answer], settings: dict, process: int = 0) -> None:
        """Write a batch, prompt -> answer, with one synced write."""
        new = {self._key(prompt, settings): answer for prompt, answer in answers.items()}
        lines = "".join(json.dumps([key, *astuple(answer)]) + "\n" for key, answer in new.items())
        file = self.path.with_suffix(f".{process}.jsonl") if process else self.path
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(lines.encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._answers |= new


def hash_adapter(folder: Path | None) -> str:
    """Short SHA-256 of an adapter's weights and of the settings that scale them; "base" without an adapter.

    The rest of its configuration, such as the base model's folder, differs between machines.
    """
    if folder is None:
        return "base"
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = json.dumps({name: settings.get(name) for name in SCALES})
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(scale.encode() + weights).hexdigest()[:16]
