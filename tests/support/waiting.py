"""A target of `launch` that waits, in a module that imports next to nothing: its processes are there soon."""

import os
import threading


def print_and_wait() -> None:
    """Say who is there, then wait for ever."""
    os.write(1, f"ready {os.getpid()}\n".encode())  # in one piece
    threading.Event().wait()
