"""Runs the schedules of blocks that train alone."""
