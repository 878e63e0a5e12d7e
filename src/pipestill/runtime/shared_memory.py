"""The transport between processes of one machine: tensors lie in shared memory, news of them go over Unix sockets.

Gloo sends tensors through TCP, which costs both ranks' cores several copies and wake-ups a message; here the sender copies a
tensor once, and the receiver once, and nothing runs beside the ranks' own work.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from pipestill.errors import TransportError
from pipestill.runtime.transport import UNDER_WAY, Message, Queue, Transport, queue_of, tag

T = TypeVar("T")

_HEADER = struct.Struct("<qqqq")  # a message's tag, its number, its slot, its bytes; of a receipt, _RECEIPT and numbers
_RECEIPT = -1
_INLINE = -1  # in the place of a slot: the bytes follow the header
_INLINE_BYTES = 4096  # more than the receipts of all that can be under way
_LOOK_AT = 4  # sends that may not have been taken yet
_PACKET_BYTES = _HEADER.size + _INLINE_BYTES
_NUMBER = struct.Struct("<q")


def wanted() -> bool:
    """Whether ranks of one machine may share memory: on Linux, unless PIPESTILL_SHARED_MEMORY is 0."""
    return sys.platform == "linux" and os.environ.get("PIPESTILL_SHARED_MEMORY", "1") != "0"


def connect(ranks: Sequence[int], group: dist.ProcessGroup | None, timeout_seconds: float) -> dict[int, socket.socket]:
    """A socket to each of the other `ranks` that is on this machine, in the same network namespace; on all of them together.

    Nothing is told but random names in the abstract namespace, which only processes of the machine find; they vanish with
    the sockets, however their process ends.
    """
    here = dist.get_rank()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        name = b"\0pipestill-" + secrets.token_hex(16).encode()
        listener.bind(name)
        listener.listen(len(ranks))
        listener.settimeout(timeout_seconds)
        found: dict[int, socket.socket] = {}
        for rank, theirs in zip(ranks, _gathered(name, len(ranks), group), strict=True):
            client = _called(theirs) if rank < here else None
            if client is not None:
                client.send(_NUMBER.pack(here))
                found[rank] = client
        callers = sum(here in called for called in _gathered(sorted(found), len(ranks), group))
        while callers:
            accepted, _ = listener.accept()
            if not _is_ours(accepted):
                accepted.close()
                continue
            (caller,) = _NUMBER.unpack(accepted.recv(_NUMBER.size))
            found[caller] = accepted
            callers -= 1
    return found


def _called(name: bytes) -> socket.socket | None:
    """A connection to who listens to `name`; None where nobody does, who is on another machine then."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        client.connect(name)
    except OSError:
        client.close()
        return None
    return client


