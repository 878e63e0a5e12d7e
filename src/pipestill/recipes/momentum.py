"""The workload of a training with a momentum teacher: student and teacher together, and what the teacher's features are worth."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pipestill.errors import ConfigError
from pipestill.model.tasks import Momentum
from pipestill.recipes.end_to_end import EndToEndWorkload, check_plan, save_plan
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.runner import Runner
from pipestill.recipes.weights import export, num_parameters


@dataclass(frozen=True, kw_only=True)
class MomentumWorkload(EndToEndWorkload):
    """Everything that training with a momentum teacher takes.

    Args:
        build: makes a fresh task, the same every time
        evaluate: computes metrics of a teacher's features on a device, by labels that training never sees
    """

    build: Callable[[], Momentum]
    evaluate: Callable[[nn.Module, torch.device], dict[str, float]]

    def task(self) -> Momentum:
        """Build a fresh task."""
        return self.build()

    def preflight(self, options: RunOptions) -> None:
        """Raise what can be seen to be wrong before anything is trained."""
        check_plan(self.trainer(self.task(), options), self.loader)
        if options.teacher is not None:
            raise ConfigError("a momentum teacher is made out of the student, and read from no file; leave out --teacher")

    def run(self, options: RunOptions, runner: Runner) -> dict[str, Any]:
        """Train student and teacher together; evaluate the teacher, and the same network untrained."""
        task = self.task()
        main = runner.train("student", partial(self.trainer, task, options), self.loader, epochs=self.student_training.epochs)
        metrics: dict[str, Any] = {
            "student": main.metrics,
            "parameters": {"student": num_parameters(task.student), "teacher": num_parameters(task.teacher)},
        }
        if runner.directory is not None:
            save_plan(main, runner.directory)
            runner.write_config(task.student)
            export(task.teacher, runner.directory / "export" / "teacher.safetensors")
            metrics["teacher"] = self.evaluate(task.teacher, runner.device)
            metrics["untrained"] = self.evaluate(self.task().teacher, runner.device)
        return {**main.summary(), "metrics": metrics}
