"""The workload of a distillation: a teacher that is trained once or read, its student, and the same student without a teacher."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from pipestill.losses import DistillationLoss, SupervisedLoss
from pipestill.model.blocks import BlockModel
from pipestill.model.tasks import Distillation, Supervised, Task
from pipestill.recipes.end_to_end import EndToEndWorkload, check_plan, save_plan
from pipestill.recipes.evaluate import evaluate
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.runner import Runner
from pipestill.recipes.training import Training
from pipestill.recipes.weights import load_into, num_parameters
from pipestill.runtime.world import in_main_process
from pipestill.train.result import Result


@dataclass(frozen=True, kw_only=True)
class DistillationWorkload(EndToEndWorkload):
    """Everything that distilling one student takes. Builders give freshly initialised models, the same every time.

    Args:
        build_teacher: makes the teacher
        build_student: makes the student
        loss: the distillation's loss
        supervised_loss: the loss of the teacher's training, and of the student's without a teacher
        validation_loader: batches that models are validated with
        teacher_training: how the teacher is trained
        prepare: initialises the student from the teacher, once that is what it will be; the student without a teacher stays as
            it was built (default: nothing)
        teacher_origin: where the teacher comes from if it is not trained here, for the summary (default: it is trained here)
    """

    build_teacher: Callable[[], nn.Module]
    build_student: Callable[[], nn.Module]
    loss: DistillationLoss
    supervised_loss: SupervisedLoss
    validation_loader: DataLoader[Any]
    teacher_training: Training
    prepare: Callable[[nn.Module, nn.Module], None] | None = None
    teacher_origin: str | None = None

    def task(self) -> Distillation:
        """Build the distillation of fresh models."""
        return self.distil(self.build_teacher(), self.build_student())

    def distil(self, teacher: nn.Module, student: nn.Module) -> Distillation:
        """Build the distillation of a teacher that is ready into a student that was built; `prepare` is called here."""
        if self.prepare is not None:
            self.prepare(teacher, student)
        return Distillation(teacher, student, self.loss)

    def preflight(self, options: RunOptions) -> None:
        """Raise what can be seen to be wrong before anything is trained."""
        task = self.task()
        check_plan(self.trainer(task, options), self.loader)
        if options.teacher is not None:
            load_into(task.teacher_blocks.model, options.teacher)

    def run(self, options: RunOptions, runner: Runner) -> dict[str, Any]:
        """Train the teacher once (its weights stay in teacher/export), the student, and the student without a teacher."""
        teacher, student, alone = self.build_teacher(), self.build_student(), self.build_student()

        def train(name: str, task: Task, training: Training, inner: str | None) -> Result:
            return runner.train(
                name, partial(self._trainer_of, task, training, options), self.loader, epochs=training.epochs,
                validate=self.validation_loader, inner=inner,
            )  # fmt: skip

        origin = options.teacher or self.teacher_origin
        if origin is None:
            of_teacher = train("teacher", Supervised(teacher, self.supervised_loss), self.teacher_training, "teacher").metrics
        else:
            if options.teacher is not None:
                load_into(teacher, options.teacher)
            elif in_main_process():
                print(f"the teacher is not trained here: {origin}", file=sys.stderr)
            call = BlockModel(teacher)  # as a pipeline runs it: blocks may take other inputs than `forward`
            of_teacher = evaluate(teacher, self.metrics, self.validation_loader, runner.device, call)
        main = train("student", self.distil(teacher, student), self.student_training, None)
        save_plan(main, runner.directory)
        lone = train("student alone", Supervised(alone, self.supervised_loss), self.student_training, "student_alone")
        runner.write_config(student)
        read_from = {} if origin is None else {"read_from": origin}
        metrics = {
            "student": main.metrics, "teacher": {**read_from, **of_teacher}, "student_alone": lone.metrics,
            "parameters": {"student": num_parameters(student), "teacher": num_parameters(teacher)},
        }  # fmt: skip
        taught = {} if self.teacher_origin is None else {"teacher": origin}
        return {**main.summary(), "metrics": metrics, **taught}
