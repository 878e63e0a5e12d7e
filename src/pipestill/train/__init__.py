"""The trainer, its data, and what a run tells."""
