"""Schedules of blockwise training, in which every student block is trained on outputs of the teacher's blocks."""
