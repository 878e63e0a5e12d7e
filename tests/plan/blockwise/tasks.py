"""Blocks whose seconds and bytes are easily added up."""

from pipestill.schedule.blockwise.profile import BlockTimes


def line(teacher: float, student: float, *, held: int = 0) -> BlockTimes:
    """A block with seconds proportional to rows, and with bytes that are easily added up."""
    return BlockTimes("block", (1,), (teacher,), (student,), 10, 100, held, 10 * held, held)
