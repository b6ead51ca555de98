"""The answers file: generated answers as JSON lines that survive a crash or a disconnect."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    """One answer. `stopped`: it ended with EOS, not at the token limit. `tokens`: its length, without EOS."""

    text: str
    stopped: bool
    tokens: int


class AnswerStore:
    """Append-only JSON lines, one answer a line, each with its key and a checksum.

    Under `accelerate launch` each process writes a file of its own (`answers.jsonl`, `answers.part1.jsonl`, ...) and reads all.

    Args:
        path: the file; its folder is made on the first write.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.damaged: list[str] = []
        self._answers: dict[tuple, Answer] = {}
        for file in [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.part*{self.path.suffix}"))]:
            if file.exists():
                self._read(file)
        if self.damaged:
            warnings.warn(f"{len(self.damaged)} damaged lines are ignored and their answers generated again: "
                          f"{', '.join(self.damaged[:5])}", stacklevel=2)

    def _read(self, file: Path) -> None:
        """Lines up to the last line break: what follows it is a write that a crash cut off."""
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
            try:
                content, checksum = json.loads(line)
                if zlib.crc32(canonical_json(content)) != checksum:
                    raise ValueError("wrong checksum")
                self._answers[tuple(content["key"])] = Answer(**content["answer"])
            except (ValueError, TypeError, KeyError):
                self.damaged.append(f"{file.name}:{number}")

    def get(self, key: tuple) -> Answer | None:
        """The answer kept under this key."""
        return self._answers.get(key)

    def append(self, answers: dict[tuple, Answer], process: int = 0) -> None:
        """Write a batch with one synced write. A torn last line is cut off first."""
        if not answers:
            return
        file = self.path if process == 0 else self.path.with_suffix(f".part{process}{self.path.suffix}")
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for key, answer in answers.items():
            content = {"key": list(key), "answer": asdict(answer)}
            lines.append(canonical_json([content, zlib.crc32(canonical_json(content))]) + b"\n")
        with open(file, "a+b") as stream:
            _cut_torn_line(stream)
            stream.write(b"".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        self._answers |= answers


def canonical_json(value) -> bytes:
    """One line of JSON, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def _cut_torn_line(stream) -> None:
    """Truncate the open file to just after its last line break."""
    stream.seek(0)
    stream.truncate(stream.read().rfind(b"\n") + 1)


def hash_adapter(folder: Path | None) -> str:
    """Short SHA-256 of an adapter's weights and of the settings that scale them; "base" without an adapter.

    The rest of its configuration, such as the base model's folder, differs between machines and changes no answer.
    """
    if folder is None:
        return "base"
    settings = json.loads((Path(folder) / "adapter_config.json").read_text())
    scale = {name: settings.get(name) for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
    return hashlib.sha256(canonical_json(scale) + (Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
