"""Kept for jobs queued by hpcft 0.1, which run `python -m hpcft.train.requeue`."""

import sys

from hpcft.training.requeue import main

if __name__ == "__main__":
    main(*sys.argv[1:])
