"""Seconds and bytes of teacher blocks and their student blocks at several row counts."""

from __future__ import annotations

import csv
import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipestill.costs import Link
from pipestill.errors import ConfigError, PlanError
from pipestill.schedule.blockwise import profile_csv

_SERVER = Link(latency_seconds=20e-6, bytes_per_second=10e9)
_SHOWN = 20  # problems of one file that are listed


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """What the forward of a teacher block and the step of its student block take, measured at several row counts.

    Args:
        name: what messages call the block
        rows: the row counts that were measured, ascending
        teacher_seconds: the teacher block's forward at each of `rows`
        student_seconds: the student block's step (forward, loss, backward and update) at each of `rows`
        input_bytes_per_row: what the block receives for each row
        parameter_bytes: what an all-reduce of the student block's gradients moves
        teacher_bytes: parameters and buffers of the teacher block; 0 where memory is not known
        state_bytes: parameters, gradients and optimizer state of the student block together
        activation_bytes_per_row: what a student's step holds at its peak for each row
        relative_standard_error: that of the least certain point; 0 where it is not known
        allreduce_ranks: sizes of the groups in which all-reduces were measured, ascending from 2; empty for none
        allreduce_seconds: for each of these sizes, by how much a student's step took longer in a group that adds up its
            gradients than where each rank is by itself
    """

    name: str
    rows: tuple[int, ...]
    teacher_seconds: tuple[float, ...]
    student_seconds: tuple[float, ...]
    input_bytes_per_row: int
    parameter_bytes: int
    teacher_bytes: int = 0
    state_bytes: int = 0
    activation_bytes_per_row: int = 0
    relative_standard_error: float = 0.0
    allreduce_ranks: tuple[int, ...] = ()
    allreduce_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise `PlanError` when points are missing, out of order or negative."""
        problems = []
        if not self.rows:
            problems.append("no measured point; expected at least one")
        elif self.rows[0] < 1 or any(after <= before for before, after in zip(self.rows, self.rows[1:], strict=False)):
            problems.append(f"rows are {list(self.rows)}, expected ascending counts from 1")
        for role in ("teacher_seconds", "student_seconds"):
            seconds = getattr(self, role)
            if len(seconds) != len(self.rows):
                problems.append(f"{len(self.rows)} row counts with {len(seconds)} {role}; expected as many")
            problems += [f"{role} holds {s}, expected 0 or more" for s in seconds if not 0 <= s < float("inf")]
        for name in ("input_bytes_per_row", "parameter_bytes", *profile_csv.MEMORY, "relative_standard_error"):
            amount = getattr(self, name)
            if not 0 <= amount < float("inf"):
                problems.append(f"{name} is {amount}, expected 0 or more")
        groups = self.allreduce_ranks
        if len(groups) != len(self.allreduce_seconds):
            problems.append(f"{len(groups)} sizes of groups with {len(self.allreduce_seconds)} allreduce_seconds")
        if any(size <= before for before, size in pairwise((1, *groups))):
            problems.append(f"allreduce_ranks are {list(groups)}, expected ascending sizes from 2")
        problems += [
            f"allreduce_seconds holds {s}, expected 0 or more" for s in self.allreduce_seconds if not 0 <= s < float("inf")
        ]
        if problems:
            raise PlanError(f"times of block '{self.name}': {'; '.join(problems)}")

    def teacher(self, rows: float) -> float:
        """Seconds of the teacher block's forward; between measured points a straight line.

        Outside of them the line of the nearest two points goes on, though never below 0; one point alone is taken as
        proportional. No rows cost nothing.

        Args:
            rows: how many rows the forward takes
        """
        return _on_the_line(rows, self.rows, self.teacher_seconds)

    def student(self, rows: float) -> float:
        """Seconds of the student block's step (forward, loss, backward and update), on lines as in `teacher`.

        Args:
            rows: how many rows the step takes
        """
        return _on_the_line(rows, self.rows, self.student_seconds)


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """The costs of blockwise training: the times of all blocks, and the links between ranks.

    Args:
        blocks: the times of every block, in the order of the models
        link: the link between any two ranks; the default is that of a server with several GPUs, 10 GB/s after 20
            microseconds
        batch: the rows of a whole batch, if they are known; files do not hold them
    """

    blocks: tuple[BlockTimes, ...]
    link: Link = _SERVER
    batch: int | None = None

    def __post_init__(self) -> None:
        """Raise `PlanError` when there is no block, or a batch has no rows."""
        problems = [] if self.blocks else ["no block; expected at least one"]
        if self.batch is not None and self.batch < 1:
            problems.append(f"a batch of {self.batch} rows; expected at least 1")
        groups = {block.allreduce_ranks: block.name for block in self.blocks}
        if len(groups) > 1:
            shown = ", ".join(f"{list(sizes)} in block '{name}'" for sizes, name in groups.items())
            problems.append(f"all-reduces are measured for groups of {shown}; expected the same sizes in all blocks")
        if problems:
            raise PlanError(f"block profile: {'; '.join(problems)}")

    @property
    def memory_known(self) -> bool:
        """Whether any block says what it holds in memory."""
        return any(getattr(block, column) for block in self.blocks for column in profile_csv.MEMORY)

    def output_bytes_per_row(self, block: int) -> int:
        """Bytes of a teacher block's output for each row; the last block's outputs are taken to be as large as its inputs.

        Args:
            block: the number of the block, from 0
        """
        return self.blocks[min(block + 1, len(self.blocks) - 1)].input_bytes_per_row

    def allreduce_seconds(self, block: int, k: int) -> float:
        """Seconds of an all-reduce of a student block's gradients.

        As measured, on a straight line between measured sizes of groups; above the largest it grows with the 2 (k - 1)
        messages of a ring. Where nothing was measured, what a ring takes (Pipe-BD, Jang et al., DATE 2023).

        Args:
            block: the number of the block, from 0
            k: how many ranks share its batches; one rank has nothing to add up
        """
        if k == 1:
            return 0.0
        sizes, seconds = self.blocks[block].allreduce_ranks, self.blocks[block].allreduce_seconds
        if sizes:
            most = sizes[-1]
            return seconds[-1] * (k - 1) / (most - 1) if k > most else _on_the_line(k, (1, *sizes), (0.0, *seconds))
        moved = 2 * (k - 1) / k * self.blocks[block].parameter_bytes
        return moved / self.link.bytes_per_second + 2 * (k - 1) * self.link.latency_seconds

    def relay_seconds(self, block: int, batch: float, k: int) -> float:
        """Seconds in which one of k ranks receives its share of a block's input.

        Pipe-BD (Jang et al., DATE 2023) has the same term, but charges the whole batch for any k.

        Args:
            block: the number of the block, from 0
            batch: the rows of a whole batch
            k: how many ranks share the batch equally
        """
        return self.link.seconds(self.blocks[block].input_bytes_per_row * (batch / k))

    def scaled(self, factor: float, *, transfers: bool = False) -> BlockProfile:
        """The profile of a slower device (or a faster one).

        Args:
            factor: how many times as long every piece of work takes
            transfers: whether links and measured all-reduces take as many times as long, too
        """
        slower = factor if transfers else 1.0
        blocks = [
            dataclasses.replace(
                block,
                teacher_seconds=tuple(s * factor for s in block.teacher_seconds),
                student_seconds=tuple(s * factor for s in block.student_seconds),
                allreduce_seconds=tuple(s * slower for s in block.allreduce_seconds),
            )
            for block in self.blocks
        ]
        was = self.link
        link = Link(
            was.latency_seconds * slower, was.bytes_per_second / slower, was.wake_seconds * slower,
            was.handling_seconds * slower, was.handling_bytes_per_second / slower,
        )  # fmt: skip
        return dataclasses.replace(self, blocks=tuple(blocks), link=link)

    def with_allreduces(self, ranks: Sequence[int], seconds: Sequence[Sequence[float]]) -> BlockProfile:
        """The profile of the same blocks with measured all-reduces.

        Args:
            ranks: the sizes of the groups that were measured, ascending from 2
            seconds: for each block, how long its all-reduce took in a group of each of these sizes
        """
        blocks = [
            dataclasses.replace(block, allreduce_ranks=tuple(ranks), allreduce_seconds=tuple(mine))
            for block, mine in zip(self.blocks, seconds, strict=True)
        ]
        return dataclasses.replace(self, blocks=tuple(blocks))

    @classmethod
    def load(cls, path: str | Path) -> BlockProfile:
        """Read a CSV file with one line for each block and row count.

        Columns: block (from 0), rows, teacher_forward_seconds, student_step_seconds, input_bytes_per_row,
        parameter_bytes, and optionally the other fields of `BlockTimes` (of all-reduces allreduce_2_seconds for groups of
        two ranks, and so on), and link_latency_seconds with link_bytes_per_second.

        Args:
            path: the file, as `save` writes it

        Raises:
            ConfigError: lists everything that is wrong in the file
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"cannot read block profile '{path}': {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"block profile '{path}' is not text: {error}") from None
        problems: list[str] = []
        try:
            blocks, link = profile_csv.read(text, problems)
        except csv.Error as error:
            problems.append(f"not CSV: {error}")
        if problems:
            shown = problems[:_SHOWN]
            if len(problems) > _SHOWN:
                shown.append(f"and {len(problems) - _SHOWN} more")
            raise ConfigError(f"block profile '{path}':\n  " + "\n  ".join(shown))
        return cls(tuple(BlockTimes(**block) for block in blocks), Link(**link) if link else _SERVER)

    def save(self, path: str | Path) -> None:
        """Write the blocks as CSV, with optional columns only where they say something, such as how fast links really are.

        Args:
            path: the file to write; one that is there is replaced

        Raises:
            ConfigError: the file cannot be written
        """
        defaults = {item.name: item.default for item in dataclasses.fields(BlockTimes)}
        measured = self.link.latency_seconds > 0 and self.link.bytes_per_second < float("inf") and self.link != _SERVER
        link = dataclasses.asdict(self.link) if measured else {}
        try:
            with Path(path).open("w", encoding="utf-8", newline="") as file:
                file.write(profile_csv.write([dataclasses.asdict(block) for block in self.blocks], defaults, link))
        except OSError as error:
            raise ConfigError(f"cannot write block profile '{path}': {error.strerror}") from None


def _on_the_line(rows: float, measured: Sequence[int], seconds: Sequence[float]) -> float:
    """The seconds at `rows` on straight lines through the measured points, as `BlockTimes.teacher` says."""
    if rows == 0:
        return 0.0
    if len(measured) == 1:
        return seconds[0] * (rows / measured[0])
    after = min(max(bisect_left(measured, rows), 1), len(measured) - 1)
    if measured[after] == rows:
        return seconds[after]
    before = after - 1
    slope = (seconds[after] - seconds[before]) / (measured[after] - measured[before])
    return max(0.0, seconds[before] + (rows - measured[before]) * slope)
