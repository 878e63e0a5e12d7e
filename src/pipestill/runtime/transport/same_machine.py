"""Finds out which ranks are on one machine, and connects them by sockets."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

_RANK = struct.Struct("<q")


def may_share_memory() -> bool:
    """Whether this process may share memory: on Linux, unless PIPESTILL_SHARED_MEMORY is 0."""
    able = sys.platform == "linux" and hasattr(os, "memfd_create")  # Pythons for an old C library lack it
    return able and os.environ.get("PIPESTILL_SHARED_MEMORY", "1") != "0"


def connect_peers(ranks: Sequence[int], group: dist.ProcessGroup | None, timeout_seconds: float) -> dict[int, socket.socket]:
    """Connect to each of the other `ranks` that is on this machine, in the same network namespace, and may share memory.

    All ranks call this together, also those that may not. They exchange nothing but random names of sockets in the abstract
    namespace, which only processes of one machine can connect to; the names vanish with the sockets, however a process ends.
    """
    here, name = dist.get_rank(), b"\0pipestill-" + secrets.token_hex(16).encode()
    found: dict[int, socket.socket] = {}
    if not may_share_memory():
        for nothing in (b"", list[int]()):
            _gathered(nothing, len(ranks), group)
        return found
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen(len(ranks))
        listener.settimeout(timeout_seconds)
        for rank, theirs in zip(ranks, _gathered(name, len(ranks), group), strict=True):
            client = _connect(theirs) if rank < here and theirs else None
            if client is not None:
                client.send(_RANK.pack(here))
                found[rank] = client
        callers = sum(here in called for called in _gathered(sorted(found), len(ranks), group))
        while callers:
            accepted, _ = listener.accept()
            if not _same_user(accepted):
                accepted.close()
                continue
            accepted.settimeout(timeout_seconds)
            (caller,) = _RANK.unpack(accepted.recv(_RANK.size))
            found[caller] = accepted
            callers -= 1
    return found


def _connect(name: bytes) -> socket.socket | None:
    """Connect to socket `name`; None where its rank is on another machine or belongs to another user."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        client.connect(name)
        if _same_user(client):
            return client
    except OSError:
        pass
    client.close()
    return None


def _same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user: every user of the machine can see abstract names."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


def _gathered(value: T, count: int, group: dist.ProcessGroup | None) -> list[T]:
    """The values of all ranks, on all of them."""
    box: list[Any] = [None] * count
    dist.all_gather_object(box, value, group=group)
    return box
