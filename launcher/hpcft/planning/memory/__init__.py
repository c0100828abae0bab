"""Memory rules: each a small function with its formula, unit and source."""
