"""A stage: consecutive blocks of one role that one rank runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.errors import ModelError
from pipestill.model.blocks import BlockModel
from pipestill.model.boundary import distinct_tensors, enter
from pipestill.model.dry_run import Contracts
from pipestill.model.seeding import seed_block
from pipestill.model.tasks import Task
from pipestill.schedule import Role

OptimizerFactory = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]


def run_blocks(
    model: BlockModel,
    blocks: range,
    value: Any,
    role: Role,
    *,
    seed: int,
    step: int,
    microbatch: int,
    device: torch.device,
) -> Any:
    """The value after `blocks`, each with its own random numbers (see `seed_block`)."""
    for i in blocks:
        seed_block(seed, role, i, step, microbatch, device)
        value = model.blocks[i].call(value)
    return value


def weighted_loss(parts: dict[str, Tensor], share: float) -> Tensor:
    """The part of a batch's mean loss that a microbatch with `share` of its rows gives."""
    total = torch.stack(list(parts.values())).sum() if len(parts) > 1 else next(iter(parts.values()))
    return total * share


def guard_batch(value: Any) -> Callable[[str], None]:
    """A check that nobody wrote to the tensors of a batch, which both models read: call it after a forward."""
    versions = [(tensor, tensor._version) for tensor in distinct_tensors(value)]

    def unchanged(who: str) -> None:
        if any(tensor._version != version for tensor, version in versions):
            raise ModelError(
                f"the first block of the {who} changes its input in place, and the other model reads it too"
            )

    return unchanged


class TeacherStage:
    """Runs forward without gradients, in eval mode, on weights that nobody changes."""

    def __init__(self, model: BlockModel, blocks: range, device: torch.device, seed: int) -> None:
        self.model, self.blocks, self.device, self.seed = model, blocks, device, seed
        move(model, blocks, device)
        model.model.eval()

    def forward(self, value: Any, step: int, microbatch: int) -> Any:
        self.model.in_mode(train=False)
        with torch.no_grad():
            return run_blocks(
                self.model, self.blocks, value, Role.TEACHER,
                seed=self.seed, step=step, microbatch=microbatch, device=self.device,
            )  # fmt: skip


