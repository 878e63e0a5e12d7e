"""CIFAR-10 in its own files, read without running anything that a pickle may hold."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pipestill.errors import DataError
from pipestill.recipes.images import Images

CIFAR_FOLDER, CIFAR_PAGE = "cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar.html"


def cifar10(folder: Path) -> Images:
    """Read CIFAR-10's python version: five files to train and one to test.

    Each is a pickled dict of `data`, (rows, 3072) bytes, and `labels`.
    """
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"'{folder}' lacks {', '.join(missing)}; unpack CIFAR-10's python version anew ({CIFAR_PAGE})")
    sets, problems = [], []
    for name in names:
        try:
            sets.append(_cifar_file(folder / name))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{'; '.join(problems)}; unpack CIFAR-10's python version anew ({CIFAR_PAGE})")
    images = torch.cat([images for images, _ in sets[:-1]])
    labels = torch.cat([labels for _, labels in sets[:-1]])
    return Images(TensorDataset(images, labels), TensorDataset(*sets[-1]), 3, 32, 10)


class _PlainPickle(pickle.Unpickler):
    """Reads arrays and plain values only: a pickle may otherwise run anything."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED and module.partition(".")[0] in ("numpy", "_codecs"):
            module = module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and CIFAR-10 holds arrays only")


def _cifar_file(path: Path) -> tuple[Tensor, Tensor]:
    try:
        content = _PlainPickle(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from None
    except Exception as error:  # a broken pickle raises almost anything
        raise DataError(f"'{path}' is no file of CIFAR-10: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"'{path}' is no file of CIFAR-10: it holds a {type(content).__name__}, expected a dict")
    named = {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}
    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        came = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"'{path}' is no file of CIFAR-10: 'data' is {came}, expected uint8 (rows, 3072)")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(x in range(10) for x in labels):
        count = f"{len(labels)} values" if isinstance(labels, list) else type(labels).__name__
        raise DataError(f"'{path}' is no file of CIFAR-10: 'labels' is {count}, expected {len(data)} from 0 to 9")
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels)
