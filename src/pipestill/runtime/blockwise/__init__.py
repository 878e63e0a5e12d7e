"""Runs the schedules of blockwise training."""
