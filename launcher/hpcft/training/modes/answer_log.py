"""Answer log: answers are saved as they come, so that a restarted run continues after them.

Each rank has a file. A line holds the index of an example, and the log-likelihoods of its choices
or the generated text. Numbers are written with all digits, so that they are read back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

Answer = list[float] | str
"""Log-likelihood of each choice, summed over its tokens; or the generated text."""


def read_answers(folder: Path) -> dict[int, Answer]:
    """Reads all answers so far, by index of the example; earlier starts may have had more ranks."""
    answers: dict[int, Answer] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                index, answer = json.loads(line)
            except ValueError:
                continue  # The rank was killed while it wrote the line.
            answers[index] = answer
    return answers


class AnswerFile:
    """File to which a rank appends its answers."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Opens the file of a rank; creates it and its folder if they do not exist."""
        folder.mkdir(mode=0o700, exist_ok=True)
        self._stream: TextIO = (folder / f"{rank}.jsonl").open("a+", encoding="utf-8")
        self._stream.seek(0)
        if self._stream.read()[-1:] not in ("", "\n"):
            self._stream.write("\n")  # The last line was never finished.

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Appends the answers of a batch, by index of the example."""
        lines = [json.dumps([index, answer]) + "\n" for index, answer in answers.items()]
        self._stream.write("".join(lines))
        self._stream.flush()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()
