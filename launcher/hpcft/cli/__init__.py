"""The command line: one file a verb; `app.py` lists them and is the only place that exits."""

import atexit
import gc

# Python looks for cycles of garbage after each 700 new objects: a fifteenth of a short command's
# time, which makes next to no garbage. And once more as it ends: where a plan was traced that is a
# look of half a second through all that torch brought.
gc.set_threshold(100_000)
atexit.register(gc.freeze)