def _is_ours(connection: socket.socket) -> bool:
    """Whether this user's process is at the other end: everybody on the machine can see abstract names."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


def _gathered(value: T, count: int, group: dist.ProcessGroup | None) -> list[T]:
    box: list[Any] = [None] * count
    dist.all_gather_object(box, value, group=group)
    return box


class SharedMemory:
    """One rank's lanes to the `peers` of its machine; to all other ranks, and of other devices, through `elsewhere`.

    Sends do not wait unless a queue is full. A rank that waits, for whatever it is, takes in all that was announced from any
    peer: so a send is over once its receive has been announced and its rank comes by, and a proved schedule ends.
    """

    def __init__(self, timeout_seconds: float, peers: dict[int, socket.socket], elsewhere: Transport) -> None:
        self.rank, self.timeout_seconds, self.elsewhere = dist.get_rank(), timeout_seconds, elsewhere
        self.peers = {rank: _Peer(rank, connection) for rank, connection in peers.items()}
        self.by_descriptor = {peer.connection.fileno(): peer for peer in self.peers.values()}
        self.poll = select.poll()
        for descriptor in self.by_descriptor:
            self.poll.register(descriptor, select.POLLIN)
        self.posted: dict[Message, _Posted] = {}
        self.under_way = defaultdict[Queue, deque[tuple[Message, int]]](deque)
        self.count = 0
        weakref.finalize(self, _close, list(peers.values()))

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        peer = self.peers.get(message.destination)
        if peer is None:
            self.elsewhere.send(message, tensors)
            return
        if len(peer.untaken) >= _LOOK_AT:
            self._serve(0)  # for receipts: they free slots
        self.count += 1
        peer.put(tag(message, 0), self.count, tensors)
        self._push(peer)
        if peer.gone:
            raise TransportError(f"rank {self.rank} sends {message}: {peer.farewell}")
        queue = self.under_way[queue_of(message)]
        queue.append((message, self.count))
        while queue and queue[0][1] not in self.peers[queue[0][0].destination].untaken:
            queue.popleft()
        while len(queue) > UNDER_WAY:
            self._finish_one(queue)

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        peer = self.peers.get(message.source)
        if peer is None:
            self.elsewhere.post(message, buffers)
            return
        posted = self.posted[message] = _Posted(message, list(buffers))
        peer.expect(tag(message, 0), posted)
        self._push(peer)

    def arrived(self, message: Message) -> bool:
        peer = self.peers.get(message.source)
        if peer is None:
            return self.elsewhere.arrived(message)
        if message not in self.posted:
            raise TransportError(f"rank {self.rank} waits for {message}, but never announced that it would")
        posted = self.posted[message]
        self._wait(lambda: posted.here, peer, f"waits for {message}")
        return True

    def take(self, message: Message) -> list[Tensor]:
        if message.source not in self.peers:
            return self.elsewhere.take(message)
        return self.posted.pop(message).buffers

    def settle(self, message: Message) -> None:
        if message.destination not in self.peers:
            self.elsewhere.settle(message)  # here nothing of the sender's is kept

    def flush(self, phase: int) -> None:
        for message in [m for m in self.posted if m.phase == phase]:
            self.arrived(message)  # only the order was about it
        for beside in (False, True):
            while self.under_way[phase, beside]:
                self._finish_one(self.under_way[phase, beside])
        self.elsewhere.flush(phase)

    def _finish_one(self, queue: deque[tuple[Message, int]]) -> None:
        """Wait until the oldest has been taken."""
        message, number = queue.popleft()
        peer = self.peers[message.destination]
        what = f"waits until rank {message.destination} takes {message}"
        self._wait(lambda: number not in peer.untaken, peer, what)

    def _wait(self, done: Callable[[], bool], peer: _Peer, what: str) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        while not done():
            left = deadline - time.monotonic()
            if peer.gone:
                raise TransportError(f"rank {self.rank} {what}: {peer.farewell}")
            if left <= 0:
                raise TransportError(f"rank {self.rank} {what} (deadline {self.timeout_seconds:g} s): nothing came")
            self._serve(left)

    def _serve(self, seconds: float) -> None:
        """Take in what has come from any peer, waiting up to `seconds` for something."""
        for descriptor, events in self.poll.poll(math.ceil(seconds * 1000)):
            peer = self.by_descriptor[descriptor]
            if events & ~select.POLLOUT:
                peer.read()
            self._push(peer)

    def _push(self, peer: _Peer) -> None:
        """Hand over what can be handed over to a peer now."""
        if not (peer.receipts or peer.outgoing or peer.gone):
            return
        wanted = select.POLLIN | (0 if peer.push() else select.POLLOUT)
        if peer.gone:
            self.by_descriptor.pop(peer.descriptor, None)
            wanted = 0
        if wanted != peer.polled:
            peer.polled = wanted
            if wanted:
                self.poll.modify(peer.descriptor, wanted)
            else:
                self.poll.unregister(peer.descriptor)


@dataclass(slots=True)
class _Posted:
    """A receive that was announced, and whether it is here."""

    message: Message
    buffers: list[Tensor]
    here: bool = False


@dataclass(frozen=True, slots=True)
class _Memory:
    """Memory that two processes share, and where it is in this one."""

    mapped: mmap.mmap
    address: int


@dataclass(frozen=True, slots=True)
class _Slot:
    """Shared memory for one message at a time."""

    number: int
    memory: _Memory


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A message of `size` bytes that has come, or where it lies."""

    number: int
    size: int
    content: bytes | _Memory


