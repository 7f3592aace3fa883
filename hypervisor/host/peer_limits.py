"""What host process and domain processes have agreed on about peer links."""

SLOTS = 4096
"""Frames of one domain that one neighbour can have mapped at a time, of each kind."""
