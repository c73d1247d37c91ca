"""The built-in spaces, one module each: `--space NAME` finds them by the name of their module."""
