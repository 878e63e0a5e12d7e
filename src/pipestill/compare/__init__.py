"""Strategies side by side in one run."""