@dataclass(slots=True)
class _Peer:
    """What lies between this rank and another."""

    rank: int
    connection: socket.socket
    descriptor: int = -1
    polled: int = select.POLLIN if hasattr(select, "POLLIN") else 0
    gone: bool = False
    outgoing: deque[tuple[bytes, int | None]] = field(default_factory=deque)  # packets, and descriptors to go along
    receipts: list[int] = field(default_factory=list)
    untaken: dict[int, _Slot | None] = field(default_factory=dict)  # what was sent and not yet taken, and where it lies
    free: dict[int, list[_Slot]] = field(default_factory=dict)  # by their bytes
    num_slots: int = 0
    theirs: dict[int, _Memory] = field(default_factory=dict)
    early: defaultdict[int, deque[_Arrival]] = field(default_factory=lambda: defaultdict(deque))
    expected: defaultdict[int, deque[_Posted]] = field(default_factory=lambda: defaultdict(deque))

    def __post_init__(self) -> None:
        self.connection.setblocking(False)
        self.descriptor = self.connection.fileno()

    @property
    def farewell(self) -> str:
        return f"rank {self.rank} has ended (connection closed)"

    def put(self, key: int, number: int, tensors: Sequence[Tensor]) -> None:
        """Copy tensors to where the peer finds them, and line up the news of it."""
        dense = [tensor.contiguous() for tensor in tensors]
        size = _size(dense)
        if size <= _INLINE_BYTES:
            inline = (ctypes.string_at(tensor.data_ptr(), tensor.nbytes) for tensor in dense)
            self.untaken[number] = None
            self.outgoing.append((b"".join((_HEADER.pack(key, number, _INLINE, size), *inline)), None))
            return
        slot, descriptor = self._slot(size)
        place = slot.memory.address
        for tensor in dense:
            ctypes.memmove(place, tensor.data_ptr(), tensor.nbytes)
            place += tensor.nbytes
        self.untaken[number] = slot
        self.outgoing.append((_HEADER.pack(key, number, slot.number, size), descriptor))

    def _slot(self, size: int) -> tuple[_Slot, int | None]:
        """A free slot, or a new one and its descriptor, which the peer does not know yet."""
        capacity = 1 << (size - 1).bit_length()
        free = self.free.setdefault(capacity, [])
        if free:
            return free.pop(), None
        descriptor = os.memfd_create("pipestill", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, capacity)
        slot = _Slot(self.num_slots, _map(os.dup(descriptor)))
        self.num_slots += 1
        return slot, descriptor

    def expect(self, key: int, posted: _Posted) -> None:
        """Fill the buffers with what is here already, or once it comes."""
        if self.early[key]:
            self._fill(posted, self.early[key].popleft())
        else:
            self.expected[key].append(posted)

    def read(self) -> None:
        """Everything that has come over the connection."""
        while True:
            try:
                packet, descriptors, _, _ = socket.recv_fds(self.connection, _PACKET_BYTES, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it did not read all before it ended; what it had sent is still to be read
                continue
            if not packet:
                self.gone = True
                return
            if packet[: _NUMBER.size] == _NUMBER.pack(_RECEIPT):
                for (number,) in _NUMBER.iter_unpack(packet[_NUMBER.size :]):
                    slot = self.untaken.pop(number)
                    if slot is not None:
                        self.free[len(slot.memory.mapped)].append(slot)
                continue
            self._come(packet, descriptors)

    def _come(self, packet: bytes, descriptors: list[int]) -> None:
        key, number, slot, size = _HEADER.unpack_from(packet)
        for descriptor in descriptors:
            self.theirs[slot] = _map(descriptor)
        arrival = _Arrival(number, size, packet[_HEADER.size :] if slot == _INLINE else self.theirs[slot])
        if self.expected[key]:
            self._fill(self.expected[key].popleft(), arrival)
        else:
            self.early[key].append(arrival)

    def _fill(self, posted: _Posted, arrival: _Arrival) -> None:
        size = _size(posted.buffers)
        if size != arrival.size:
            raise TransportError(f"{posted.message} has {arrival.size} bytes, where {size} were announced")
        offset = 0
        for buffer in posted.buffers:
            if isinstance(arrival.content, bytes):
                ctypes.memmove(buffer.data_ptr(), arrival.content[offset : offset + buffer.nbytes], buffer.nbytes)
            else:
                ctypes.memmove(buffer.data_ptr(), arrival.content.address + offset, buffer.nbytes)
            offset += buffer.nbytes
        posted.here = True
        self.receipts.append(arrival.number)

    def push(self) -> bool:
        """Send what waits to be sent; False when some has to wait until the peer reads."""
        if self.receipts:
            self.outgoing.append((b"".join(map(_NUMBER.pack, (_RECEIPT, *self.receipts))), None))
            self.receipts = []
        while self.outgoing and not self.gone:
            packet, descriptor = self.outgoing[0]
            try:
                if descriptor is None:
                    self.connection.send(packet)
                else:
                    socket.send_fds(self.connection, [packet], [descriptor])
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                self.gone = True
                self.outgoing.clear()
                break
            if descriptor is not None:
                os.close(descriptor)
            self.outgoing.popleft()
        return True


def _map(descriptor: int) -> _Memory:
    """The shared memory behind a descriptor, which is closed."""
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    os.close(descriptor)
    return _Memory(memory, ctypes.addressof(ctypes.c_char.from_buffer(memory)))


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _close(connections: Iterable[socket.socket]) -> None:
    for connection in connections:
        connection.close()
