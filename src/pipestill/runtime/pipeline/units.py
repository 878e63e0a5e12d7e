"""Which rows of a batch the units of a pipeline's step take."""

from __future__ import annotations

from pipestill.runtime.batch import microbatch_rows
from pipestill.schedule import Action, Op, Role
from pipestill.schedule.pipeline.structure import PipelineStructure


class Units:
    """The rows of every unit: a microbatch in one view (see `PipelineStructure`). An action's `microbatch` counts them."""

    def __init__(self, structure: PipelineStructure) -> None:
        self.structure = structure

    def num_views(self, role: Role) -> int:
        """In how many views a model runs a microbatch."""
        return self.structure.views if role is Role.STUDENT else self.structure.teacher_views

    def view(self, action: Action) -> int:
        """The view of an action's unit."""
        assert action.microbatch is not None
        return action.microbatch % self.num_views(action.role)

    def slice_of(self, action: Action, batch_rows: int) -> slice:
        """Where the rows of an action's unit are in a batch; for a loss, those of everything that it takes."""
        assert action.microbatch is not None
        if action.op is Op.LOSS and self.structure.batch_loss:
            return slice(0, batch_rows)
        views = 1 if action.op is Op.LOSS else self.num_views(action.role)
        return microbatch_rows(batch_rows, self.structure.num_microbatches)[action.microbatch // views]

    def num_rows(self, action: Action, batch_rows: int) -> int:
        """How many rows of a batch an action is about."""
        part = self.slice_of(action, batch_rows)
        return int(part.stop - part.start)

    def last(self, role: Role, batch_rows: int) -> int:
        """The last unit of a step that has rows: there may be fewer rows than microbatches."""
        return min(self.structure.num_microbatches, batch_rows) * self.num_views(role) - 1
