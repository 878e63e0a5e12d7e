"""The transport between processes of one machine: tensors lie in shared memory, notes about them go over Unix sockets.

Gloo sends tensors through TCP, which costs both ranks' cores several copies and wake-ups a message; here the sender copies a
tensor once, and the receiver once, and nothing runs beside the ranks' own work.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import select
import socket
import struct
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from pipestill.errors import TransportError
from pipestill.runtime.transport.message import UNDER_WAY, Message, Queue, queue_of, tag
from pipestill.runtime.transport.protocol import Transport

T = TypeVar("T")

_NUMBER = struct.Struct("<q")
_HEADER = struct.Struct("<qqq")  # of a message: its tag, its slot, its bytes; of notes: _NOTES, how many announce, 0
_NOTES = -1
_INLINE = -1  # in the place of a slot: the bytes follow the header
_INLINE_BYTES = 512  # a socket holds more packets of that than can be under way
_MOST_NOTES = 8  # that a rank keeps to itself, so as not to send a packet for each
_NOTES_A_PACKET = 100  # of either kind
_PACKET_BYTES = _HEADER.size + max(_INLINE_BYTES, 2 * _NOTES_A_PACKET * _NUMBER.size)
_LOOK_EVERY = 16  # calls, for a rank that never has to wait
_LONGEST_POLL = 2**31 - 1


class SharedMemory:
    """One rank's lanes to the `peers` of its machine; those to all other ranks go through `elsewhere`. For CPU tensors.

    A send does not wait, until `UNDER_WAY` of a queue to one rank have not been announced by it (or `_MOST_NOTES` more, which
    it may have kept to itself): so a schedule that ends where every send waits for its receive, ends here.
    """

    def __init__(self, timeout_seconds: float, peers: dict[int, socket.socket], elsewhere: Transport) -> None:
        self.rank = dist.get_rank()
        self.timeout_seconds = timeout_seconds
        self.elsewhere = elsewhere
        self.peers = {rank: _Peer(rank, connection) for rank, connection in peers.items()}
        self.by_descriptor = {peer.descriptor: peer for peer in self.peers.values()}
        self.poll = select.poll()
        for descriptor in self.by_descriptor:
            self.poll.register(descriptor, select.POLLIN)
        self.posted: dict[Message, _Posted] = {}
        self.calls = 0
        weakref.finalize(self, _close, list(peers.values()))

    def send(self, message: Message, tensors: Sequence[Tensor]) -> None:
        peer = self.peers.get(message.destination)
        if peer is None:
            self.elsewhere.send(message, tensors)
            return
        self._look()
        size = sum(tensor.nbytes for tensor in tensors)
        if size > _INLINE_BYTES and not peer.free.get(_capacity(size)):
            self._serve(0)  # receipts may free a slot
        peer.put(message, tensors)
        self._push(peer)
        if peer.deaf:
            raise TransportError(f"rank {self.rank} sends {message}: {peer.farewell}")
        open_sends = peer.unannounced[queue_of(message)]
        self._wait_for_takers(peer, open_sends, UNDER_WAY + _MOST_NOTES)

    def post(self, message: Message, buffers: Sequence[Tensor]) -> None:
        peer = self.peers.get(message.source)
        if peer is None:
            self.elsewhere.post(message, buffers)
            return
        self._look()
        posted = self.posted[message] = _Posted(message, list(buffers))
        assert all(buffer.is_cpu and buffer.is_contiguous() for buffer in buffers)
        peer.expect(tag(message, 0), posted)
        if peer.num_notes >= _MOST_NOTES:
            self._push(peer)

    def arrived(self, message: Message) -> bool:
        peer = self.peers.get(message.source)
        if peer is None:
            self._push_all()
            return self.elsewhere.arrived(message)
        if message not in self.posted:
            raise TransportError(f"rank {self.rank} waits for {message}, but never announced the receive")
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

    def flush(self, segment: int) -> None:
        for message in [m for m in self.posted if m.segment == segment]:
            self.arrived(message)  # only the order was about it
        for peer in self.peers.values():
            for beside in (False, True):
                self._wait_for_takers(peer, peer.unannounced[segment, beside], 0)
            self._wait_to_say_all(peer)
        self.elsewhere.flush(segment)

    def _wait_to_say_all(self, peer: _Peer) -> None:
        self._push(peer)
        self._wait(lambda: not peer.outgoing or peer.gone, peer, f"still has notes for rank {peer.rank}")

    def _wait_for_takers(self, peer: _Peer, open_sends: dict[int, Message], most: int) -> None:
        """Wait until at most so many sends have not been announced."""
        if len(open_sends) > most:
            what = f"waits until rank {peer.rank} takes {next(iter(open_sends.values()))}"
            self._wait(lambda: len(open_sends) <= most, peer, what)

    def _wait(self, done: Callable[[], bool], peer: _Peer, what: str) -> None:
        if done():
            return
        deadline = time.monotonic() + self.timeout_seconds
        self._push_all()
        while not done():
            left = deadline - time.monotonic()
            if peer.gone:
                raise TransportError(f"rank {self.rank} {what}: {peer.farewell}")
            if left <= 0:
                raise TransportError(f"rank {self.rank} {what} (deadline {self.timeout_seconds:g} s): nothing came")
            self._serve(left)

    def _look(self) -> None:
        """Read what has come, every few calls: a rank that never waits should not let its sockets fill."""
        self.calls += 1
        if self.calls % _LOOK_EVERY == 0:
            self._serve(0)

    def _serve(self, seconds: float) -> None:
        """Read what has come from any peer, waiting up to `seconds` for something."""
        for descriptor, events in self.poll.poll(min(math.ceil(seconds * 1000), _LONGEST_POLL)):
            peer = self.by_descriptor[descriptor]
            if events & ~select.POLLOUT:
                peer.read()
            if peer.gone:
                del self.by_descriptor[descriptor]
                self.poll.unregister(descriptor)
            elif peer.outgoing:
                self._push(peer)

    def _push_all(self) -> None:
        """Send all notes before this rank waits for something else: other ranks may wait for them."""
        for peer in self.peers.values():
            if peer.num_notes or peer.outgoing:
                self._push(peer)

    def _push(self, peer: _Peer) -> None:
        """Send a peer what its socket takes now, and the rest when it has room."""
        peer.push()
        wanted = select.POLLIN | (select.POLLOUT if peer.outgoing else 0)
        if wanted != peer.polled and not peer.gone:
            peer.polled = wanted
            self.poll.modify(peer.descriptor, wanted)


@dataclass(slots=True)
class _Posted:
    """A receive that was announced, and whether its message has arrived."""

    message: Message
    buffers: list[Tensor]
    here: bool = False


@dataclass(frozen=True, slots=True)
class _Slot:
    """Memory that two processes share, for one message at a time, and its address in this one."""

    number: int
    memory: mmap.mmap
    address: int


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A message of `size` bytes that has come: the bytes themselves, or the slot that holds them."""

    size: int
    content: bytes | _Slot


