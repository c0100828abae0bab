"""The house is kept: imports run down, modules are small, one printer, and a quick start."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from imports import imported_by

PACKAGE = ROOT / "launcher" / "hpcft"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Rooms from the top down; a room may use its own floor and those below. `train` is apart: it runs
# on compute nodes, and nothing imports it.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("resume",),
    ("submit", "fits", "monitor", "collect", "report", "reference"),
    (
        "store",
        "checkpoints",
        "stage",
        "cluster",
        "failures",
        "recoveries",
        "out_of_memory",
        "attempts",
        "more_nodes",
        "queued_anew",
    ),
    ("plan", "ladder", "calibration"),
    ("refusal",),
    ("layouts", "search", "duration"),
    ("speed", "disk"),
    ("ds_config", "memory", "identity", "rates", "examples"),
    ("recipe",),
    ("validation", "sweep"),
    ("document",),
    ("tasks", "methods", "metrics", "prompting"),
    ("records",),
    ("paths", "units", "errors", "processes", "marks"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TRAIN_MAY_USE = FLOORS[FLOOR["store"] :]
# Imported as the last step of a start: by name, so that no login node ever loads it.
DOORS_TO_TRAIN = {
    ("cluster", "hpcft.training.supervision.supervisor"), ("cluster", "hpcft.scheduler.local_controller")
}  # fmt: skip

HEAVY = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "evaluate", "matplotlib", "nltk",
         "numpy", "pandas", "peft", "rouge_score", "sacrebleu", "sklearn", "submitit", "torch",
         "transformers"}  # fmt: skip


def module_of(file: Path) -> str:
    """The dotted name of a file."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def room_of(module: str) -> str:
    """The room that a module lies in: the name below `hpcft`."""
    return module.partition(".")[2].partition(".")[0]


def imports_of(file: Path) -> Iterator[str]:
    """Modules of this package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in found]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "hpcft")


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(module) for module in MODULES} - {"", "train"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module: str) -> None:
    room = room_of(module)
    for imported in imports_of(MODULES[module]):
        target = room_of(imported)
        if target in ("", room):
            continue  # the package's own version, or the same room
        if room == "train":
            assert target in {name for floor in TRAIN_MAY_USE for name in floor}, imported
            continue
        assert target != "train", f"{module} imports {imported}"
        assert FLOOR[room] <= FLOOR[target], f"{module} imports {imported}, which is above it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Of imports at module level, which would make the order of importing matter."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []
        graph[module] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "hpcft":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    graph[module].add(name if name in MODULES else str(node.module))
    done: set[str] = set()
    while graph:
        free = {name for name, needs in graph.items() if needs - {name} <= done}
        assert free, f"a circle among {sorted(graph)}"
        done |= free
        for name in free:
            del graph[name]


def test_train_is_reached_by_name_only() -> None:
    found = {
        (room_of(module), node.value)
        for module, file in MODULES.items() if room_of(module) != "train"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and node.value.startswith("hpcft.training.")
    }  # fmt: skip
    assert found == DOORS_TO_TRAIN
    assert all(name in MODULES for _, name in found)


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_small_and_say_what_they_are(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MAX_LINES
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert first.endswith((".", ":"))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "hpcft.cli.console"])
def test_console_is_the_only_printer(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        assert not (printing and node.func.id == "print"), f"line {node.lineno}"


def test_only_cluster_calls_the_scheduler() -> None:
    commands = {"sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "sacctmgr", "srun"}
    for module, file in MODULES.items():
        words = {node.value for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
        assert room_of(module) == "cluster" or not words & commands, module


# ---------------------------------------------------------------- a quick start


@pytest.mark.parametrize(
    "verb", [("--help",), ("--version",), ("submit", "--help"), ("status",), ("status", "--json"),
             ("collect",), ("recipes",), ("clusters",), ("schema",)],
    ids=" ".join,
)  # fmt: skip
def test_what_only_reads_loads_nothing_heavy(verb: tuple[str, ...], tmp_path: Path) -> None:
    modules = imported_by(*verb, cwd=tmp_path).modules
    assert "typer" in modules
    assert HEAVY & modules == set()
