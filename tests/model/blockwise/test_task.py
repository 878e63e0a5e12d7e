"""Tasks of blocks that are trained alone: what makes none."""

from itertools import pairwise

import pytest
from support.blocks import Chain
from torch import nn

import pipestill as ps
from pipestill.errors import ModelError


def chain(*widths: int) -> Chain:
    return Chain([nn.Linear(a, b) for a, b in pairwise(widths)])


def test_numbers_of_blocks_that_differ() -> None:
    with pytest.raises(ModelError, match="the student has 2 blocks, the teacher 3; cut both into as many"):
        ps.Blockwise(chain(4, 4, 4, 4), chain(4, 4, 4))


def test_everything_wrong_with_a_task_is_told_at_once() -> None:
    with pytest.raises(ModelError) as error:
        ps.Blockwise(chain(4, 4, 4), chain(4, 4, 4), loss=[ps.losses.mse], output_projectors={5: nn.Linear(1, 1)})
    assert "1 losses for 2 blocks" in str(error.value)
    assert "output_projectors of block 5; there are blocks 0 to 1" in str(error.value)


def test_shared_parameter_is_refused() -> None:
    teacher, student = chain(4, 4), chain(4, 4)
    student.b0.weight = teacher.b0.weight  # type: ignore[assignment]
    with pytest.raises(ModelError, match="share a parameter or buffer"):
        ps.Blockwise(teacher, student)


def test_weight_tied_between_student_blocks_is_refused() -> None:
    student = chain(4, 4, 4)
    student.b1.weight = student.b0.weight  # type: ignore[assignment]
    with pytest.raises(ModelError, match="shared by student stages 0 and 1"):
        ps.Blockwise(chain(4, 4, 4), student)
