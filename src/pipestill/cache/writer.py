"""Writes what a teacher says of samples into a cache, while a student is trained or in a pass of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pipestill.arguments import hinted, one_of, raise_problems, real_number, shown, whole
from pipestill.cache.fingerprint import teacher_hash, tokenizer_hash
from pipestill.cache.keys import Key, complete_samples, keys_of
from pipestill.cache.manifest import DTYPES, Manifest
from pipestill.cache.parts import SUFFIX, Entry, Part, write_part
from pipestill.errors import ConfigError, DataError, ModelError

_PIECE = 2**22  # logits that are worked on in float64 at a time


@hinted
class Writer:
    """Adds samples to a teacher cache; use it in a `with` block, whose end writes what is left.

    Files are written whole: a run that is killed loses at most the samples of its last, unfinished file. A sample that the cache
    has is not written again, so a run may go on where another one ended.

    Args:
        folder: the cache's folder; made where it is missing.
        teacher: the teacher, or its hash (`ps.cache.teacher_hash`).
        tokenizer: the tokenizer of the samples' text, or None where samples are no text.
        k: how many logits of each token are kept, the largest.
        dtype: in what they are kept: "float16", "bfloat16" or "float32".
        temperatures: for which temperatures of a loss the mass of all other logits is kept.
        vocabulary: read only the first so many logits of the teacher. Default: all.
        hidden: names of further outputs of the teacher to keep, such as "last_hidden_state": (rows, length, ...).
        part_bytes: the bytes of a file.

    Raises:
        ConfigError: an argument is wrong, or the folder holds a cache of something else.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: nn.Module | str,
        tokenizer: Any = None,
        *,
        k: int = 64,
        dtype: str = "bfloat16",
        temperatures: Sequence[float] = (1.0,),
        vocabulary: int | None = None,
        hidden: Sequence[str] = (),
        part_bytes: int = 64 * 2**20,
    ) -> None:
        problems = [*whole("k", k, 1), *whole("part_bytes", part_bytes, 1)]
        problems += [] if vocabulary is None else whole("vocabulary", vocabulary, 1)
        problems += one_of("temperatures", temperatures, (tuple, list), "a list of numbers above 0")
        problems += [] if problems else [p for t in temperatures for p in real_number("a temperature", t, above=0)]
        if dtype not in DTYPES:
            problems.append(f"dtype is {shown(dtype)}; expected one of {', '.join(DTYPES)}")
        if not temperatures or isinstance(hidden, str):
            problems.append("temperatures are at least one, and hidden is a list of names")
        raise_problems(problems, ConfigError)
        self.folder = Path(folder)
        self.part_bytes = part_bytes
        self.vocabulary = vocabulary
        self.manifest = Manifest(
            teacher if isinstance(teacher, str) else teacher_hash(teacher),
            None if tokenizer is None else tokenizer if isinstance(tokenizer, str) else tokenizer_hash(tokenizer),
            k, dtype, tuple(float(t) for t in temperatures), vocabulary or 0, tuple(hidden),
        )  # fmt: skip
        self._known: set[Key] = set()
        self._places: dict[int, Key] = {}
        """The inputs of each place that this writer has seen: other runs may have cut or written chats in other ways."""
        self._waiting: list[Entry] = []
        self._bytes = 0
        self.num_written = 0
        """How many samples this writer has added."""
        self._continue(Manifest.load(self.folder))

    def _continue(self, found: Manifest | None) -> None:
        """Go on with the cache in the folder, where there is one."""
        if found is None:
            return
        if not self.manifest.vocabulary:
            self.manifest = self._with_vocabulary(found.vocabulary)
        if different := list(found.differences(self.manifest)):
            raise ConfigError(f"the teacher cache '{self.folder}' cannot be added to: {'; '.join(different)}; use another folder")
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            self._known.update((a, b) for a, b, _ in Part(path).keys.tolist())

    def _with_vocabulary(self, vocabulary: int) -> Manifest:
        return Manifest(**{**vars(self.manifest), "vocabulary": vocabulary})

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: object) -> bool:
        return key in self._known

    @torch.no_grad()
    def add(self, output: Any, target: Any) -> None:
        """Add the samples of some rows that are not in the cache yet.

        Args:
            output: the teacher's output of these rows: logits, (rows, ..., vocabulary), or a mapping with `logits`.
            target: their targets, with the keys that `ps.cache.keyed` gives.

        Raises:
            DataError: there are no keys, or the inputs of a place have changed since they were written.
            ModelError: the output has no logits for each key, or they are not finite.
        """
        keys, logits = keys_of(target), _logits(output)
        if logits.shape[:-1] != keys.shape[:-1]:
            raise ModelError(
                f"the teacher's logits are {tuple(logits.shape)} and the keys of samples {tuple(keys.shape)}; expected the same "
                "axes before the last"
            )
        self._check_vocabulary(logits.shape[-1])
        fresh = []
        for key, place, start, length in complete_samples(keys):
            if place and self._places.setdefault(place, key) != key:
                raise DataError(
                    "a teacher cache is of samples whose inputs do not change, and those of one place have changed: are they "
                    "augmented? Switch that off; or where two data sets share the names of their samples, use a writer for each"
                )
            if key not in self._known:
                self._known.add(key)
                fresh.append((key, place, slice(start, start + length)))
        if fresh:
            self._take(output, logits, fresh)

    def _take(self, output: Any, logits: Tensor, fresh: list[tuple[Key, int, slice]]) -> None:
        """Take the entries of new samples from an output, and write a file where there are enough."""
        numbers = torch.cat([torch.arange(place.start, place.stop) for _, _, place in fresh]).to(logits.device)
        flat = logits.reshape(-1, logits.shape[-1])[:, : self.manifest.vocabulary]
        found = self._largest(flat, numbers)
        for name in self.manifest.hidden:
            found[f"hidden.{name}"] = _hidden(output, name, logits)[numbers].to(DTYPES[self.manifest.dtype])
        start = 0
        on_cpu = {name: tensor.cpu() for name, tensor in found.items()}
        for key, place, tokens in fresh:
            end = start + tokens.stop - tokens.start
            entry = Entry(key, place, {name: tensor[start:end].clone() for name, tensor in on_cpu.items()})
            self._waiting.append(entry)
            self._bytes += entry.num_bytes
            start = end
        self.num_written += len(fresh)
        if self._bytes >= self.part_bytes:
            self.flush()

    def _largest(self, logits: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """The largest logits of some tokens, which they are, and what mass is in all others."""
        values, ids, tails = [], [], []
        dtype = DTYPES[self.manifest.dtype]
        exact = torch.promote_types(dtype, logits.dtype) is dtype
        for some in numbers.split(max(1, _PIECE // logits.shape[-1])):
            rows = logits[some]
            largest, which = rows.topk(self.manifest.k, -1)
            if not largest[:, 0].isfinite().all():  # NaN counts as the largest of all
                raise ModelError(
                    "the teacher's logits are not finite (NaN, or infinite at their largest); nothing is kept of them"
                )
            base = largest[:, :1].double()
            rest = rows.double().sub_(base).scatter_(-1, which, -torch.inf)
            sums = [(rest if t == 1.0 else rest / t).exp().sum(-1, keepdim=True) for t in self.manifest.temperatures]
            # A softmax does not heed what is subtracted, and small numbers are rounded less.
            shifts = [base / t if exact else torch.zeros_like(base) for t in self.manifest.temperatures]
            tails.append(torch.cat([s.log().add_(shift) for s, shift in zip(sums, shifts, strict=True)], -1))
            values.append(largest.to(dtype) if exact else (largest.double() - base).to(dtype))
            ids.append(which.int())
        return {"values": torch.cat(values), "ids": torch.cat(ids), "tails": torch.cat(tails)}

    def _check_vocabulary(self, size: int) -> None:
        """Take the teacher's vocabulary where none was given, and refuse one that does not fit."""
        if not self.manifest.vocabulary:
            self.manifest = self._with_vocabulary(size)
        needed = self.manifest.vocabulary
        if size < needed or (self.vocabulary is None and size != needed):
            raise ModelError(f"the teacher gave {size} logits, and the cache is of {needed}; it must always give as many")
        if self.manifest.k > needed:
            raise ModelError(
                f"the cache is to keep k={self.manifest.k} logits, and the teacher gives {needed}; choose a smaller k"
            )

    def flush(self) -> None:
        """Write what was added and is not on disk yet."""
        if not self._waiting:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        found = Manifest.load(self.folder)
        if found is None:
            self.manifest.save(self.folder)
        elif different := list(found.differences(self.manifest)):
            raise ConfigError(
                f"the teacher cache '{self.folder}' was begun by another run: {'; '.join(different)}; use another folder"
            )
        write_part(self.folder, self._waiting)
        self._waiting = []
        self._bytes = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()


def _logits(output: Any) -> Tensor:
    """The logits of a teacher's output."""
    found = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise ModelError(
            f"a teacher cache got {shown(type(found).__name__)} from the teacher; expected logits, or a mapping with 'logits'"
        )
    return found


def _hidden(output: Any, name: str, logits: Tensor) -> Tensor:
    """A further output of the teacher, one row a token."""
    found = output.get(name) if isinstance(output, Mapping) else None
    lead = logits.shape[:-1]
    if not isinstance(found, Tensor) or found.shape[: len(lead)] != lead:
        held = ", ".join(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
        raise ModelError(f"the teacher gave no '{name}' for each token, only {held}; leave it out of hidden")
    return found.reshape(lead.numel(), *found.shape[len(lead) :])
