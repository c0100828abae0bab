"""Module paths that jobs queued by hpcft 0.1 name; they go with release 0.3."""
