"""Records docs/images/first-result-*.svg from real commands: plan, submit and collect quickstart.

    python docs/record.py

The run is made in a temporary folder. Its figures are those of the machine that records it.
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
THEMES = {"light": DEFAULT_TERMINAL_THEME, "dark": SVG_EXPORT_THEME}
COLUMNS = 100
HPCFT = str(Path(sys.executable).with_name("hpcft"))
# What is shown, and what runs: the recorded commands, and a wait between them that is not shown.
COMMANDS = (
    (("plan", "quickstart", "--cluster", "local"), True),
    (("submit", "quickstart", "--cluster", "local"), True),
    (("status", "--watch"), False),
    (("collect", "quickstart"), True),
)


def on_terminal(arguments: tuple[str, ...], folder: str) -> str:
    """Returns what a command prints on a terminal, with its colours."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [HPCFT, *arguments], cwd=folder, env=environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    output = io.BytesIO()
    try:
        while block := os.read(ours, 4096):
            output.write(block)
    except OSError:  # Linux says so where the other end is closed
        pass
    os.close(ours)
    if process.wait():
        raise SystemExit(f"hpcft {' '.join(arguments)} failed:\n{output.getvalue().decode()}")
    return output.getvalue().decode().replace("\r\n", "\n")


def main() -> None:
    """Runs the commands and writes a picture for each theme."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for arguments, is_shown in COMMANDS:
            print("hpcft", *arguments, file=sys.stderr)
            text = on_terminal(arguments, folder)
            if is_shown:
                parts.append(f"\x1b[1m$ hpcft {' '.join(arguments)}\x1b[0m\n{text.strip()}\n")
    shown = Text.from_ansi("\n".join(parts))
    IMAGES.mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(shown)
        svg = console.export_svg(title="hpcft", theme=theme, unique_id=f"hpcft-{name}")
        # The font is the reader's own: rich's would be fetched from the network.
        svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
        (IMAGES / f"first-result-{name}.svg").write_text(svg)


if __name__ == "__main__":
    main()
