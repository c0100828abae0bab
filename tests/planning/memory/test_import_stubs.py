"""Tests that a plan imports stubs only, and that the real modules load for any other use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imports import imported_by

pytestmark = pytest.mark.process

THEN = """
import torch, deepspeed, peft
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer
from transformers.masking_utils import TransformGetItemToIndex
compiled = torch.compile(lambda x: x + 1, backend="eager")
with TransformGetItemToIndex():
    print("REAL", DTensor.__module__, *compiled(torch.ones(2)).tolist())
"""

INSIDE = """
import sys, torch
from hpcft.planning.memory.import_stubs import stubbed

with stubbed():
    from torch.distributed.tensor import DTensor, Shard
    print(DTensor.__name__, Shard(0).dim)
with stubbed():
    import torch._dynamo
    marked = torch.compiler.disable(torch.compiler.allow_in_graph(len))
    print(marked is len, torch._dynamo.config.error_on_nested_fx_trace)
    print("torch._dynamo.exc" in sys.modules)
    import torch._dynamo.exc
    print(torch._dynamo.exc is sys.modules["torch._dynamo.exc"], torch._dynamo.config.verbose)
    print(issubclass(torch._dynamo.exc.Unsupported, Exception))
import torch.distributed.tensor
print(torch.distributed.tensor.DTensor.__name__, torch._dynamo.disable.__module__)
"""


def test_first_plan_imports_no_compiler_and_no_dtensor(tmp_path: Path) -> None:
    planned = imported_by("plan", "llama3_8b_winogrande_qlora", "-c", "a100-80", cwd=tmp_path,
                          then=THEN, XDG_CACHE_HOME=str(tmp_path))  # fmt: skip
    absent = {"torch._dynamo", "torch.distributed.tensor", "torch._inductor", "scipy", "datasets"}
    assert absent & planned.modules == set()
    assert "torch" in planned.modules
    assert planned.after[-1] == "REAL torch.distributed.tensor 2.0 2.0", "real after a plan"


def test_stubs_give_way_to_real_modules_when_more_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", INSIDE], capture_output=True, text=True,
                          timeout=120, check=True)  # fmt: skip
    assert done.stdout.splitlines() == [
        "StubDTensor 0", "True True", "False", "True False", "True",
        "DTensor torch._dynamo.decorators",
    ]  # fmt: skip
