"""Schedules of models that are trained end to end."""
