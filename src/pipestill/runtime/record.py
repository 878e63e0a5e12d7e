"""Records when each action really started and ended, and the peak memory of a rank."""

import resource
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pipestill.schedule import Action, Event


class Recorder:
    """Times one rank's actions. It keeps those of the last `num_steps` steps only, so that memory does not grow with the run.

    On CUDA, work is timed by events on the current stream, which are read when `events` is called.
    """

    def __init__(self, rank: int, device: torch.device, num_steps: int = 48) -> None:
        self.rank = rank
        self.device = device
        self._steps: deque[tuple[int, list[tuple[Action, object, object]]]] = deque(maxlen=num_steps)
        self._interruptions: deque[int] = deque(maxlen=num_steps)
        self.busy_seconds = 0.0
        """Seconds of all work so far; 0 on CUDA."""
        self._origin = (time.perf_counter(), _cuda_event(device))

    @contextmanager
    def working(self, action: Action) -> Iterator[None]:
        """Time the body as `action`."""
        start = self._now()
        yield
        self._keep(action, start, self._now())

    def _now(self) -> object:
        return _cuda_event(self.device) if self.device.type == "cuda" else time.perf_counter()

    def _keep(self, action: Action, start: object, end: object) -> None:
        for step, events in reversed(self._steps):
            if step == action.step:
                events.append((action, start, end))
                break
        else:
            self._steps.append((action.step, [(action, start, end)]))
        if isinstance(start, float) and isinstance(end, float):
            self.busy_seconds += end - start

    def interrupted_after(self, step: int) -> None:
        """Note that a validation, and not the next step, followed `step`."""
        self._interruptions.append(step)

    def interruptions(self) -> frozenset[int]:
        """The steps after which a validation ran; idle time there does not count as a bubble."""
        return frozenset(self._interruptions)

    def events(self) -> list[Event]:
        """The recorded events in seconds of the host's monotonic clock, in the order in which they started."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        kept = [Event(self.rank, a, self._seconds(s), self._seconds(e)) for _, es in self._steps for a, s, e in es]
        return sorted(kept, key=lambda event: event.start)

    def _seconds(self, moment: object) -> float:
        if isinstance(moment, float):
            return moment
        assert isinstance(moment, torch.cuda.Event) and isinstance(self._origin[1], torch.cuda.Event)
        return self._origin[0] + float(self._origin[1].elapsed_time(moment)) / 1e3


def _cuda_event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def reset_peak(device: torch.device) -> None:
    """Start measuring anew, where the system can: CUDA's allocator always, resident memory on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # only Linux has it, and a sandbox may forbid it: then the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak of CUDA's allocator, or of the process's resident memory on CPU, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
