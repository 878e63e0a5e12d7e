"""BYOL, MoCo v3 and DINO: their configurations, tasks, schedules and exactness. What they learn is in docs/momentum.md."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipestill.errors import ConfigError
from pipestill.lr_schedules import cosine
from pipestill.model.blocks import BlockModel
from pipestill.model.dry_run import dry_run
from pipestill.model.profile import profile
from pipestill.model.tasks import Momentum
from pipestill.recipes import RECIPES, find
from pipestill.recipes.byol import Byol
from pipestill.recipes.dino import PRESETS as DINO_PRESETS, Dino
from pipestill.recipes.moco_v3 import MocoV3
from pipestill.recipes.momentum import MomentumWorkload
from pipestill.recipes.run import run_recipe
from pipestill.recipes.run_options import RunOptions
from pipestill.recipes.self_supervised import Chain, Perceptron
from pipestill.recipes.training import warmed_up, without_decay
from pipestill.recipes.weights import load_into
from pipestill.train.run_directory import RunDirectory
from pipestill.verify import verify

SMALL: dict[str, Any] = {
    "byol": Byol(width=4, hidden=8, projection=4, batch_size=10),
    "moco-v3": MocoV3(depth=1, hidden=8, projection=4, batch_size=10),
    "dino": Dino(width=4, hidden=8, bottleneck=4, prototypes=6, batch_size=10),
    "dino-vit": Dino(model="vit-t", depth=1, hidden=8, bottleneck=4, prototypes=6, batch_size=10),
}


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


# ---------------------------------------------------------------- schedules


def test_warm_up_rises_evenly_to_the_top_of_the_cosine() -> None:
    factor = warmed_up(cosine, 0.25)(40)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert [factor(step) for step in range(10, 41)] == [cosine(30)(step) for step in range(31)]
    assert factor(40) == 0.0
    assert [warmed_up(cosine, 0.0)(8)(step) for step in range(9)] == [cosine(8)(step) for step in range(9)]
    assert [warmed_up(cosine, 1.0)(4)(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_weight_decay_grows_along_a_cosine_on_weights_alone() -> None:
    training = Dino().workload(0).student_training
    loader = [None] * 10
    factor = training.arguments(loader)["weight_decay_schedule"]
    assert (factor(0), factor(10 * training.epochs)) == (1.0, pytest.approx(10.0))
    assert factor(5 * training.epochs) == pytest.approx(5.5)
    assert cosine(4, end=3.0)(2) == pytest.approx(2.0)
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = without_decay(dict(model.named_parameters()))
    assert [(len(group["params"]), group.get("weight_decay")) for group in groups] == [(1, None), (3, 0.0)]
    assert len(without_decay(dict(model[1].named_parameters()))) == 1, "a stage of norms alone"


@pytest.mark.parametrize(("recipe", "start"), [(Byol(), 0.95), (MocoV3(), 0.97), (Dino(), 0.95)])
def test_the_momentum_rises_to_one(recipe: Any, start: float) -> None:
    workload = recipe.workload(0)
    momentum = workload.task().momentum_at
    total = len(workload.train_loader) * recipe.epochs
    assert momentum(0) == pytest.approx(start)
    assert momentum(total // 2) == pytest.approx((1 + start) / 2, abs=1e-3)
    assert 0.9999 < momentum(total - 1) < 1.0


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", SMALL)
def test_what_is_initialised_follows_the_seed(name: str) -> None:
    one, again, other = (SMALL[name].workload(seed).task() for seed in (1, 1, 2))
    for role in ("student", "teacher"):
        state, same, different = (getattr(task, role).state_dict() for task in (one, again, other))
        assert all(torch.equal(state[key], same[key]) for key in state)
        assert any(not torch.equal(state[key], different[key]) for key in state)
    mine = one.student.state_dict()
    assert all(torch.equal(tensor, mine[key]) for key, tensor in one.teacher.state_dict().items())


def test_views_of_dino_are_of_two_sizes_and_the_teacher_sees_the_large_ones() -> None:
    recipe = dataclasses.replace(SMALL["dino-vit"], local_views=3)
    workload = recipe.workload(0)
    task = workload.task()
    inputs, targets = next(iter(workload.train_loader))
    assert [tuple(view.shape) for view in inputs] == [(10, 1, 8, 8)] * 2 + [(10, 1, 6, 6)] * 3
    assert targets is None
    assert (task.views, task.teacher_views, task.batch_loss) == (5, 2, True)
    assert [task.student(view).shape for view in inputs] == [(10, 6)] * 5
    assert task.student(inputs[0]).abs().max() <= 1.0 + 1e-6, "cosines"


def test_moco_freezes_the_projection_of_patches() -> None:
    task = SMALL["moco-v3"].workload(0).task()
    frozen = {name for name, p in task.student.named_parameters() if not p.requires_grad}
    encoder = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    assert frozen == {f"encoder.{name}" for name in encoder}


def test_a_chain_is_cut_where_its_parts_are() -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    chain = Chain(encoder=inner, projector=Perceptron((4, 5, 2)), last=Chain(end=nn.Linear(2, 2)))
    blocks = BlockModel(chain)
    assert [block.name for block in blocks.blocks] == ["encoder.0", "encoder.1", "projector", "last.end"]
    images = torch.randn(6, 3)
    chain.eval()
    assert torch.equal(blocks(images), chain(images))
    assert chain(images).shape == (6, 2)


def test_perceptrons() -> None:
    plain, moco = Perceptron((4, 5, 2)), Perceptron((4, 5, 5, 2), last_norm=True)
    kinds = [type(layer).__name__ for layer in plain.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in moco.layers] == [*kinds[:3], *kinds[:3], "Linear", "BatchNorm1d"]
    out = moco(torch.randn(20, 4))
    torch.testing.assert_close(out.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    assert moco.layers[-1].weight is None


# ---------------------------------------------------------------- exactness


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("byol", "1f1b"), ("moco-v3", "fill"), ("dino", "tspipe"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("byol", "tspipe"), ("dino", "1f1b"), ("dino-vit", "fill"))),
    ],
)  # fmt: skip
def test_equals_the_reference(name: str, strategy: str) -> None:
    options = RunOptions(devices=2, strategy=strategy, microbatches=2)
    found = verify(SMALL[name], options, steps=3, transports=("in-process",), device_type="cpu")
    assert found["problems"] == []
    assert found["exact"]


def test_what_runs_the_loss_beside_training_leaves_its_buffers() -> None:
    """Else the center, and the teacher's temperature, would hang on how often costs were measured."""
    workload = SMALL["dino"].workload(0)
    task = workload.task()
    inputs, targets = next(iter(workload.train_loader))
    before = {name: tensor.clone() for name, tensor in task.loss.state_dict().items()}
    contracts = dry_run(task, inputs, targets)
    profile(task, contracts, inputs, targets, rows=4, repeats=1, optimizer=lambda p: torch.optim.SGD(p.values(), lr=0.1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.loss.state_dict().items())
    task.loss([task.student(view) for view in inputs], [task.teacher(view) for view in inputs[:2]], None)
    assert task.loss.batches == 1
    assert task.loss.center.abs().max() > 0


# ---------------------------------------------------------------- configurations


def test_published_configurations() -> None:
    byol, moco, dino = Byol(preset="imagenet100"), MocoV3(preset="imagenet"), Dino(preset="imagenet")
    assert (byol.network, byol.hidden, byol.projection, byol.momentum) == ("resnet18", 512, 128, 0.996)
    assert (byol.optimizer, byol.lr, byol.sgd_momentum, byol.weight_decay) == ("lars", 0.2, 0.9, 1.5e-6)
    assert (byol.batch_size, byol.warm_up_epochs) == (256, 10)
    assert (moco.model, moco.projection, moco.hidden, moco.temperature, moco.momentum) == ("vit-s", 256, 4096, 0.2, 0.99)
    assert (moco.optimizer, moco.lr, moco.weight_decay) == ("lars", 1.5e-4 * 128 / 256, 0.1)
    assert (moco.batch_size, moco.warm_up_epochs) == (128, 40)
    assert (dino.model, dino.prototypes, dino.momentum, dino.lr) == ("vit-s", 65_536, 0.996, 2e-3)
    assert (dino.weight_decay, dino.final_weight_decay, dino.temperature) == (0.04, 0.4, 0.07)
    assert MocoV3(preset="imagenet", batch_size=4096).lr == pytest.approx(2.4e-3)
    assert (MocoV3(preset="imagenet", model="vit-l").depth, Dino(model="vit-t").depth, Dino().depth) == (24, 3, 3)


PHOTOGRAPHS = [
    Byol(preset="imagenet100", data="noise", image_size=16, hidden=8, projection=4, batch_size=2),
    MocoV3(preset="imagenet", data="noise", image_size=32, depth=1, hidden=8, projection=4, batch_size=2),
    Dino(
        preset="imagenet", data="noise", image_size=32, local_size=16, local_views=2, depth=1, hidden=8, bottleneck=4,
        prototypes=6, batch_size=2,
    ),
]  # fmt: skip


@pytest.mark.parametrize("recipe", PHOTOGRAPHS, ids=lambda recipe: f"{recipe.name}-{recipe.preset}")
def test_published_forms_run_a_step_at_reduced_size(recipe: Any) -> None:
    workload = recipe.workload(0)
    task = workload.task()
    inputs, targets = next(iter(workload.train_loader))
    contracts = dry_run(task, inputs, targets)
    assert len(contracts.student) == task.views
    assert isinstance(workload, MomentumWorkload)
    assert len(task.student_blocks) >= 4


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (Byol, {"momentum": 1.0, "lr": 0}, "momentum is 1.0; expected 0 or more, and less than 1; lr is 0; expected more"),
        (Byol, {"epochs": 3, "warm_up_epochs": 4}, "warm_up_epochs is 4, more than the 3 epochs"),
        (Byol, {"network": "resnet18", "dropout": 0.1}, "a resnet18 has none"),
        (Byol, {"image_size": 16}, "the digits are 8 x 8"),
        (MocoV3, {"model": "vit-s"}, "image_size is 8, no multiple of the patches of 16 pixels of vit-s"),
        (MocoV3, {"temperature": 0}, "temperature is 0; expected more than 0"),
        (Dino, {"model": "vit-t", "local_size": 5}, "local_size is 5, no multiple of the patches of 2 pixels"),
        (Dino, {"weight_decay": 0}, "final_weight_decay is 0.4; expected 0 or more, and 0 where weight_decay is"),
        (Dino, {"prototypes": 1, "local_views": -1}, "local_views is -1; expected at least 0; prototypes is 1"),
    ],
)
def test_what_cannot_be_is_refused(recipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**options)


