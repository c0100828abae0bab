"""`python -m hpcft` is `hpcft`."""

from hpcft.cli.app import main

main()
