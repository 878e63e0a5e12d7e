"""Schedules of blocks that train alone."""