@pytest.mark.parametrize("recipe", [Byol(preset="cifar10"), MocoV3(preset="imagenet"), Dino(preset="imagenet")])
def test_presets_without_data_say_where_to_read(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"reads its images from --data PATH \(see docs/momentum.md\)"):
        recipe.workload(0)


def test_the_registry_knows_them() -> None:
    assert {find(name).load().name for name in RECIPES} == set(RECIPES)
    assert {"byol", "moco-v3", "dino"} < set(RECIPES)
    assert set(DINO_PRESETS) == {"digits", "imagenet"}
    assert isinstance(SMALL["dino"].workload(0).task(), Momentum)


def test_a_run_says_what_was_learnt_beside_the_untrained_network(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SMALL["byol"], batch_size=240, epochs=1, warm_up_epochs=0)
    options = RunOptions(strategy="reference", microbatches=2)
    summary = run_recipe(recipe, options, RunDirectory.create(str(tmp_path / "run"), "byol"), quiet=True)
    metrics = summary["metrics"]
    assert set(metrics["teacher"]) == set(metrics["untrained"]) == {"knn_accuracy", "linear_accuracy"}
    assert metrics["teacher"] != metrics["untrained"]
    workload = recipe.workload(0)
    teacher = workload.task().teacher
    assert workload.evaluate(teacher, torch.device("cpu")) == metrics["untrained"]
    load_into(teacher, tmp_path / "run/export/teacher.safetensors")
    assert workload.evaluate(teacher, torch.device("cpu")) == metrics["teacher"]
