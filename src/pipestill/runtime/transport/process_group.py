"""The transport between processes: gloo on CPU, NCCL on CUDA, through `torch.distributed`."""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from pipestill.errors import TransportError
from pipestill.runtime.transport.message import UNDER_WAY, Message, Queue, queue_of, tag
from pipestill.schedule import Lane

_Sent = tuple[Message, list[Tensor], list[dist.Work]]


class ProcessGroup:
    """One rank's lanes over the default process group.

    Sends and receives never block; waits do, each up to `timeout_seconds`. On gloo the tag of a message names its lane,
    action and segment, so a message can never be taken for another. NCCL has no tags: there each directed edge and
    lane of `edges` has a communicator of its own, in whose order messages are matched; create this on all ranks together, or
    on all that have edges where they are `among_some`.
    """

    def __init__(self, timeout_seconds: float, edges: Iterable[tuple[int, int, Lane]] = (), *, among_some: bool = False) -> None:
        self.rank = dist.get_rank()
        self.timeout = timedelta(seconds=timeout_seconds)
        self.posted: dict[Message, tuple[list[Tensor], list[dist.Work]]] = {}
        self.under_way = defaultdict[Queue, deque[_Sent]](deque)
        self.groups: dict[tuple[int, int, Lane], dist.ProcessGroup] = {}
        if "nccl" in str(dist.get_backend_config()):
            for source, destination, lane in sorted(edges):
                if not among_some or self.rank in (source, destination):
                    self.groups[source, destination, lane] = dist.new_group(
                        [source, destination], backend="nccl", use_local_synchronization=among_some
                    )

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        kept = list(tensors)
        group = self.groups.get((message.source, message.destination, message.lane))
        with _named("sends", message, self.rank):
            works = [dist.isend(t, message.destination, group=group, tag=tag(message, i)) for i, t in enumerate(kept)]
        queue = self.under_way[queue_of(message)]
        queue.append((message, kept, [w for w in works if w is not None]))
        while queue and self.groups and all(work.is_completed() for work in queue[0][2]):
            queue.popleft()
        while len(queue) > UNDER_WAY:  # gloo never says that one has arrived, only a wait does
            self._finish(queue.popleft())

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        kept = list(buffers)
        group = self.groups.get((message.source, message.destination, message.lane))
        with _named("receives", message, self.rank):
            works = [dist.irecv(t, message.source, group=group, tag=tag(message, i)) for i, t in enumerate(kept)]
        self.posted[message] = (kept, [w for w in works if w is not None])

    def arrived(self, message: Message) -> bool:
        if message not in self.posted:
            raise TransportError(f"rank {self.rank} waits for {message}, but never announced the receive")
        buffers, works = self.posted[message]
        with _named("waits for", message, self.rank, self.timeout):
            for work in works:
                work.wait(self.timeout)
        self.posted[message] = buffers, []  # on gloo a second wait would never end
        return True

    def take(self, message: Message) -> list[Tensor]:
        return self.posted.pop(message)[0]

    def settle(self, message: Message) -> None:
        queue = self.under_way[queue_of(message)]
        alike = [sent for sent in queue if (sent[0].destination, sent[0].lane) == (message.destination, message.lane)]
        last = max((index for index, sent in enumerate(alike) if sent[0] == message), default=-1)
        done = {id(sent) for sent in alike[: last + 1]}
        for sent in alike[: last + 1]:
            self._finish(sent)
        if done:
            self.under_way[queue_of(message)] = deque(s for s in queue if id(s) not in done)

    def flush(self, segment: int) -> None:
        for message in [m for m in self.posted if m.segment == segment]:
            self.arrived(message)  # only the order was about it; gloo hangs once a buffer goes that is still announced
        for beside in (False, True):
            while self.under_way[segment, beside]:
                self._finish(self.under_way[segment, beside].popleft())

    def _finish(self, sent: _Sent) -> None:
        """Wait until a send is over. Those of training wait until a validation is over."""
        message, _, works = sent
        with _named(f"waits until rank {message.destination} takes", message, self.rank, self.timeout):
            for work in works:
                work.wait(self.timeout)


@contextmanager
def _named(what: str, message: Message, rank: int, timeout: timedelta | None = None) -> Iterator[None]:
    """Turn an error of torch.distributed inside the body into a `TransportError` that says what was under way."""
    try:
        yield
    except RuntimeError as error:
        limit = f" (deadline {timeout.total_seconds():g} s)" if timeout else ""
        reason = str(error).strip().splitlines()[0]
        raise TransportError(f"rank {rank} {what} {message}{limit}: {reason}") from error
