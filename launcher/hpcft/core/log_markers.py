"""Lines that hpcft writes into the logs of a job, and looks for when it reads them."""

STARTS_AGAIN = "hpcft: the training starts again"
"""By a rank, into both of its logs: what stands above is dealt with."""
SETUP_BEGINS = "hpcft: the profile's setup begins"
"""By the batch script, into its error log, before the lines of the profile."""
SETUP_ENDS = "hpcft: the profile's setup is done"
"""Likewise, when all of them have succeeded."""
