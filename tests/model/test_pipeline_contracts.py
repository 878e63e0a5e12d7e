from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipestill as ps
from pipestill.errors import ConfigError, DataError, ModelError
from pipestill.model.dry_run import dry_run
from pipestill.model.pipeline_contracts import length_of, sample_lengths, shortened


@pytest.mark.parametrize(
    ("length", "expected"),
    [(64, (32, 48, 64)), (40, (24, 32, 40)), (37, (35, 36, 37)), (8, (4, 6, 8)), (6, (2, 4, 6)), (1, (1, 2, 3))],
)
def test_sample_lengths_are_three_that_halve_as_often(length: int, expected: tuple[int, int, int]) -> None:
    assert sample_lengths(length) == expected


def test_shortened_leaves_what_has_no_such_axis() -> None:
    value = {"tokens": torch.arange(6).view(2, 3), "label": torch.arange(2)}
    got = shortened(1, value, 4)
    assert got["tokens"].tolist() == [[0, 1, 2, 0], [3, 4, 5, 3]]
    assert got["label"] is value["label"]


def test_length_of_names_the_shapes_that_differ() -> None:
    tokens = torch.zeros(2, 5)
    assert length_of(1, tokens, torch.zeros(2), "the batch") == 5
    with pytest.raises(DataError, match=r"batch 3: length_axis is 1.*\(2, 5\), \(2, 7\)"):
        length_of(1, tokens, torch.zeros(2, 7), "batch 3")
    with pytest.raises(DataError, match=r"got shapes \[\(2,\)\]"):
        length_of(1, torch.zeros(2), None, "the batch")


class Blocks(nn.Module):
    """Two blocks: a function of tokens (rows, length), and a linear layer of its features."""

    def __init__(self, start: Any, features: int = 4) -> None:
        super().__init__()
        self.table, self.end, self.start = nn.Embedding(9, 4), nn.Linear(features, 9), start

    def pipeline_blocks(self) -> list[ps.Block]:
        return [
            ps.Block("start", lambda x: self.start(self.table(x)), ("table",)),
            ps.Block("end", lambda v: self.end(v["h"] if isinstance(v, dict) else v), ("end",)),
        ]


def contracts_of(start: Any, length: int = 8) -> Any:
    task = ps.Supervised(Blocks(start), lambda out, target: out.square().mean())
    return dry_run(task, torch.zeros(3, length, dtype=torch.int64), torch.zeros(3), length_axis=1)


def test_contracts_follow_rows_and_length() -> None:
    def start(h: Tensor) -> dict[str, Any]:
        return {
            "h": h.transpose(0, 1), "flat": h.reshape(-1, 4), "pairs": h @ h.transpose(1, 2), "half": h[:, ::2].contiguous(),
            "length": h.shape[1], "all": h.shape[0] * h.shape[1], "kind": "tokens",
        }  # fmt: skip

    contracts = contracts_of(start)
    for rows, length in ((5, 12), (1, 4), (3, 8)):
        value = start(torch.zeros(rows, length, 4))
        contract = contracts.at(length).student[0][0]
        tensors = contract.split(value, rows)
        assert [form.shape_of(rows) for form in contract.values] == [tuple(t.shape) for t in tensors]
        packed = [form.pack(t, rows) for form, t in zip(contract.values, tensors, strict=True)]
        back = [form.unpack(p, rows) for form, p in zip(contract.values, packed, strict=True)]
        assert [t.stride() for t in back] == [t.stride() for t in tensors]
        joined = contract.join(back, rows)
        assert (joined["length"], joined["all"], joined["kind"]) == (length, rows * length, "tokens")


def test_a_length_that_follows_another_law_is_refused_when_it_comes() -> None:
    def start(h: Tensor) -> Tensor:
        return h[:, ::2].contiguous()

    contracts = contracts_of(start)
    with pytest.raises(ModelError, match=r"was float32 \(2, 3, 4\).*now.*\(2, 4, 4\)"):
        contracts.at(7).student[0][0].split(start(torch.zeros(2, 7, 4)), 2)


@pytest.mark.filterwarnings("ignore:the student's 'table.weight' got no gradient")  # at the length that detaches it
def test_what_may_not_change_with_the_length() -> None:
    def structure(h: Tensor) -> Any:
        return {"h": h, "more": h} if h.shape[1] > 6 else {"h": h}

    def words(h: Tensor) -> Any:
        return {"h": h, "kind": "long" if h.shape[1] > 6 else "short"}

    def kinds(h: Tensor) -> Any:
        return {"h": h, "aux": h.double() if h.shape[1] > 6 else h.half()}

    def gradients(h: Tensor) -> Any:
        return {"h": h if h.shape[1] > 6 else h.detach()}

    for start, message in (
        (structure, "structure changes with the length"),
        (words, "changes with the length, to .*long"),
        (kinds, "type or axes change with the length"),
        (gradients, "whether a tensor gets a gradient changes with the length"),
    ):
        with pytest.raises(ModelError, match=message):
            contracts_of(start)


def test_batches_of_another_length_need_the_axis() -> None:
    def batches() -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros(4, n, dtype=torch.int64), torch.zeros(4, n, dtype=torch.int64)) for n in (6, 8)]

    def trainer(**options: Any) -> ps.Trainer:
        model = Blocks(lambda h: h)
        task = ps.Supervised(model, lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()))
        return ps.Trainer(task, devices=2, device="cpu", strategy="1f1b", microbatches=2, **options)

    assert trainer(length_axis=1).fit(batches()).steps == 2
    with pytest.raises(ModelError, match="length_axis"):
        trainer().fit(batches())
    with pytest.raises(ConfigError, match="length_axis is 0; expected 1 or more"):
        trainer(length_axis=0)
