"""Runs the schedules of models that are trained end to end."""
