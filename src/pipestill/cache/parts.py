"""Files of a teacher cache: each holds the entries of some samples, and has the hash of its content as its name.

| tensor | shape | |
|---|---|---|
| `keys` | (samples, 3) | the hash of the sample's inputs, two words, and that of its place |
| `starts` | (samples + 1,) | the first token of each sample, and the end of the last |
| `values` | (tokens, k) | the teacher's largest logits, in order; minus the largest where the cache's type is less exact |
| `ids` | (tokens, k) | which they are |
| `tails` | (tokens, temperatures) | logarithm of the sum of exponentials of all others / T, likewise; float64 |
| `hidden.NAME` | (tokens, ...) | a further output of the teacher |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipestill.cache.keys import Key
from pipestill.cache.manifest import write_whole
from pipestill.errors import DataError

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What a teacher said of one sample."""

    key: Key
    place: int
    """The hash of the place that the sample is from."""
    tensors: Mapping[str, Tensor]
    """`values`, `ids`, `tails` and hidden states; the first axis counts tokens."""

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_part(folder: Path, entries: Sequence[Entry]) -> Path:
    """Write entries into a new file of a cache's folder."""
    starts = torch.tensor([0, *(len(entry.tensors["values"]) for entry in entries)]).cumsum(0)
    keys = torch.tensor([[*entry.key, entry.place] for entry in entries], dtype=torch.int64)
    joined = {name: torch.cat([entry.tensors[name] for entry in entries]) for name in entries[0].tensors}
    content = save({"keys": keys, "starts": starts, **joined})
    path = folder / f"{_digest(content)}{SUFFIX}"
    write_whole(path, content)
    return path


def _digest(content: Any) -> str:
    return blake2b(content, digest_size=16).hexdigest()


class Part:
    """One file of a cache, whose tensors are read from disk as they are needed.

    The content is compared with the hash when an entry is first read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verified = False
        self._file: Any = None
        try:
            with safe_open(str(path), framework="pt") as file:
                self.keys = file.get_tensor("keys").numpy()
                """(samples, 3)."""
                self.starts = file.get_tensor("starts").numpy()
                """(samples + 1,)."""
                self.names = tuple(name for name in file.keys() if name not in ("keys", "starts"))  # noqa: SIM118 (no dict)
                lengths = {name: file.get_slice(name).get_shape()[0] for name in self.names}
        except (SafetensorError, OSError, KeyError) as error:
            raise self._damaged(str(error)) from None
        if len(self.starts) != len(self.keys) + 1 or set(lengths.values()) != {int(self.starts[-1])}:
            raise self._damaged("its tensors do not fit each other")

    def verify(self) -> None:
        """Raise `DataError` where the content is not what was written."""
        content = np.memmap(self.path, mode="r")
        if _digest(content) != self.path.name.removesuffix(SUFFIX):
            raise self._damaged("its content has not the hash that it was written with")
        self._verified = True

    def read(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of one sample."""
        if not self._verified:
            self.verify()
        if self._file is None:
            self._file = safe_open(str(self.path), framework="pt")
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        tensors: dict[str, Tensor] = {name: self._file.get_slice(name)[start:end] for name in self.names}
        return tensors

    def _damaged(self, why: str) -> DataError:
        return DataError(f"'{self.path}' is damaged or cut off ({why}); delete it, and write what is missing then once more")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