class StudentStage:
    """Runs forward and backward, keeps what lies between them, accumulates gradients and updates its weights."""

    def __init__(
        self,
        task: Task,
        contracts: Contracts,
        blocks: range,
        device: torch.device,
        seed: int,
        optimizer: OptimizerFactory,
    ) -> None:
        self.task, self.contracts, self.blocks, self.device, self.seed = task, contracts, blocks, device, seed
        self.model = task.student_blocks
        self.output = contracts.student[blocks[-1]]
        move(self.model, blocks, device)
        self.parameters = {n: p for n, p in self.model.parameters_of(blocks).items() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.grad = None  # what was left from before is no part of the first batch
        self.optimizer = optimizer(self.parameters) if self.parameters else None
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []
        self.stash: dict[tuple[int, int], tuple[list[Tensor | None], list[Tensor]]] = {}  # input's gradients, outputs
        self.losses: dict[tuple[int, int], Tensor] = {}
        self.loss_sums = torch.zeros(len(contracts.loss_parts), dtype=torch.float64, device=device)

    def enter(self, tensors: Sequence[Tensor], rows: int) -> tuple[Any, list[Tensor | None]]:
        """Received tensors -> the first block's input, and the list that the backward fills with its gradients."""
        contract = self.contracts.student[self.blocks[0] - 1]
        entered, gradients = enter([tensors[i] for i in contract.tracked_positions])
        given = list(tensors)
        for i, tensor in zip(contract.tracked_positions, entered, strict=True):
            given[i] = tensor
        return contract.join(given, rows), gradients

    def forward(self, value: Any, gradients: list[Tensor | None], step: int, microbatch: int, rows: int) -> Any:
        """The stage's output, its graph kept for `backward`. `gradients`: what `enter` gave with the value."""
        self.model.in_mode(train=True)
        output = run_blocks(
            self.model, self.blocks, value, Role.STUDENT,
            seed=self.seed, step=step, microbatch=microbatch, device=self.device,
        )  # fmt: skip
        self.stash[step, microbatch] = (gradients, self.output.split(output, rows))
        return output

    def infer(self, value: Any, step: int, microbatch: int) -> Any:
        """The stage's output for validation: no gradients, nothing kept."""
        self.model.in_mode(train=False)
        with torch.no_grad():
            return run_blocks(
                self.model, self.blocks, value, Role.STUDENT,
                seed=self.seed, step=step, microbatch=microbatch, device=self.device,
            )  # fmt: skip

    def loss(self, output: Any, teacher: Any, target: Any, step: int, microbatch: int, share: float) -> None:
        """Evaluate the loss of a microbatch; its graph goes on from the output's, for one `backward` through both."""
        seed_block(self.seed, Role.STUDENT, len(self.model), step, microbatch, self.device)
        parts = self.task.loss_parts(output, teacher, target)
        self.add_loss(parts, share)
        self.losses[step, microbatch] = weighted_loss(parts, share)

    def add_loss(self, parts: dict[str, Tensor], share: float) -> None:
        if tuple(parts) != self.contracts.loss_parts:
            raise ModelError(
                f"the loss had the parts {', '.join(self.contracts.loss_parts)} on the sample batch and now has "
                f"{', '.join(parts)}; it must always give the same ones, in the same order"
            )
        self.loss_sums += torch.stack([part.detach().double() for part in parts.values()]) * share

    def take_losses(self) -> dict[str, float]:
        """The parts of the batch's mean loss, once all its microbatches are through; starts the next sum."""
        sums, self.loss_sums = self.loss_sums, torch.zeros_like(self.loss_sums)
        return dict(zip(self.contracts.loss_parts, sums.tolist(), strict=True))

    def backward(self, gradients: Sequence[Tensor] | None, step: int, microbatch: int) -> list[Tensor]:
        """Accumulate the weights' gradients; returns those of the input leaves. `gradients` None: from the loss."""
        received, outputs = self.stash.pop((step, microbatch))
        pairs: list[tuple[Tensor, Tensor | None]]
        if gradients is None:
            pairs = [(self.losses.pop((step, microbatch)), None)]
        else:
            pairs = [(outputs[i], g) for i, g in zip(self.output.gradient_positions, gradients, strict=True)]
        roots = [(output, gradient) for output, gradient in pairs if output.requires_grad]
        if roots:
            torch.autograd.backward([output for output, _ in roots], [gradient for _, gradient in roots])
        return self._input_gradients(received)

    def _input_gradients(self, received: list[Tensor | None]) -> list[Tensor]:
        """What goes back to the stage before; `ModelError` when that is not what came back on the sample batch."""
        if not received:
            return []
        contract = self.contracts.student[self.blocks[0] - 1]
        sent = []
        for i, gradient in zip(contract.tracked_positions, received, strict=True):
            expected = contract.tensor_leaves[i].gradient is not None
            if expected != (gradient is not None):
                raise ModelError(
                    f"student block {self.blocks[0]} ('{self.model.blocks[self.blocks[0]].name}'): "
                    f"{'no' if expected else 'a'} gradient came back for an input that had "
                    f"{'one' if expected else 'none'} on the sample batch; a model may not choose per batch what it uses"
                )
            if gradient is not None:
                sent.append(gradient)
        return sent

    def update(self, lr_factor: float) -> None:
        """One optimizer step at `lr_factor` times each group's own learning rate."""
        if self.optimizer is None:
            return
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def move(model: BlockModel, blocks: range, device: torch.device) -> None:
    """Put the parameters and buffers of `blocks` on `device`, in place."""
    for tensor in model.tensors_of(blocks).values():
        tensor.data = tensor.data.to(device)


def gradient_squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The squared norm of each parameter's gradient, 0 without one: float64, on the CPU."""
    squares = [
        p.new_zeros((), dtype=torch.float64)
        if p.grad is None
        else torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for p in parameters
    ]
    return torch.stack(squares).cpu() if squares else torch.zeros(0, dtype=torch.float64)
