"""Measures the package's structure: rooms, floors, arrows, circles (`make house`).

A room is an entry of the package's folder: a subpackage, or a module that lies there by itself. An
arrow goes from a room to one that it imports, anywhere in its code: inside functions, under
TYPE_CHECKING and through `importlib` too. A room's floor is one above the highest room that it
imports. A circle is a set of rooms, or of modules, that import each other.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Collection, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "launcher" / "hpcft"

Graph = Mapping[str, set[str]]


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Returns the file of each module of a package, by its dotted name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(tree: ast.AST, known: Collection[str]) -> set[str]:
    """Returns the known modules that code imports, inside functions too.

    Args:
        tree: syntax tree of a module, or of a part of one.
        known: dotted names of the package's modules.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return found & set(known)


def module_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Returns the modules that each module imports."""
    files = modules(package)
    return {
        name: imports(ast.parse(file.read_text()), files) - {name} for name, file in files.items()
    }


def room_of(module: str) -> str:
    """Returns the room of a module: the second part of its name."""
    return module.split(".")[1]


def room_graph(graph: Graph) -> dict[str, set[str]]:
    """Returns the rooms that each room imports; the package's own `__init__` is no room."""
    inside = {module for module in graph if "." in module}
    rooms: dict[str, set[str]] = {room_of(module): set() for module in inside}
    for module in inside:
        rooms[room_of(module)] |= {room_of(target) for target in graph[module] & inside}
    return {room: targets - {room} for room, targets in rooms.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Returns the sets of nodes that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def floors(graph: Graph) -> dict[str, int]:
    """Returns each node's floor: 0 if it imports nothing; the nodes of a circle share one."""
    circle = {node: tuple(nodes) for nodes in circles(graph) for node in nodes}
    found: dict[tuple[str, ...], int] = {}

    def floor(group: tuple[str, ...]) -> int:
        if group not in found:
            below = {circle.get(t, (t,)) for node in group for t in graph[node]} - {group}
            found[group] = 1 + max(map(floor, below), default=-1)
        return found[group]

    return {node: floor(circle.get(node, (node,))) for node in graph}


def main() -> None:
    """Prints the structure of a package, the top floor first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", nargs="?", type=Path, default=PACKAGE)
    graph = module_graph(parser.parse_args().package)
    rooms = room_graph(graph)
    floor_of = floors(rooms)
    for room in sorted(rooms, key=lambda room: (-floor_of[room], room)):
        print(f"{floor_of[room]:3}  {room:11} {' '.join(sorted(rooms[room])) or '-'}")
    of_rooms, of_modules = circles(rooms), circles(graph)
    print(
        f"{len(rooms)} rooms, {1 + max(floor_of.values())} floors, "
        f"{sum(map(len, rooms.values()))} arrows, {len(of_rooms) + len(of_modules)} circles"
    )
    for circle in of_rooms + of_modules:
        print("circle:", " ".join(circle))


if __name__ == "__main__":
    main()
