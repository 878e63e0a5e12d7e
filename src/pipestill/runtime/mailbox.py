"""One rank's mailbox: its messages, the results that it keeps until their last use, and the tokens that it waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.model.contracts import TensorForm
from pipestill.runtime.transport.protocol import Message, Transport, Waiting, receive
from pipestill.schedule import Action, Kind, Lane, Op, Schedule
from pipestill.schedule.needs import lane, needs

Receiving = Generator[Message, None, list[Tensor]]
"""Waits for a message, and returns its tensors."""

Forms = Sequence[tuple[TensorForm, int]]
"""The form and the number of rows of each tensor of a message."""

_RESULT_LANES = (Lane.TEACHER, Lane.ACTIVATION, Lane.GRADIENT, Lane.NORM)
"""Lanes whose messages carry the result of a work; the others carry the batch, the order, or what belongs to no result."""


@dataclass(eq=False)
class Mailbox:
    """What one rank sends, receives and keeps while an executor walks its row of a schedule.

    - A *result* is kept from the work that gave it until its last use on this rank. Its uses are counted beforehand: its
      sends in the row, and those that `local_uses(work)` names for each work of the row.
    - A *message* carries a result, or part of a batch. Its receive is posted where the row says so; `receive` waits.
    - A *token* is a message that carries nothing but the order: a work waits for the tokens of what it needs from other
      ranks when no tensor of theirs tells it.

    The schedule counts ranks from 0; `ranks` says which of the world they are, if others.
    """

    schedule: Schedule[Any]
    rank: int
    transport: Transport
    device: torch.device
    local_uses: Callable[[Action], Iterable[Action]]
    segment: int = 0
    ranks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.structure = self.schedule.structure
        self.world_ranks = self.ranks or range(self.structure.num_ranks)
        row = self.schedule.rows[self.rank]
        works = [action.at(0) for action in row if action.computes and action.op is not Op.DATA]
        self.uses = Counter(result.at(0) for work in works for result in self.local_uses(work))
        """How often this rank uses the result of each work of a step."""
        self.uses.update(a.payload.at(0) for a in row if a.kind is Kind.SEND and self.lane_of(a) in _RESULT_LANES)
        self.results: dict[Action, tuple[Any, int]] = {}
        """By work whose result is kept: the result, and how many uses are left."""
        awaited = {a.payload.at(0) for a in row if a.kind is Kind.RECEIVE and self.lane_of(a) is Lane.TOKEN}
        self.token_needs = {
            work: [need for need in needs(work, self.structure) if need.at(0) in awaited]
            for work in (works if awaited else [])
        }
        """By work of step 0: what it needs whose token comes from another rank."""
        self.token_uses = Counter(need.at(0) for mine in self.token_needs.values() for need in mine)
        self.tokens_left: dict[Action, int] = {}
        """By token that has arrived: how many works are still to ask for it."""

    # -- results ----------------------------------------------------------------------------------------------------

    def keep(self, work: Action, result: Any) -> None:
        """Keep the result of `work` for its uses on this rank, if it has any."""
        uses = self.uses[work.at(0)]
        if uses:
            self.results[work] = result, uses

    def use(self, work: Action) -> Any:
        """The result of `work`, which is let go of after its last use."""
        result, uses = self.results.pop(work)
        if uses > 1:
            self.results[work] = result, uses - 1
        return result

    # -- messages ---------------------------------------------------------------------------------------------------

    def lane_of(self, transfer: Action) -> Lane:
        """The lane on which a send or a receive of this rank travels."""
        destination = transfer.peer if transfer.kind is Kind.SEND else self.rank
        assert destination is not None
        return lane(transfer, destination, self.structure)

    def message(self, transfer: Action, on: Lane | None = None) -> Message:
        """The message of a send or a receive of this rank, on its own lane unless another is given."""
        assert transfer.peer is not None
        mine, theirs = self.world_ranks[self.rank], self.world_ranks[transfer.peer]
        source, destination = (mine, theirs) if transfer.kind is Kind.SEND else (theirs, mine)
        return Message(on or self.lane_of(transfer), transfer.payload, source, destination, self.segment)

    def send(self, transfer: Action, tensors: Sequence[Tensor], on: Lane | None = None) -> None:
        """Send tensors as they are."""
        self.transport.send(self.message(transfer, on), tensors)

    def post(self, transfer: Action, buffers: Sequence[Tensor], on: Lane | None = None) -> None:
        """Announce that this rank will receive tensors like `buffers`."""
        self.transport.post(self.message(transfer, on), buffers)

    def receive(self, work: Action, on: Lane | None = None) -> Receiving:
        """Wait for the result of another rank's `work`."""
        transfer = work.receive_from(self.structure.rank_of(work))
        return (yield from receive(self.transport, self.message(transfer, on)))

    def send_packed(self, transfer: Action, tensors: Sequence[Tensor], forms: Forms, on: Lane | None = None) -> None:
        """Send tensors of known forms, each packed into one axis; nothing where there are none."""
        packed = [form.pack(tensor, rows) for tensor, (form, rows) in zip(tensors, forms, strict=True)]
        if packed:
            self.send(transfer, packed, on)

    def post_packed(self, transfer: Action, forms: Forms, on: Lane | None = None) -> None:
        """Announce that this rank will receive tensors of known forms; nothing where there are none."""
        if forms:
            self.post(transfer, [form.empty(rows, self.device) for form, rows in forms], on)

    def receive_packed(self, work: Action, forms: Forms, on: Lane | None = None) -> Receiving:
        """Wait for tensors of known forms; no wait where there are none."""
        if not forms:
            return []
        packed = yield from self.receive(work, on)
        return [form.unpack(tensor, rows) for tensor, (form, rows) in zip(packed, forms, strict=True)]

    def flush(self) -> None:
        """Wait until all that this rank has sent has left."""
        self.transport.flush(self.segment)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def transfer_token(self, transfer: Action) -> bool:
        """Send a token, or announce that one will be received; False where `transfer` is of something else."""
        if self.lane_of(transfer) is not Lane.TOKEN:
            return False
        token = [torch.zeros(1, device=self.device)]
        if transfer.kind is Kind.SEND:
            self.send(transfer, token)
        else:
            self.post(transfer, token)
        return True

    def tokens(self, work: Action) -> list[Action]:
        """The works of other ranks whose tokens `work` waits for."""
        found = (need.at(need.step + work.step) for need in self.token_needs.get(work.at(0), ()))
        return [need for need in found if need.step >= 0]

    def wait_for_tokens(self, work: Action) -> Waiting:
        """Wait until the other ranks have done what `work` needs only to come after."""
        for need in self.tokens(work):
            if need not in self.tokens_left:
                yield from self.receive(need, Lane.TOKEN)
                self.tokens_left[need] = self.token_uses[need.at(0)]
            self.tokens_left[need] -= 1
            if not self.tokens_left[need]:
                del self.tokens_left[need]
