"""Schedules of blockwise training: every student block is trained alone, on outputs of the teacher's blocks."""
