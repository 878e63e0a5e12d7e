"""Runs schedules: stages, transports, executors, processes."""
