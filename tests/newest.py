"""Prints the project's dependencies without their upper bounds, for `make test-newest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def without_upper_bounds(requirement: str) -> str:
    """Returns a requirement of which only the lower bounds and the marker are left."""
    return re.sub(r",?<[^,;]+", "", requirement)


if __name__ == "__main__":
    project = tomllib.loads(PROJECT.read_text())["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        if not requirement.startswith("torch>"):  # gigabytes of CUDA: make installs the tested one
            print(without_upper_bounds(requirement))
