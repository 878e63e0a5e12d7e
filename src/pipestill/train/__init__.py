"""The trainer, its engines, the reader of its data, and the reports and results of a run."""
