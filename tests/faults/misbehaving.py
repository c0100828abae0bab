"""Workers that misbehave in a real run, whose recipe is as usual.

Lines of Python run after each optimizer step of a rank. They are in a `sitecustomize.py`, which
Python loads at its start, on the PYTHONPATH of the profile's `environment`.
"""

from __future__ import annotations

from pathlib import Path

from builders import ROOT

PLUG = """\
import os
import sys


class Plug:
    # Waits until the fine-tuning mode is imported: then hpcft has set the environment.

    def find_spec(self, name, path=None, target=None):
        if name == "hpcft.training.modes.finetune":
            sys.meta_path.remove(self)
            from torch.optim import optimizer

            self.step = 0
            optimizer.register_optimizer_step_post_hook(self.stepped)
        return None

    def stepped(self, *_):
        self.step += 1
        exec(LINES, {
            "os": os, "step": self.step, "start": int(sys.argv[2]),
            "rank": int(os.environ.get("RANK", "0")),
        })


if "hpcft.training.worker" in sys.orig_argv:
    sys.meta_path.insert(0, Plug())
"""


def profile(name: str, lines: str, of: str = "testbed") -> Path:
    """Writes a profile into the current folder, whose ranks run some lines after each step.

    Args:
        name: name of the profile and of its file.
        lines: Python with the variables `step` (of this process), `start` (number of recoveries
            before this start) and `rank`.
        of: shipped profile to copy; each rank computes with one thread.
    """
    plug = Path(f"plug-{name}").absolute()
    plug.mkdir()
    (plug / "sitecustomize.py").write_text(f"{PLUG}\n\nLINES = {lines!r}\n")
    text = (ROOT / f"slurm/{of}.yaml").read_text().replace(f"name: {of}", f"name: {name}")
    if "environment:\n" not in text:
        text += 'environment:\n  OMP_NUM_THREADS: "1"\n'
    file = Path(f"{name}.yaml")
    file.write_text(text.replace("environment:\n", f'environment:\n  PYTHONPATH: "{plug}"\n'))
    return file
