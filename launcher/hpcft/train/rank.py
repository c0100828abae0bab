"""Kept for jobs queued by hpcft 0.1, which run `python -m hpcft.train.rank`."""

import sys

from hpcft.training.worker import main

if __name__ == "__main__":
    main(*sys.argv[1:])
