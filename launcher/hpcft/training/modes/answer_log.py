"""Answers as they come, in a file of each rank, so that a run that starts again goes on.

A line is an example's index with the log-likelihood of each choice, or with the generated text.
Numbers are written with all their digits: read back they are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

Answer = list[float] | str
"""Log-likelihood of each choice, summed over its tokens; or the text that was generated."""


def read_answers(folder: Path) -> dict[int, Answer]:
    """The answers of earlier attempts by example, whatever number of ranks they had."""
    found: dict[int, Answer] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                index, answer = json.loads(line)
            except ValueError:
                continue  # the rank was killed while it wrote
            found[index] = answer
    return found


class AnswerFile:
    """The file that a rank adds its answers to."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._stream: TextIO = (folder / f"{rank}.jsonl").open("a+")
        self._stream.seek(0)
        if self._stream.read()[-1:] not in ("", "\n"):
            self._stream.write("\n")  # behind a line that was never finished

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Writes the answers of a batch, all or none of which a later start finds."""
        lines = [json.dumps([index, answer]) + "\n" for index, answer in answers.items()]
        self._stream.write("".join(lines))
        self._stream.flush()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()
