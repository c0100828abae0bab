"""The package keeps its structure: imports run down, no circles, small modules, a quick start."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import house
from imports import imported_by

# The packages from the top down. A package imports those on lower floors only: anywhere in its
# code, inside functions too. The uppermost are module paths that queued jobs still name.
FLOORS = (
    ("cluster", "train", "__main__"),
    ("cli",),
    ("jobs",),
    ("training",),
    ("recovery",),
    ("planning", "staging"),
    ("config",),
    ("tasks",),
    ("methods", "scheduler"),
    ("metrics",),
    ("core",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST = {"rooms": 16, "floors": 10, "arrows": 60}
MAX_LINES = 400

HEAVY = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "evaluate", "matplotlib", "nltk",
         "numpy", "pandas", "peft", "rouge_score", "sacrebleu", "sklearn", "submitit", "torch",
         "transformers"}  # fmt: skip

MODULES = house.modules()
GRAPH = house.module_graph()
ROOMS = house.room_graph(GRAPH)


def test_every_room_has_a_floor() -> None:
    assert set(ROOMS) == set(FLOOR)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "hpcft"])
def test_imports_run_down(module: str) -> None:
    room = house.room_of(module)
    for imported in GRAPH[module] - {"hpcft"}:
        target = house.room_of(imported)
        assert room == target or FLOOR[room] < FLOOR[target], f"{module} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert house.circles(GRAPH) == []


def test_structure_is_as_small_as_planned() -> None:
    assert len(ROOMS) <= MOST["rooms"]
    assert 1 + max(house.floors(ROOMS).values()) <= MOST["floors"]
    assert sum(map(len, ROOMS.values())) <= MOST["arrows"]


def test_nothing_imports_the_old_module_paths() -> None:
    assert not [room for room, targets in ROOMS.items() if targets & {"train", "cluster"}]


@pytest.mark.parametrize(
    "hidden",
    ["def f():\n    from made import b", "if TYPE_CHECKING:\n    import made.b",
     "import importlib\nimportlib.import_module('made.b')"],
    ids=["in a function", "for types", "by name"],
)  # fmt: skip
def test_circles_are_found_wherever_the_import_stands(tmp_path: Path, hidden: str) -> None:
    package = tmp_path / "made"
    package.mkdir()
    for name, text in (("__init__", ""), ("a", hidden), ("b", "from made.a import x")):
        (package / f"{name}.py").write_text(text)
    graph = house.module_graph(package)
    assert house.circles(graph) == [["made.a", "made.b"]]
    assert house.floors(graph)["made.a"] == house.floors(graph)["made.b"]


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_small_and_begin_with_a_sentence(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MAX_LINES
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert first.endswith((".", ":"))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "hpcft.cli.console"])
def test_console_is_the_only_printer(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        assert not (printing and node.func.id == "print"), f"line {node.lineno}"


def test_only_the_scheduler_package_calls_slurm() -> None:
    commands = {"sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "sacctmgr", "srun"}
    for module, file in MODULES.items():
        words = {node.value for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
        assert module.startswith("hpcft.scheduler.") or not words & commands, module


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
