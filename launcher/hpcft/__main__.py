"""Runs `hpcft` as `python -m hpcft`."""

from hpcft.cli.app import main

main()
