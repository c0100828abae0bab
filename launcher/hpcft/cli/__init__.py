"""The command line: one file a verb; `app.py` lists them and is the only place that exits."""
