"""The command line: one file per command, and `app.py`, which lists and runs them."""

import atexit
import gc

# By default Python looks for garbage cycles after every 700 new objects. That takes a fifteenth of
# a short command's time, and such a command makes next to no garbage. A last search at exit would
# take half a second where a plan was traced, because it visits every object that torch created.
gc.set_threshold(100_000)
atexit.register(gc.freeze)
