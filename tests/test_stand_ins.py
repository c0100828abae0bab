"""Modules that a plan does without: not imported, and the real ones for all who want them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

AFTER_A_PLAN = """
import sys
from hpcft.cli.app import main
sys.argv = ["hpcft", "plan", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert ended.code == 0
heavy = ["torch._dynamo", "torch.distributed.tensor", "torch._inductor", "scipy", "datasets"]
print("LOADED", *[name for name in heavy if name in sys.modules])

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
from hpcft.memory.stand_ins import standing_in

with standing_in():
    from torch.distributed.tensor import DTensor, Shard
    print(DTensor.__name__, Shard(0).dim)
with standing_in():
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


def _ran(code: str, cwd: Path, *arguments: str) -> list[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache")}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=env, timeout=120,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.splitlines()


def test_a_first_plan_leaves_compiler_and_sharded_tensors_out(tmp_path: Path) -> None:
    printed = _ran(AFTER_A_PLAN, tmp_path, "llama3_8b_winogrande_qlora", "-c", "a100-80")
    assert [line for line in printed if line.startswith("LOADED")] == ["LOADED"]
    assert printed[-1] == "REAL torch.distributed.tensor 2.0 2.0", "for all who come after it"


def test_the_real_modules_come_when_more_is_asked(tmp_path: Path) -> None:
    assert _ran(INSIDE, tmp_path) == [
        "Sharded 0", "True True", "False", "True False", "True", "DTensor torch._dynamo.decorators",
    ]  # fmt: skip
