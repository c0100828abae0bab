"""Writes docs/reference/modules.md and docs/concepts/packages.svg; `make docs` runs it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

import house  # noqa: E402

MODULES_PAGE = DOCS / "reference" / "modules.md"
DRAWING = DOCS / "concepts" / "packages.svg"
# Entries of the package that are not part of the story: they start it, or are kept for old jobs.
HIDDEN = {"__main__", "cluster", "train"}
BOX_W, BOX_H, GAP_X, GAP_Y = 130, 34, 40, 34


def first_line(node: ast.AST) -> str:
    """Returns the first line of a docstring; empty where there is none."""
    assert isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    return (ast.get_docstring(node) or "").split("\n")[0]


def modules_page() -> str:
    """Returns the index of modules and public names, with the first line of each docstring."""
    lines = [
        "# Reference: modules",
        "",
        "Every module of the package, in the order of its imports from the top down, with its",
        "public classes and functions. Made from the docstrings by `make docs`.",
    ]
    files = house.modules()
    floor_of = house.floors(house.room_graph(house.module_graph()))
    rooms = sorted(set(floor_of) - HIDDEN, key=lambda room: (-floor_of[room], room))
    for room in rooms:
        package = ast.parse(files[f"hpcft.{room}"].read_text())
        lines += ["", f"## {room}", "", first_line(package), ""]
        for name, file in files.items():
            if not name.startswith(f"hpcft.{room}."):
                continue
            tree = ast.parse(file.read_text())
            lines.append(f"- **{name.removeprefix('hpcft.')}**: {first_line(tree)}")
            for node in tree.body:
                public = isinstance(node, ast.ClassDef | ast.FunctionDef)
                if public and not node.name.startswith("_") and first_line(node):
                    lines.append(f"    - `{node.name}`: {first_line(node)}")
    return "\n".join(lines) + "\n"


def drawing() -> str:
    """Returns an SVG of the packages: those that import others above them, an arrow an import."""
    rooms = {r: t - HIDDEN for r, t in house.room_graph(house.module_graph()).items()}
    rooms = {room: targets for room, targets in rooms.items() if room not in HIDDEN}
    floor_of = house.floors(rooms)
    top = max(floor_of.values())
    rows = [sorted(r for r in rooms if floor_of[r] == floor) for floor in range(top, -1, -1)]
    width = max(map(len, rows)) * (BOX_W + GAP_X) + 2 * GAP_X
    height = len(rows) * (BOX_H + GAP_Y) + GAP_Y
    at: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (BOX_W + GAP_X) + GAP_X) / 2
        for place, room in enumerate(row):
            at[room] = left + place * (BOX_W + GAP_X), GAP_Y / 2 + number * (BOX_H + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="14" role="img" aria-label="Packages of hpcft">',
        "<style>rect{fill:#f3f6fa;stroke:#4878a8}text{fill:#123}path{stroke:#8aa;fill:none}"
        "@media(prefers-color-scheme:dark){rect{fill:#1d2733}text{fill:#dde}path{stroke:#567}}"
        "</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0 8 4 0 8z" style="fill:#8aa"/></marker>'
        "</defs>",
    ]
    for room, targets in sorted(rooms.items()):
        x, y = at[room]
        for target in sorted(targets):
            to_x, to_y = at[target]
            near = floor_of[room] - floor_of[target] == 1
            bend = 0 if near else (GAP_X + 12 * (floor_of[room] - floor_of[target]))
            middle_x = (x + to_x) / 2 + BOX_W / 2 + (bend if hash_free(room, target) else -bend)
            parts.append(
                f'<path d="M{x + BOX_W / 2:.0f} {y + BOX_H:.0f} '
                f"Q{middle_x:.0f} {(y + BOX_H + to_y) / 2:.0f} "
                f'{to_x + BOX_W / 2:.0f} {to_y:.0f}" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in at.items():
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_W}" height="{BOX_H}" rx="6"/>')
        parts.append(
            f'<text x="{x + BOX_W / 2:.0f}" y="{y + 22:.0f}" text-anchor="middle">{room}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def hash_free(room: str, target: str) -> bool:
    """Returns on which side an arrow bends: the same in every run."""
    return sum(map(ord, room + target)) % 2 == 0


if __name__ == "__main__":
    MODULES_PAGE.write_text(modules_page())
    DRAWING.write_text(drawing())
