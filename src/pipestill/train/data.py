"""Reading the user's loader in the background, epoch after epoch, as batches that a schedule can run."""

import queue
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, closing, suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from pipestill.arguments import shown
from pipestill.errors import DataError, PipestillError, UserError
from pipestill.losses.targets import IGNORED
from pipestill.model.nests import copied, describe, distinct_tensors, num_rows, rows_of
from pipestill.model.pipeline_contracts import length_of
from pipestill.model.seeding import OwnGenerator, derive
from pipestill.runtime.batch import Batch

_AHEAD = 2  # batches that are read and not taken yet
_CLOSE_SECONDS = 1.0

SplitBatch = Callable[[Any], tuple[Any, Any]]


class LoaderError(PipestillError):
    """The user's loader raised an exception."""


def _without_traceback(error: PipestillError) -> PipestillError:
    """The error with its own message, where a DataLoader's worker put the text of a traceback before it."""
    text, kind = str(error), type(error)
    _, found, message = text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
    if not (found and isinstance(error, UserError) and text.startswith(f"Caught {kind.__name__} in DataLoader worker")):
        return error
    return kind(message.strip())


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Take a pair for (inputs, targets), and anything else for inputs without targets."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def split_item(split_batch: SplitBatch, item: Any, what: str) -> tuple[Any, Any]:
    """Split what a loader yields into inputs and targets with the user's function; `DataError` where that gives no pair."""
    pair = split_batch(item)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"split_batch made {describe(pair)} of {what}; expected a pair (inputs, targets)")
    return pair[0], pair[1]


def check_loader(loader: object, passes: int | None, name: str = "the loader") -> None:
    """Raise `DataError` for what is no loader, or cannot be read `passes` times (None: any number of times)."""
    if not isinstance(loader, Iterable) and not hasattr(type(loader), "__getitem__"):
        raise DataError(f"{name} is {shown(loader)}; expected an iterable of batches, such as a DataLoader or a list")
    if passes is not None and passes > 1 and isinstance(loader, (Generator, map, filter, zip, enumerate)):
        raise DataError(
            f"{name} is a {type(loader).__name__}, which can be read once only, and it is to be read {passes} times; give a "
            "list, a DataLoader, or an object whose __iter__ starts anew"
        )


def form_of(value: Any) -> tuple[Any, ...]:
    """The form that all batches of a loader share: the structure of a nest, and the type of everything in it."""
    leaves, spec = pytree.tree_flatten(value)
    return spec, *((leaf.dtype, leaf.layout) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)


