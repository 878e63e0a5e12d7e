"""The workload of a decoder's blockwise training: candidates for each block, their scores, a choice, and how it is tuned."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from pipestill.errors import ConfigError
from pipestill.losses import BlockLoss, Metric
from pipestill.model.blockwise.task import Blockwise
from pipestill.model.tasks import Supervised, Task
from pipestill.recipes.block_choice import Scored, choose_scored, rows_of_table, score
from pipestill.recipes.blockwise import BlockwiseWorkload, end_to_end, save_blocks
from pipestill.recipes.decoder_candidates import KEEP, candidate, frozen
from pipestill.recipes.decoder_parts import replaced, trunk
from pipestill.recipes.end_to_end import check_plan
from pipestill.recipes.evaluate import evaluate_pair
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.runner import Runner
from pipestill.recipes.training import Training
from pipestill.recipes.weights import export, load_into, num_parameters
from pipestill.runtime.world import Processes, in_main_process


@dataclass(frozen=True, kw_only=True)
class DecoderBlocksWorkload(BlockwiseWorkload):
    """Everything that replacing the blocks of a decoder takes.

    Args:
        build_teacher: makes the teacher in parts, the same every time
        names: the names of the candidates for each part that has some
        block_loss: the loss of each block
        score_loader: batches that candidates are scored on
        budget: most that the chosen blocks may cost, as a fraction of the teacher's
        budget_of: what a block costs: its parameters or its seconds
        teacher_origin: where the teacher is read from (default: it is trained here)
        pair_metrics: functions of ((student output, teacher output), target), by name
        form: what export/config.json says to build the network again
    """

    build_teacher: Callable[[], nn.Sequential]
    names: Mapping[str, Sequence[str]]
    block_loss: BlockLoss
    score_loader: DataLoader[Any]
    budget: float
    budget_of: str
    teacher_origin: str | None
    pair_metrics: Mapping[str, Metric]
    form: Mapping[str, Any]

    def preflight(self, options: RunOptions) -> None:
        """Raise what can be seen to be wrong before anything is trained."""
        teacher = self.build_teacher()
        task = task_of(teacher, self.names, self.block_loss)
        check_plan(self.trainer(task, options), self.loader)
        self._check_budget(teacher, task)
        network = assembled(teacher, self._library(teacher, task), {name: names[0] for name, names in self.names.items()})
        whole = end_to_end(options, teacher, network)
        trainings: list[tuple[Task, Training]] = [
            *self._fine_tuning(teacher, network),
            (Supervised(teacher, self.supervised_loss), self.teacher_training),
            (Supervised(network, self.supervised_loss), self.alone_training),
        ]
        for model, training in trainings:
            self._trainer_of(model, training, whole).preflight(self.train_loader)
        if options.teacher is not None:
            load_into(teacher, options.teacher)

    def _check_budget(self, teacher: nn.Sequential, task: Blockwise) -> None:
        """Refuse a budget of parameters that no choice keeps."""
        sizes: dict[int, list[int]] = {}
        for place, _, module in self._library(teacher, task):
            sizes.setdefault(place, []).append(num_parameters(module))
        least, whole = (sum(map(of, sizes.values())) for of in (min, lambda several: several[0]))
        if self.budget_of == "parameters" and least > self.budget * whole:
            raise ConfigError(
                f"budget is {self.budget}, but the smallest candidates together have {least / whole:.2f} of the parameters of "
                "the teacher's blocks; raise it, or give smaller candidates"
            )

    def _library(self, teacher: nn.Sequential, task: Blockwise) -> list[tuple[int, str, nn.Module]]:
        """Every candidate with the number of its part and its name; what is kept comes first."""
        found = []
        for place, (name, part) in enumerate(teacher.named_children()):
            if name in self.names:
                modules = (task.student.get_submodule(name), *task.candidates.get(place, ()))
                found += [(place, KEEP, part), *((place, *pair) for pair in zip(self.names[name], modules, strict=True))]
        return found

    def run(self, options: RunOptions, runner: Runner) -> dict[str, Any]:
        """Train the teacher, the candidates, the chosen network as a whole, and that network without a teacher."""
        teacher, directory = self.build_teacher(), runner.directory
        metrics: dict[str, Any] = {"teacher": self._teacher_metrics(teacher, options, runner)}
        task = task_of(teacher, self.names, self.block_loss)
        blocks = runner.train(
            "blocks", partial(self.trainer, task, options), self.loader, epochs=self.student_training.epochs, exports=False
        )
        library = self._library(teacher, task)
        table, chosen, cost = self._chosen(teacher, library, runner.device)
        picks = {one.block: one.candidate for one in chosen}
        network = assembled(teacher, library, picks)
        metrics["blocks"] = metrics["student"] = self._evaluate(network, runner)
        if directory is not None:
            save_blocks(blocks, directory, options)
            export(network, directory / "export" / "before_fine_tuning.safetensors")
        whole = end_to_end(options, teacher, network)
        for tuned, training in self._fine_tuning(teacher, network):
            metrics["student"] = self._train_whole("fine-tuning", tuned, training, whole, runner)
        alone = begun_anew(network, options.seed)
        metrics["student_alone"] = self._train_whole(
            "student alone", Supervised(alone, self.supervised_loss), self.alone_training, whole, runner
        )
        metrics["parameters"] = {"student": num_parameters(network), "teacher": num_parameters(teacher)}
        if directory is not None:
            export(network, directory / "export" / "model.safetensors")
        runner.write_config(network, {**self.form, "blocks": picks})
        if in_main_process():
            for name, model in {"teacher": teacher, "student": network, "student_alone": alone}.items():
                agreed = evaluate_pair(model, teacher, self.pair_metrics, self.validation_loader, runner.device)
                metrics[name] = {**metrics[name], **agreed}
            before = assembled(teacher, library, picks)
            metrics["blocks"] |= evaluate_pair(before, teacher, self.pair_metrics, self.validation_loader, runner.device)
        summary = blocks.summary()
        summary["block_losses"] = summary.pop("losses")
        searched = {"budget": self.budget, "budget_of": self.budget_of, "cost": cost, "candidates": rows_of_table(table, chosen)}
        return {**summary, "metrics": metrics, "library": searched}

    def _teacher_metrics(self, teacher: nn.Sequential, options: RunOptions, runner: Runner) -> dict[str, Any]:
        """Train the teacher, or take it as it was read; returns its metrics."""
        if options.teacher is None and self.teacher_origin is not None:
            return {"read_from": self.teacher_origin, **self._evaluate(teacher, runner)}
        return self._train_teacher(teacher, options, runner)

    def _chosen(
        self, teacher: nn.Sequential, library: Sequence[tuple[int, str, nn.Module]], device: torch.device
    ) -> tuple[list[Scored], list[Scored], float]:
        """Score the candidates and choose, on rank 0; the table, the choice and its cost are the same on all ranks."""
        found = None
        if in_main_process():
            table = score(teacher, library, self.score_loader, self.block_loss, device)
            found = table, *choose_scored(table, self.budget, self.budget_of)
        if dist.is_initialized():
            found = Processes().broadcast(found)
        assert found is not None
        return found


def task_of(teacher: nn.Sequential, names: Mapping[str, Sequence[str]], block_loss: BlockLoss) -> Blockwise:
    """The blockwise training of all candidates, made of the teacher's weights, against the teacher without its head."""
    parts = trunk(teacher)
    made = {
        i: [candidate(one, part) for one in names[name]] for i, (name, part) in enumerate(parts.named_children()) if name in names
    }
    places = {name: i for i, (name, _) in enumerate(parts.named_children())}
    student = replaced(parts, lambda name, part: made[places[name]][0] if name in names else frozen(part))
    return Blockwise(parts, student, block_loss, candidates={i: several[1:] for i, several in made.items() if several[1:]})


def assembled(teacher: nn.Sequential, library: Sequence[tuple[int, str, nn.Module]], picks: Mapping[str, str]) -> nn.Sequential:
    """Make a model of copies of the chosen candidates, by the names of their blocks, and of the teacher's other parts."""
    names = [name for name, _ in teacher.named_children()]
    modules = {(names[place], name): module for place, name, module in library}

    def pick(name: str, part: nn.Module) -> nn.Module:
        return copy.deepcopy(modules.get((name, picks.get(name, KEEP)), part)).requires_grad_(True)

    return replaced(teacher, pick)


@torch.no_grad()
def begun_anew(network: nn.Module, seed: int) -> nn.Module:
    """Make a copy of a network with random weights: matrices as those of a Llama, norms of ones, feature maps of the identity."""
    made = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 0.02, generator=generator)
        elif parameter.dim() == 3:
            parameter.copy_(torch.eye(parameter.shape[-1]).expand_as(parameter))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return made
