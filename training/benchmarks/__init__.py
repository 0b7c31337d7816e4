"""What is measured, each a command: see the docstring of each module."""
