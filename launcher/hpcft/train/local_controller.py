"""Kept for local runs that hpcft 0.1 has started: `python -m hpcft.train.local_controller`."""

import sys

from hpcft.scheduler.local_controller import main

if __name__ == "__main__":
    main(sys.argv[1])