@dataclass(slots=True)
class _Peer:
    """The connection to another rank, and what is under way both ways.

    `gone`: nothing more will come from it. `deaf`: it reads nothing any more.
    """

    rank: int
    connection: socket.socket
    descriptor: int = -1
    polled: int = 0
    gone: bool = False
    deaf: bool = False
    outgoing: deque[tuple[bytes, int | None]] = field(default_factory=deque)  # packets, and descriptors to go along

    # As a sender. Sends and announcements of one tag meet in their order, whichever comes first.
    slots: list[_Slot] = field(default_factory=list)
    free: dict[int, list[_Slot]] = field(default_factory=dict)  # by their bytes
    count: int = 0
    unannounced: defaultdict[Queue, dict[int, Message]] = field(default_factory=lambda: defaultdict(dict))
    sent_first: dict[int, deque[tuple[Queue, int]]] = field(default_factory=dict)
    announced_first: Counter[int] = field(default_factory=Counter)

    # As a receiver.
    theirs: dict[int, _Slot] = field(default_factory=dict)
    early: dict[int, deque[_Arrival]] = field(default_factory=dict)
    expected: dict[int, deque[_Posted]] = field(default_factory=dict)
    announced: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection.setblocking(False)
        self.descriptor = self.connection.fileno()
        self.polled = select.POLLIN

    @property
    def farewell(self) -> str:
        return f"rank {self.rank} has ended (connection closed)"

    @property
    def num_notes(self) -> int:
        return len(self.announced) + len(self.taken)

    def put(self, message: Message, tensors: Sequence[Tensor]) -> None:
        """Copy tensors to where the peer finds them, and line up the packet that tells it."""
        key, queue = tag(message, 0), queue_of(message)
        if self.announced_first[key]:
            self.announced_first[key] -= 1
        else:
            self.count += 1
            self.unannounced[queue][self.count] = message
            self.sent_first.setdefault(key, deque()).append((queue, self.count))
        dense = [tensor.contiguous() for tensor in tensors]
        assert all(tensor.is_cpu for tensor in dense)
        size = sum(tensor.nbytes for tensor in dense)
        if size <= _INLINE_BYTES:
            inline = (ctypes.string_at(tensor.data_ptr(), tensor.nbytes) for tensor in dense)
            self.outgoing.append((b"".join((_HEADER.pack(key, _INLINE, size), *inline)), None))
            return
        slot, descriptor = self._slot(size)
        place = slot.address
        for tensor in dense:
            ctypes.memmove(place, tensor.data_ptr(), tensor.nbytes)
            place += tensor.nbytes
        self.outgoing.append((_HEADER.pack(key, slot.number, size), descriptor))

    def _slot(self, size: int) -> tuple[_Slot, int | None]:
        """A free slot, or a new one and its descriptor, which the peer does not know yet."""
        free = self.free.setdefault(_capacity(size), [])
        if free:
            return free.pop(), None
        descriptor = os.memfd_create("pipestill", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _capacity(size))
        self.slots.append(_map(len(self.slots), descriptor))
        return self.slots[-1], descriptor

    def expect(self, key: int, posted: _Posted) -> None:
        """Announce a receive; fill its buffers with what is here already, or once it comes."""
        self.announced.append(key)
        if key in self.early:
            self._fill(posted, _first(self.early, key))
        else:
            self.expected.setdefault(key, deque()).append(posted)

    def read(self) -> None:
        """Read everything that has come over the connection."""
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
            key, slot, size = _HEADER.unpack_from(packet)
            if key == _NOTES:
                self._note([number for (number,) in _NUMBER.iter_unpack(packet[_HEADER.size :])], announcements=slot)
                continue
            for descriptor in descriptors:
                self.theirs[slot] = _map(slot, descriptor)
                os.close(descriptor)
            if slot != _INLINE and slot not in self.theirs:
                raise OSError(errno.EMFILE, "no file descriptor is left to share memory with; raise 'ulimit -n'")
            arrival = _Arrival(size, packet[_HEADER.size :] if slot == _INLINE else self.theirs[slot])
            if key in self.expected:
                self._fill(_first(self.expected, key), arrival)
            else:
                self.early.setdefault(key, deque()).append(arrival)

    def _note(self, numbers: list[int], announcements: int) -> None:
        """Take note of tags that the peer has announced, and of slots that it has emptied."""
        for key in numbers[:announcements]:
            if key in self.sent_first:
                queue, number = _first(self.sent_first, key)
                del self.unannounced[queue][number]
            else:
                self.announced_first[key] += 1
        for number in numbers[announcements:]:
            slot = self.slots[number]
            self.free[len(slot.memory)].append(slot)

    def _fill(self, posted: _Posted, arrival: _Arrival) -> None:
        size = sum(buffer.nbytes for buffer in posted.buffers)
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
        if isinstance(arrival.content, _Slot):
            self.taken.append(arrival.content.number)

    def push(self) -> None:
        """Send notes and packets, as far as the connection takes them now."""
        while self.num_notes:
            announced, taken = self.announced[:_NOTES_A_PACKET], self.taken[:_NOTES_A_PACKET]
            notes = map(_NUMBER.pack, (*announced, *taken))
            self.outgoing.append((b"".join((_HEADER.pack(_NOTES, len(announced), 0), *notes)), None))
            self.announced = self.announced[_NOTES_A_PACKET:]
            self.taken = self.taken[_NOTES_A_PACKET:]
        while self.outgoing:
            packet, descriptor = self.outgoing[0]
            try:
                if self.deaf or self.gone:
                    pass
                elif descriptor is None:
                    self.connection.send(packet)
                else:
                    socket.send_fds(self.connection, [packet], [descriptor])
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):  # what it said before it ended is still to be read
                self.deaf = True
            if descriptor is not None:
                os.close(descriptor)
            self.outgoing.popleft()


def _capacity(size: int) -> int:
    """The bytes of a slot for a message of `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


def _map(number: int, descriptor: int) -> _Slot:
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    return _Slot(number, memory, ctypes.addressof(ctypes.c_char.from_buffer(memory)))


def _first(queues: dict[int, deque[T]], key: int) -> T:
    """Take the first of what waits under `key`."""
    queue = queues[key]
    first = queue.popleft()
    if not queue:
        del queues[key]
    return first


def _close(connections: Iterable[socket.socket]) -> None:
    for connection in connections:
        connection.close()
