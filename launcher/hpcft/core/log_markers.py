"""Marker lines that hpcft writes into the logs of a job, and looks for when it reads them."""

RESTART_LINE = "hpcft: the training starts again"
"""Written by each rank into both of its logs at a restart: failures above it are past."""
SETUP_BEGIN_LINE = "hpcft: the profile's setup begins"
"""Written by the batch script into its error log, before the setup lines of the profile."""
SETUP_END_LINE = "hpcft: the profile's setup is done"
"""Written by the batch script into its error log, after all setup lines have succeeded."""