@dataclass(eq=False)
class Reader:
    """An iterator of `Batch`es over `epochs` passes of `loader`, cut off after `steps`, read ahead by a thread.

    The thread draws random numbers from a generator seeded by (seed, epoch), so that shuffling and augmentation are
    the same on every run and independent of the models. The loader, its sampler, its batch sampler and its data set are told the
    epoch (`set_epoch`), where they have such a method. `length_axis`: batches may differ in the size of that axis. `counts`:
    from a batch's targets to how much they count for, by part of the loss (default: all parts are means over rows). An exception
    in the loader is raised here as `LoaderError`; waiting for a batch has a deadline.
    """

    loader: Iterable[Any]
    _: KW_ONLY
    epochs: int | None
    steps: int | None
    seed: int
    split_batch: SplitBatch = inputs_and_targets
    length_axis: int | None = None
    counts: Callable[[Any], Mapping[str, float]] | None = None
    timeout_seconds: float = 600.0
    num_batches: int = field(default=0, init=False)
    """How many batches were handed out; one that was only looked at is not counted."""
    num_samples: int = field(default=0, init=False)
    """The rows of these batches."""

    def __post_init__(self) -> None:
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self._stop = threading.Event()
        self._peeked: Batch | None = None
        self._ended = False
        self._first: dict[str, tuple[Any, str]] = {}
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="pipestill-reader", daemon=True)
        self._thread.start()

    def peek(self) -> Batch:
        """The next batch, which stays the next."""
        if self._peeked is None:
            self._peeked = self._receive()
        return self._peeked

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.peek()
        self._peeked = None
        if batch.counts and not any(batch.counts.values()) and not self._warned:
            self._warned = True
            parts = ", ".join(batch.counts)
            warnings.warn(
                f"nothing counts in batch {self.num_batches} (all of its labels are ignored, say): {parts} of the loss are 0, "
                "with gradients of zero; the optimizer makes its step all the same. This is said once a run",
                stacklevel=2,
            )
        self.num_batches += 1
        self.num_samples += batch.rows
        return batch

    def _receive(self) -> Batch:
        """Wait for the next batch of the thread; `StopIteration` after the last."""
        if self._ended:
            raise StopIteration
        try:
            item = self._queue.get(timeout=self.timeout_seconds)
        except queue.Empty:
            raise LoaderError(
                f"waited {self.timeout_seconds:g} s for batch {self.num_batches} from the loader; "
                "raise timeout_seconds if it is meant to take that long"
            ) from None
        self._ended = not isinstance(item, Batch)
        if isinstance(item, BaseException):
            raise item
        if item is None:
            raise StopIteration
        return item

    def close(self) -> None:
        """Drop what was read ahead and end the thread; one that is stuck inside the loader is left to itself."""
        self._stop.set()
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(None)
        except PipestillError as error:
            self._put(_without_traceback(error))
        except BaseException as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip().replace("\n", " ")
            wrapped = LoaderError(f"the loader failed: {type(error).__name__}: {error} ({where})")
            wrapped.__cause__ = error
            self._put(wrapped)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self) -> Iterator[Batch]:
        """Yield each batch once it is known whether another follows in its epoch."""
        count = 0
        epoch = 0
        while (self.epochs is None or epoch < self.epochs) and (self.steps is None or count < self.steps):
            waiting: Batch | None = None
            for batch in self._epoch(epoch):
                if waiting is not None:
                    yield waiting
                count += 1
                waiting = batch
                if count == self.steps:
                    break
            if waiting is None:
                again = "; can it be read once only, as a generator?" if epoch else ""
                raise DataError(f"the loader gave no batch in epoch {epoch}; expected at least one{again}")
            yield replace(waiting, last=True)
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Batch]:
        parts = (self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler", "dataset")))
        for set_epoch in (getattr(part, "set_epoch", None) for part in parts):
            if callable(set_epoch):
                set_epoch(epoch)
        generator = torch.Generator().manual_seed(derive(self.seed, "data", epoch))
        with OwnGenerator(generator):
            for index, item in enumerate(self.loader):
                inputs, targets = split_item(self.split_batch, item, f"batch {index}")
                rows = num_rows(inputs, f"batch {index}")
                if rows == 0:
                    raise DataError(f"batch {index} has no rows; expected at least one sample a batch")
                if distinct_tensors(targets) and (found := num_rows(targets, f"targets of batch {index}")) != rows:
                    raise DataError(f"batch {index} has {rows} rows of inputs and {found} of targets")
                axis = self.length_axis
                length = 0 if axis is None else length_of(axis, inputs, targets, f"batch {index}")
                # It is read ahead, and a loader may fill the same tensors again for its next batch.
                counts = self.counts(targets) if self.counts is not None else {}
                batch = Batch(rows, epoch, False, copied(inputs), copied(targets), length, counts)
                self._check_like_first(batch, index)
                yield batch

    def _check_like_first(self, batch: Batch, index: int) -> None:
        """Raise `DataError` where a batch has another form than the first: a part of it might be dropped in silence."""
        for name, value in (("inputs", batch.inputs), ("targets", batch.targets)):
            form = form_of(value)
            first, shown = self._first.setdefault(name, (form, describe(value)))
            if form != first:
                raise DataError(
                    f"batch {index} of epoch {batch.epoch} has {name} {describe(value)}, and the first batch had {shown}; "
                    "all batches must have the same structure and types"
                )


@dataclass(eq=False)
class DataOpener:
    """Opens the same data each time it is called, and closes its readers with `readers`.

    The reader that was opened to look at the first batch is what the first call gives: some data can be read once only.
    """

    readers: ExitStack
    make: Callable[[], Reader]
    _waiting: Reader | None = None
    _last: Reader | None = None

    def peek(self) -> Batch:
        """The first batch."""
        self._waiting = self()
        return self._waiting.peek()

    def __call__(self) -> Reader:
        if self._waiting is not None:
            reader, self._waiting = self._waiting, None
            return reader
        self._last = self.readers.enter_context(closing(self.make()))
        return self._last

    def counts(self) -> tuple[int, int]:
        """How many batches and rows the last reader has handed out; none where nothing was read."""
        return (self._last.num_batches, self._last.num_samples) if self._last else (0, 0)


def sample(batch: Batch, rows: int = 3) -> tuple[Any, Any]:
    """A few rows of a batch, for the dry run: the first ones, or those with the fewest and the most ignored labels.

    A loss that is a mean over labels shows only where rows differ in how many they have.
    """
    labels = [t for t in distinct_tensors(batch.targets) if t.dtype in (torch.int64, torch.int32) and t.numel()]
    ignored = sum((t.reshape(batch.rows, -1) == IGNORED).sum(1) for t in labels) if labels else torch.zeros(batch.rows)
    assert isinstance(ignored, Tensor)
    few: slice | Tensor = slice(0, rows)
    if batch.rows > rows and bool((ignored != ignored[0]).any()):
        order = ignored.argsort(stable=True)
        few = torch.cat([order[:1], order[-1:], order[1:-1]])[:rows]
    return rows_of(batch.inputs, few), rows_of(batch.targets, few)


def batch_sizes(loader: Iterable[Any], steps: int | None) -> set[int]:
    """The numbers of rows that a loader's batches are known to have beforehand, in the first `steps` of them (None: all)."""
    if isinstance(loader, DataLoader) and loader.batch_size is not None:
        try:
            full, short = divmod(len(loader.sampler), loader.batch_size)  # type: ignore[arg-type]
        except TypeError:  # an iterable dataset, which does not tell
            return set()
        ends = short and not loader.drop_last and (steps is None or steps > full)
        return ({loader.batch_size} if full else set()) | ({short} if ends else set())
    if isinstance(loader, (list, tuple)):
        tensors = [distinct_tensors(item)[:1] for item in loader[:steps]]
        return {tensor.shape[0] for found in tensors for tensor in found if tensor.dim()}
    return set()


def total_steps(loader: Iterable[Any], epochs: int | None, steps: int | None) -> int | None:
    """How many steps a run has; None where the loader does not tell its length."""
    if epochs is None:
        return steps
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that refuses
        length = None
    return None if length is None else min(epochs * length, steps or epochs * length)
