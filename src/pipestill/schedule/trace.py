"""Actions with start and end: what a simulation predicts and what an executor records."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import median

from pipestill.schedule.action import Action, Op, Role


@dataclass(frozen=True, slots=True)
class Event:
    """One action on one rank, from `start` to `end` in seconds of a clock that all ranks share."""

    rank: int
    action: Action
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """The seconds that the action took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that ranks computed, in the order of each rank.

    All figures describe the steady state: the middle third of the steps, which leaves out warm-up and cool-down, and
    without the intervals after `interruptions`, the steps that something else followed (a validation).
    """

    num_ranks: int
    events: tuple[Event, ...]
    interruptions: frozenset[int] = frozenset()
    by_block: bool = False
    """Pictures tell work apart by its block and give seconds per batch; otherwise by its microbatch, and seconds per step."""
    batches_per_step: int = 1

    def steps(self) -> list[int]:
        """The longest run of consecutive steps, up to the last one, whose every update is in the trace."""
        steps = sorted(self._update_ends())
        gaps = [i for i in range(1, len(steps)) if steps[i] != steps[i - 1] + 1]
        return steps[gaps[-1] :] if gaps else steps

    def _update_ends(self) -> dict[int, float]:
        """Find when the last update of each step ended, of complete steps and of windows that an epoch's end cut short."""
        ends, complete = self._updates()
        return {step: end for step, end in ends.items() if step in complete or self.batches_per_step > 1}

    def _updates(self) -> tuple[dict[int, float], set[int]]:
        """Find when the last update of each step ended, and the steps that have all updates."""
        ends = defaultdict[int, list[float]](list)
        for event in self.events:
            if event.action.op is Op.UPDATE:
                ends[event.action.step].append(event.end)
        most = max((len(e) for e in ends.values()), default=0)
        return {step: max(e) for step, e in ends.items()}, {step for step, e in ends.items() if len(e) == most}

    def step_seconds(self) -> list[float]:
        """Seconds from the end of one steady step to the end of the next."""
        ends = self._update_ends()
        return [ends[k + 1] - ends[k] for k in self._steady()]

    def _steady(self) -> list[int]:
        """The steps k whose interval, end of k to end of k + 1, is steady: the middle third of them, without interruptions."""
        complete = self._updates()[1]
        steps = [k for k in self.steps()[:-1] if k not in self.interruptions and k + 1 in complete]
        skip = len(steps) // 3
        return steps[skip : len(steps) - skip]

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a steady step; 0 when fewer than two steps were traced."""
        seconds = self.step_seconds()
        return sum(seconds) / len(seconds) if seconds else 0.0

    @property
    def median_seconds_per_step(self) -> float:
        """Median seconds of a steady step; 0 when fewer than two steps were traced."""
        seconds = self.step_seconds()
        return median(seconds) if seconds else 0.0

    def busy_seconds_per_step(self) -> list[float]:
        """For each rank, the seconds of work in one steady step."""
        steady = self._steady()
        busy = [0.0] * self.num_ranks
        for event in self.events:
            if event.action.step - 1 in steady:
                busy[event.rank] += event.seconds
        return [seconds / len(steady) if steady else 0.0 for seconds in busy]

    @property
    def utilisation(self) -> float:
        """The fraction of rank-time in the steady state in which ranks work, 0 to 1."""
        seconds = self.seconds_per_step
        return min(1.0, sum(self.busy_seconds_per_step()) / (self.num_ranks * seconds)) if seconds else 0.0

    @property
    def bubble(self) -> float:
        """The fraction of rank-time in the steady state in which ranks are idle."""
        return 1.0 - self.utilisation

    @property
    def stash_peak(self) -> tuple[int, ...]:
        """For each rank, the most units of the student held between their forward and the end of their backward."""
        held = [0] * self.num_ranks
        peak = [0] * self.num_ranks
        for event in self.events:
            if event.action.role is Role.STUDENT and event.action.op is Op.FORWARD:
                held[event.rank] += 1
                peak[event.rank] = max(peak[event.rank], held[event.rank])
            elif event.action.op in (Op.BACKWARD, Op.WEIGHT):
                held[event.rank] -= 1
        return tuple(peak)

    def steady_window(self, num_steps: int = 2) -> tuple[float, float]:
        """Start and end, in seconds, of `num_steps` steady steps (at least one), or of everything if none is steady."""
        ends = self._update_ends()
        steady = self._steady()
        if not steady:
            times = [t for e in self.events for t in (e.start, e.end)]
            return (min(times), max(times)) if times else (0.0, 0.0)
        last = first = steady[0]
        while last + 1 in steady and last + 1 < first + num_steps:
            last += 1
        return ends[first], ends[last + 1]
