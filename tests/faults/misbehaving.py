"""Training processes that misbehave for real, though their recipe and the product are as always.

Lines of Python run after each optimizer step of a rank: a `sitecustomize.py`, which Python loads as
it starts, is on the PYTHONPATH of the profile's `environment`.
"""

from __future__ import annotations

from pathlib import Path

from builders import ROOT

PLUG = """\
import os
import sys


class Plug:
    # Waits for the training loop to be imported: then the environment is as the product has set it.

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
    """A profile in the current folder, whose ranks run some lines after each step.

    Args:
        name: of the profile, and of its file.
        lines: Python that knows `step` (of this process), `start` (how often the ranks had been
            started before) and `rank`.
        of: the shipped profile that it is like; one thread of each rank computes.
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
