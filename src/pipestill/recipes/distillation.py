"""The workload of a distillation: a teacher that is trained once or read, its student, and the same student without a teacher."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from pipestill.losses import DistillationLoss, Metric, SupervisedLoss
from pipestill.model.blocks import BlockModel
from pipestill.model.tasks import Distillation, Supervised
from pipestill.recipes.end_to_end import EndToEndWorkload, check_plan, save_plan
from pipestill.recipes.evaluate import evaluate, evaluate_pair
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
        pair_metrics: functions of ((student output, teacher output), target), by name, that both students are evaluated with
        save: writes a model into a directory, in place of its state dict alone
        described: further entries of summary.json
    """

    build_teacher: Callable[[], nn.Module]
    build_student: Callable[[], nn.Module]
    loss: DistillationLoss
    supervised_loss: SupervisedLoss
    validation_loader: DataLoader[Any]
    teacher_training: Training
    prepare: Callable[[nn.Module, nn.Module], None] | None = None
    teacher_origin: str | None = None
    pair_metrics: Mapping[str, Metric] = field(default_factory=dict)
    save: Callable[[nn.Module, Path], None] | None = None
    described: Mapping[str, Any] = field(default_factory=dict)

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

        def train(name: str, task: Distillation | Supervised, training: Training, inner: str | None) -> Result:
            result = runner.train(
                name, partial(self._trainer_of, task, training, options), self.loader, epochs=training.epochs,
                validate=self.validation_loader, inner=inner, exports=self.save is None,
            )  # fmt: skip
            if self.save is not None and runner.directory is not None:
                self.save(task.student, runner.directory / (inner or "") / "export")
            return result

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
        if self.save is None:
            runner.write_config(student)
        read_from = {} if origin is None else {"read_from": origin}
        agreed = [self._beside(model, teacher, runner) for model in (student, teacher, alone)]
        metrics = {
            "student": {**main.metrics, **agreed[0]},
            "teacher": {**read_from, **of_teacher, **agreed[1]},
            "student_alone": {**lone.metrics, **agreed[2]},
            "parameters": {"student": num_parameters(student), "teacher": num_parameters(teacher)},
        }  # fmt: skip
        taught = {} if self.teacher_origin is None else {"teacher": origin}
        return {**main.summary(), "metrics": metrics, **taught, **self.described}

    def _beside(self, model: nn.Module, teacher: nn.Module, runner: Runner) -> dict[str, float]:
        """Compare a model with the teacher, on rank 0: the last thing in a run, so that no rank waits for it."""
        if not self.pair_metrics or not in_main_process():
            return {}
        return evaluate_pair(model, teacher, self.pair_metrics, self.validation_loader, runner.device)
