"""Models as blocks that keep the names of the unsplit model."""

import pytest
import torch
from torch import Tensor, nn

from pipestill import Block, BlockModel
from pipestill.errors import ModelError
from pipestill.model.blocks import ranges


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 3))), nn.BatchNorm1d(3))


class Declared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scale = nn.Parameter(torch.ones(4))

    def last(self, x: Tensor) -> Tensor:
        return self.body[1](x) * self.scale

    def pipeline_blocks(self) -> list[str | Block]:
        return ["embed", "body.0", Block("last", self.last, ("body.1", "scale"))]


def test_a_sequential_is_cut_at_every_child_and_keeps_its_names() -> None:
    blocks = BlockModel(nested())
    assert [block.name for block in blocks.blocks] == ["0", "1.0", "1.1.0", "2"]
    assert list(blocks.parameters_of(range(4))) == list(dict(blocks.model.named_parameters()))
    x = torch.rand(5, 4)
    assert torch.equal(blocks(x), blocks.model(x))


def test_a_module_that_comes_twice_runs_twice() -> None:
    """`named_children` leaves out the second one: the model would lose its later activations without a word."""
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    blocks = BlockModel(model)
    assert len(blocks) == 4
    x = torch.rand(5, 4)
    assert torch.equal(blocks(x), model(x))


def test_a_container_with_hooks_stays_whole() -> None:
    model = nested()
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    blocks = BlockModel(model)
    assert [block.name for block in blocks.blocks] == ["0", "1", "2"]
    x = torch.rand(5, 4)
    assert torch.equal(blocks(x), model(x))


def test_an_outermost_container_with_hooks_is_refused() -> None:
    model = nested()
    model.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ModelError, match="hook"):
        BlockModel(model)


def test_a_model_declares_its_blocks() -> None:
    blocks = BlockModel(Declared())
    assert [block.name for block in blocks.blocks] == ["embed", "body.0", "last"]
    assert list(blocks.parameters_of(range(2, 3))) == ["scale", "body.1.weight", "body.1.bias"]
    assert [len(blocks.parameters_of(range(i, i + 1))) for i in range(3)] == [2, 2, 3]


def test_cuts_win_over_what_the_model_declares() -> None:
    blocks = BlockModel(nested(), ["0", "1", "2"])
    assert [block.name for block in blocks.blocks] == ["0", "1", "2"]
    x = torch.rand(5, 4)
    assert torch.equal(blocks(x), blocks.model(x))


@pytest.mark.parametrize(
    ("model", "cuts", "message"),
    [
        (nn.Linear(4, 4), None, "cannot tell the blocks of Linear: .*pipeline_blocks"),
        (nested(), ["0", "1", "3"], "cut '3' is no submodule of Sequential"),
        (Declared(), ["embed", "bodi.0", "body.1"], r"cut 'bodi.0' .*did you mean 'body.0'"),
        (nested(), ["0"], "no block uses 1.1.0.weight, 1.1.0.bias, 2.weight, 2.bias, 2.running_mean and more;"),
        (Declared(), ["embed", "body.0", "body.1"], "no block uses scale;"),
        (Declared(), [Block("all", lambda x: x, ("embed", "body", "scalee"))], "uses 'scalee'.*did you mean 'scale'"),
        (nn.Sequential(), None, "has no block"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: nn.Module, cuts: list[str | Block] | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        BlockModel(model, cuts)


def test_tensors_of_are_each_there_once() -> None:
    blocks = BlockModel(nested())
    assert list(blocks.tensors_of(range(3, 4))) == [
        "2.weight", "2.bias", "2.running_mean", "2.running_var", "2.num_batches_tracked"
    ]  # fmt: skip
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(BlockModel(model).tensors_of(range(2))) == ["0.weight", "0.bias", "1.bias"]
    assert list(BlockModel(model).tensors_of(range(1, 2))) == ["0.weight", "1.bias"]  # by the name in the whole model


def test_tied_weights_stay_in_one_stage() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    blocks = BlockModel(model)
    blocks.check_ties(ranges((3,)))
    with pytest.raises(ModelError, match="'0.weight' .*shared by student stages 0 and 1.*choose a partition"):
        blocks.check_ties(ranges((2, 1)))


def test_a_buffer_that_appears_later_belongs_to_its_block() -> None:
    model = nested()
    blocks = BlockModel(model)
    model[1][0].register_buffer("seen", torch.zeros(2))
    assert list(blocks.tensors_of(range(1, 2))) == ["1.0.seen"]


def test_adopt_makes_the_buffers_that_another_copy_has() -> None:
    mine, theirs = BlockModel(nested()), BlockModel(nested())
    theirs.model[1][0].register_buffer("seen", torch.zeros(2))
    theirs.model[2].running_mean = torch.zeros(7)
    tensors = mine.adopt(theirs.forms_of(range(4)))
    assert [tuple(t.shape) for t in tensors] == [tuple(t.shape) for t in theirs.tensors_of(range(4)).values()]
    for tensor in tensors:
        tensor.fill_(3)
    assert all((tensor == 3).all() for tensor in mine.model.state_dict().values())
    assert mine.model.state_dict().keys() == theirs.model.state_dict().keys()


def test_in_mode_reaches_modules_outside_the_blocks() -> None:
    model = Declared()
    BlockModel(model).in_mode(train=False)
    assert not any(module.training for module in model.modules())


def test_ranges() -> None:
    assert ranges((2, 1, 3)) == [range(2), range(2, 3), range(3, 6)]
    assert ranges(()) == []
