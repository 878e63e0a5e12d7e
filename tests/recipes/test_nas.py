import json
import threading
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairwise import every_other
from torch import Tensor, nn

import pipestill as ps
from pipestill.cli import main
from pipestill.costs import Link
from pipestill.errors import ConfigError
from pipestill.losses import mse
from pipestill.model.blockwise.dry_run import blockwise_dry_run
from pipestill.model.blockwise.profile import measure_blocks
from pipestill.model.blockwise.task import current_batch, train_block
from pipestill.model.seeding import derive
from pipestill.optim import Schedules
from pipestill.recipes import RECIPES
from pipestill.recipes.architecture_search import Alternating, SearchSteps, WithFlops, weights_and_alphas
from pipestill.recipes.blockwise import BlockwiseWorkload
from pipestill.recipes.nas import PRESETS, Nas
from pipestill.recipes.run_options import Numbers, RunOptions
from pipestill.recipes.supernet import (
    SKIP,
    Cell,
    MBConv,
    MobileShape,
    SearchStage,
    best_paths,
    count_flops,
    derived,
    mbconv_flops,
    network,
    same_path,
    search_stages,
    supernet,
)
from pipestill.runtime.blockwise.worker import BlockwiseWorker
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.verify import verify

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "widths": (4, 6, 6), "teacher_cells": (1, 1, 1), "cells": (1, 2, 2), "strides": (1, 2, 1), "stem": (4, 4), "head": 8,
    "kernels": (3, 5), "expansions": (1, 2), "batch_size": 16, "every": 3,
}  # fmt: skip
WORDS = [
    word
    for name, value in TINY.items()
    for word in (f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
]
SHORT = ["--batch_size", "256", "--every", "2", "--teacher_epochs", "1", "--epochs", "2", "--fine_tuning_epochs", "1"]


def tiny(**changes: Any) -> Nas:
    given = TINY | changes
    return Nas(**{name: Numbers(v) if isinstance(v, tuple) else v for name, v in given.items()})


def workload(num_samples: int = 90, **changes: Any) -> BlockwiseWorkload:
    return tiny(**changes).workload(0, num_samples)


def supernet_of(task: ps.Blockwise) -> nn.Sequential:
    assert isinstance(task.student, nn.Sequential)
    return task.student


def stage_of(task: ps.Blockwise, block: int) -> SearchStage:
    return search_stages(supernet_of(task))[block]


def steps_of(task: ps.Blockwise) -> SearchSteps:
    return stage_of(task, 0).steps


# -- what is searched ---------------------------------------------------------------------------------------------------


def test_the_teacher_of_imagenet_is_mobilenet_v2() -> None:
    preset = PRESETS["imagenet"]
    shape = MobileShape(preset.widths, preset.teacher_cells, preset.strides, preset.stem, preset.head, preset.stem_stride)
    teacher = network(shape, same_path(shape, "k3e6"), 3, 1000, seed=0)
    assert sum(p.numel() for p in teacher.parameters()) == 3_504_872  # as torchvision's mobilenet_v2
    assert round(count_flops(teacher, 3, 224) / 2e6) == 301  # 300 million products and sums in the paper


@pytest.mark.parametrize("preset", ["cifar10", "imagenet"])
def test_published_configurations_at_an_eighth_of_their_width(preset: str) -> None:
    published = PRESETS[preset]
    assert published.widths == (24, 32, 64, 96, 160, 320)
    assert published.cells == (2, 4, 4, 4, 4, 1)
    assert published.strides == ((1, 2, 2, 1, 2, 1) if preset == "cifar10" else (2, 2, 2, 1, 2, 1))
    assert (published.batch_size, published.alpha_lr) == (256, 1e-3)
    recipe = Nas(
        preset=preset,  # type: ignore[arg-type]
        data="noise", image_size=32, widths=Numbers(w // 8 for w in published.widths), stem=Numbers((4, 2)), head=16,
        batch_size=2,
    )  # fmt: skip
    made = recipe.workload(0)
    task, inputs = made.task(), next(iter(made.loader))[0]
    blockwise_dry_run(task, inputs)  # every block of the supernet has the form of the teacher's
    assert task.num_blocks == 6
    for stage in search_stages(supernet_of(task)):
        for place, cell in enumerate(stage.choices()):
            same_form = place > 0
            assert list(cell.paths) == ["k3e3", "k3e6", "k5e3", "k5e6", "k7e3", "k7e6"] + [SKIP] * same_form


def test_flops_of_a_bottleneck_by_hand() -> None:
    # 8 x 8 pixels of 4 channels to 12, each alone with 5 x 5 at every second pixel, 12 to 6 on 4 x 4
    by_hand = 2 * (64 * 4 * 12 + 16 * 12 * 25 + 16 * 12 * 6)
    assert mbconv_flops(4, 6, stride=2, kernel=5, expansion=3, size=8) == by_hand == 18_048
    assert mbconv_flops(4, 4, stride=1, kernel=3, expansion=1, size=8) == 2 * (64 * 4 * 9 + 64 * 4 * 4)


@pytest.mark.parametrize(("stride", "expansion", "size"), [(1, 3, 8), (2, 6, 7), (2, 1, 5)])
def test_flops_of_a_bottleneck_are_those_that_torch_counts(stride: int, expansion: int, size: int) -> None:
    operation = MBConv(4, 6, stride, 5, expansion)
    assert count_flops(operation, 4, size) == mbconv_flops(4, 6, stride, 5, expansion, size)


def test_a_cell_expects_the_mean_flops_of_its_paths() -> None:
    cell = Cell((4, 4, 1), 8, (3,), (1, 2))
    with torch.no_grad():
        cell.alpha.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    small, large = (mbconv_flops(4, 4, 1, 3, e, 8) for e in (1, 2))
    assert cell.flops == (small, large, 0)
    assert cell.expected_flops().item() == pytest.approx((0.5 * small + 0.25 * large) / large)


# -- paths --------------------------------------------------------------------------------------------------------------


def test_paths_are_drawn_by_their_chances() -> None:
    cell = Cell((4, 4, 1), 8, (3,), (1, 2))
    with torch.no_grad():
        cell.alpha.copy_(torch.tensor([0.6, 0.1, 0.3]).log())
    drawn = [cell.sampled(1, "seed", number)[0] for number in range(3000)]
    assert [drawn.count(path) / 3000 for path in range(3)] == pytest.approx([0.6, 0.1, 0.3], abs=0.03)
    pairs = [cell.sampled(2, "seed", number) for number in range(300)]
    assert all(first != second for first, second in pairs)
    assert len({frozenset(pair) for pair in pairs}) == 3


def with_gradient(task: ps.Blockwise, block: int) -> set[str]:
    return {name for name, p in task.parameters_of(block).items() if p.grad is not None}


@pytest.mark.parametrize("batch", [0, 3])  # for weights, for paths
def test_all_shares_of_a_batch_take_the_same_path(batch: int) -> None:
    task = workload(flops_weight=0.0).task()
    assert steps_of(task).learns_paths(batch) == (batch == 3)
    task.in_mode(train=True)
    seen = []
    for unit in (0, 1):
        value = torch.randn(4, 4, 8, 8)
        with torch.no_grad():
            target = task.teacher_blocks.blocks[1].call(value)
        train_block(task, 1, value, target, 0.5, seed=unit, batch=batch, unit=unit, device=CPU)
        seen.append((with_gradient(task, 1), {n: int((p.grad != 0).sum()) for n, p in alphas(task, 1) if batch == 3}))
        task.student.zero_grad()
    assert seen[0] == seen[1]
    if batch == 3:
        assert seen[0] == ({"1.cells.0.alpha", "1.cells.1.alpha"}, {"1.cells.0.alpha": 2, "1.cells.1.alpha": 2})


def alphas(task: ps.Blockwise, block: int) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in task.parameters_of(block).items() if name.endswith("alpha")]


def test_batches_take_different_paths() -> None:
    stage = stage_of(workload().task(), 1)
    assert len({tuple(stage.sampled(batch)) for batch in range(20)}) > 5


# -- the gradient of the paths --------------------------------------------------------------------------------------------


def chances_of(alpha: Tensor, pair: list[int]) -> Tensor:
    return alpha[pair].softmax(0)


def test_gradient_of_a_cell_is_the_slope_of_the_expected_loss() -> None:
    """For a loss that is linear in the output, gates give the derivative of its mean over the two paths, exactly."""
    torch.manual_seed(0)
    cell = Cell((3, 3, 1), 4, (3, 5), (1,)).double()
    x, weights = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 4, 4).double()
    with torch.no_grad():
        cell.alpha.copy_(torch.tensor([0.3, -0.4, 0.1]))
        costs = [float((path(x) * weights).sum()) for path in cell.paths.values()]
    seen = set()
    for number in range(12):
        pair = cell.sampled(2, number)
        seen.add(frozenset(pair))
        (gradient,) = torch.autograd.grad((cell.gated(x, number) * weights).sum(), cell.alpha)

        def expected(alpha: Tensor, pair: list[int] = pair) -> float:
            return float(chances_of(alpha, pair) @ torch.tensor(costs).double()[pair])

        for path in range(3):
            nudge = torch.zeros(3).double()
            nudge[path] = 1e-6
            with torch.no_grad():
                slope = (expected(cell.alpha + nudge) - expected(cell.alpha - nudge)) / 2e-6
            assert float(gradient[path]) == pytest.approx(slope, abs=1e-6)
            assert (path in pair) or gradient[path] == 0
    assert len(seen) == 3


def test_gradient_through_two_cells_is_that_of_equation_4() -> None:
    """dL/dg by autograd for gates that are variables, for a loss that is not linear; then the softmax's derivative."""
    torch.manual_seed(0)
    cells = [Cell((3, 3, 1), 4, (3, 5), (1, 2)).double() for _ in range(2)]
    steps = SearchSteps(3, 3, 0)
    stage = SearchStage(nn.Identity(), cells, nn.Identity(), steps=steps, seed=1, number=0).train()
    with torch.no_grad():
        for cell in cells:
            cell.alpha.normal_()
    x, target = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 4, 4).double()
    current_batch.set(3)
    loss = mse(stage(x), target)
    found = torch.autograd.grad(loss, [cell.alpha for cell in cells])

    value, gates = x, []
    pairs = [cell.sampled(2, 1, "path", 0, 3, place) for place, cell in enumerate(cells)]
    for place, (cell, pair) in enumerate(zip(cells, pairs, strict=True)):
        chance = float(chances_of(cell.alpha.detach(), pair)[0])
        active = int(derive(1, "path", 0, 3, place, "active") / 2**63 >= chance)
        gate = nn.functional.one_hot(torch.tensor(active), 2).double().requires_grad_()
        gates.append(gate)
        value = sum(g * cell.operation(path)(value) for g, path in zip(gate, pair, strict=True))
    enumerated = mse(value, target)
    assert loss.item() == pytest.approx(enumerated.item())
    by_gate = torch.autograd.grad(enumerated, gates)
    for cell, pair, of_gate, gradient in zip(cells, pairs, by_gate, found, strict=True):
        p = chances_of(cell.alpha.detach(), pair)
        wanted = torch.zeros_like(cell.alpha)
        for i, path in enumerate(pair):
            wanted[path] = sum(of_gate[j] * p[j] * (float(i == j) - p[i]) for j in range(2))
        torch.testing.assert_close(gradient, wanted)


def test_flops_in_the_loss_make_dear_paths_less_likely() -> None:
    task = workload(flops_weight=1.0).task()
    stage, loss = stage_of(task, 1), task.loss_of(1)
    assert isinstance(loss, WithFlops)
    task.in_mode(train=True)
    same = torch.ones(2, 3)
    current_batch.set(0)
    assert loss(same, same).item() == 0.0
    current_batch.set(3)
    assert loss(same, same).item() == pytest.approx(stage.expected_flops().item())
    (gradient,) = torch.autograd.grad(loss(same, same), stage.choices()[0].alpha)
    flops = stage.choices()[0].flops
    assert gradient.argmax() == flops.index(max(flops))
    assert gradient.argmin() == flops.index(min(flops))


# -- who learns when ------------------------------------------------------------------------------------------------------


def test_paths_learn_every_few_batches_after_the_warm_up() -> None:
    steps = SearchSteps(batches=7, every=3, warm_up_epochs=2)
    assert steps.epoch_length == 9
    assert [batch for batch in range(36) if steps.learns_paths(batch)] == [21, 25, 30, 34]


def test_a_quarter_of_the_epochs_is_for_the_weights_alone() -> None:
    assert steps_of(Nas(epochs=20).workload(0).task()).warm_up_epochs == 5
    assert steps_of(Nas(epochs=20).workload(0).task()).every == 5
    assert steps_of(Nas(epochs=20).workload(0, num_samples=500).task()).warm_up_epochs == 0


def trained(task: ps.Blockwise) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.student.state_dict().items()}


def changed(task: ps.Blockwise, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in task.student.state_dict().items() if not torch.equal(p, before[name])}


def test_paths_move_on_their_batches_only_and_weights_on_the_others() -> None:
    made = workload()
    task = made.task()
    trainer = trainer_of(made, task)
    inputs = next(iter(made.loader))[0]
    contracts = blockwise_dry_run(task, inputs)
    worker = BlockwiseWorker(task, contracts, device=CPU, seed=0, optimizer=trainer.make_optimizer, schedules=Schedules())
    worker.hold(range(3), range(3))
    value = task.teacher_blocks.blocks[0].call(inputs).detach()
    target = worker.teacher_output(1, value)
    for batch in range(10):
        before = trained(task)
        worker.train(1, value, target, 1.0, batch, 0, None)
        worker.update(1, batch)
        moved = {name.rpartition(".")[2] for name in changed(task, before)}
        if steps_of(task).learns_paths(batch):
            assert moved == {"alpha"}, "neither weights nor running statistics"
        else:
            assert {"weight", "running_mean"} <= moved
            assert "alpha" not in moved
    assert steps_of(task).learns_paths(batch), "the last one was for paths"


def test_held_out_rows_never_train_weights_and_no_row_is_lost() -> None:
    made = tiny(epochs=8, batch_size=128).workload(0)
    loader, steps = made.loader, steps_of(made.task())
    rows: dict[bool, set[bytes]] = {False: set(), True: set()}
    batch = 0
    for epoch in range(4):
        loader.set_epoch(epoch)  # type: ignore[attr-defined]
        once: list[bytes] = []
        for place, (images, labels) in enumerate(loader):
            named = [i.numpy().tobytes() + bytes([int(label)]) for i, label in zip(images, labels, strict=True)]
            rows[steps.learns_paths(batch)].update(named)
            once += [] if steps.is_extra(place) else named
            batch += 1
        assert batch == (epoch + 1) * len(loader)
        assert len(once) == 1437 - round(1437 * 0.2)
    assert rows[True]
    assert rows[False] == set(once)
    assert not rows[True] & rows[False]


def test_readers_in_different_threads_are_in_different_epochs() -> None:
    """Under `ls`, ranks of one process read the same loader at once."""
    loader = tiny(epochs=8).workload(0).loader
    loader.set_epoch(5)  # type: ignore[attr-defined]
    other = threading.Thread(target=lambda: loader.set_epoch(0))  # type: ignore[attr-defined]
    other.start()
    other.join()
    assert loader.epoch_of.value == 5  # type: ignore[attr-defined]


# -- the optimizer --------------------------------------------------------------------------------------------------------


def test_paths_that_were_not_sampled_keep_their_chance() -> None:
    alpha, weight = nn.Parameter(torch.tensor([0.5, -0.5, 1.0, 0.0])), nn.Parameter(torch.ones(2))
    optimizer = Alternating(weights_and_alphas({"cells.0.alpha": alpha, "w": weight}), lr=0.1, alpha_lr=0.2)
    before = alpha.detach().softmax(0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as a schedule does at its end: the paths' rate stays
    alpha.grad = torch.tensor([0.3, 0.0, -0.3, 0.0])
    optimizer.step()
    after = alpha.detach().softmax(0)
    torch.testing.assert_close(after[[1, 3]], before[[1, 3]])
    assert after[2] > before[2]
    assert after[0] < before[0]
    assert torch.equal(weight, torch.ones(2))


def test_the_optimizer_is_nesterov_and_adam_of_the_paper() -> None:
    torch.manual_seed(0)
    alpha, weight = (nn.Parameter(torch.randn(3)) for _ in range(2))
    copies = [nn.Parameter(p.detach().clone()) for p in (alpha, weight)]
    mine = Alternating(weights_and_alphas({"alpha": alpha, "w": weight}), lr=0.1, weight_decay=0.01)
    theirs = [
        torch.optim.Adam([copies[0]], lr=1e-3, betas=(0.0, 0.999)),
        torch.optim.SGD([copies[1]], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ]
    for number in range(5):
        for parameter, copy in zip((alpha, weight), copies, strict=True):
            parameter.grad = copy.grad = torch.randn(3) if (parameter is alpha) == (number % 2 == 1) else None
        for optimizer in (mine, *theirs):
            optimizer.step()
    torch.testing.assert_close(weight, copies[1])
    torch.testing.assert_close(alpha.softmax(0), copies[0].softmax(0))
    assert set(mine.state) == {alpha, weight}, "all that is remembered is in one place"


# -- what comes of it -------------------------------------------------------------------------------------------------------


def test_the_derived_network_is_the_supernet_along_its_best_path() -> None:
    made = workload()
    task = made.task()
    student = supernet_of(task)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stage in search_stages(student):
            for cell in stage.choices():
                cell.alpha.copy_(torch.randn(len(cell.alpha), generator=generator))
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
    x = torch.rand(5, 1, 8, 8)
    student.eval()
    assert made.derive is not None
    found = made.derive(task).eval()
    assert torch.equal(found(x), student(x))
    for parameter in found.parameters():
        parameter.data.zero_()
    assert student(x).abs().sum() > 0, "weights are copies"
    other = derived(student, tuple(tuple("k3e1" for _ in stage) for stage in best_paths(student))).eval()
    assert not torch.equal(other(x), student(x))


def test_a_fresh_network_has_the_form_of_the_one_that_was_found() -> None:
    made = workload()
    assert made.derive is not None
    assert made.fresh is not None
    found = made.derive(made.task())
    fresh = made.fresh(found)
    assert {n: p.shape for n, p in fresh.state_dict().items()} == {n: p.shape for n, p in found.state_dict().items()}
    assert not torch.equal(next(fresh.parameters()), next(found.parameters()))


# -- every strategy ---------------------------------------------------------------------------------------------------------


def trainer_of(made: BlockwiseWorkload, task: ps.Blockwise, **knobs: Any) -> ps.Trainer:
    return ps.Trainer(task, **made.student_training.arguments(made.loader), device="cpu", **knobs)


UNEVEN = BlockProfile(
    tuple(BlockTimes(f"b{i}", (1, 16), (1e-4, 2e-4), (4 * s, 5 * s), 32, 100) for i, s in enumerate((1e-3, 2e-3, 2e-3))), Link()
)


def state_after(strategy: str, devices: int, steps: int = 14, **knobs: Any) -> tuple[dict[str, Tensor], ps.Result]:
    made = workload()
    task = made.task()
    result = trainer_of(made, task, strategy=strategy, devices=devices, **knobs).fit(made.loader, steps=steps)
    return trained(task), result


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return state_after("reference", 1)[0]


@pytest.mark.parametrize(
    ("strategy", "devices"), every_other([("relay", 3), ("ls", 2), ("balanced", 2), ("relay-dpu", 2), ("balanced", 1)], 2)
)
def test_strategies_are_bit_exact(strategy: str, devices: int, alone: dict[str, Tensor]) -> None:
    state, result = state_after(strategy, devices, costs=UNEVEN)
    assert [name for name, tensor in alone.items() if not torch.equal(tensor, state[name])] == []
    start = trained(workload().task())
    names = [name for name in alone if name.endswith("alpha")]
    assert all(not torch.equal(alone[name], start[name]) for name in names), "paths of every cell learn"
    if (strategy, devices) == ("balanced", 2):
        assert result.plan is not None
        structure = result.plan.phases[0].schedule.structure
        assert structure.moves, "a block moves between the ranks, with what its optimizer remembers"


@pytest.mark.parametrize("strategy", ["dp", "hybrid"])
def test_shared_rows_differ_by_rounding(strategy: str, tmp_path: Path) -> None:
    devices = {"dp": 2, "hybrid": 4}[strategy]  # more ranks than blocks: some share rows
    UNEVEN.save(tmp_path / "profile.csv")
    options = RunOptions(strategy=strategy, devices=devices, costs=str(tmp_path / "profile.csv"), timeout_seconds=60.0)
    result = verify(tiny(), options, steps=5, transports=("in-process",), device_type="cpu")
    assert result["rows_split"]
    assert result["problems"] == []


def test_check_says_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    UNEVEN.save(tmp_path / "profile.csv")
    words = ["--strategy", "balanced", "--devices", "2", "--transport", "in-process", "--steps", "5", "--json"]
    words += ["--costs", str(tmp_path / "profile.csv")]
    assert main(["check", "nas", *WORDS, *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"]
    assert not result["rows_split"]


def test_times_are_measured_over_many_paths() -> None:
    """One path alone, that of batch 0, would stand for all."""
    made = workload()
    task = made.task()
    inputs = next(iter(made.loader))[0]
    seen = set[str]()
    for name, module in task.student.named_modules():
        if isinstance(module, MBConv):
            module.register_forward_hook(lambda *_, name=name: seen.add(name))  # type: ignore[misc]
    measure_blocks(
        task, blockwise_dry_run(task, inputs), inputs, batch=16, devices=1, optimizer=trainer_of(made, task).make_optimizer
    )
    cells = {name.partition(".paths")[0] for name in seen if ".paths" in name}
    assert len([name for name in seen if ".paths" in name]) > len(cells)


# -- as its user --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_finds_exports_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "nas", *WORDS, *SHORT, "--devices", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert {"teacher", "blocks", "student", "student_alone", "random_paths"} <= set(summary["metrics"])
    search = summary["search"]
    assert f"found: {' | '.join(' '.join(stage) for stage in search['paths'])}" in shown
    assert search["flops"]["student"] <= search["flops"]["largest_path"]
    page = (Path(__file__).parents[2] / "docs/architecture-search.md").read_text()
    code: dict[str, Any] = {}
    exec(compile(page.partition("```python\n")[2].partition("```")[0], "docs/architecture-search.md", "exec"), code)
    again = code["load"](out / "export")
    assert sum(p.numel() for p in again.parameters()) == search["parameters"]["student"]
    assert count_flops(again, 1, 8) == search["flops"]["student"]
    assert json.loads((out / "export" / "config.json").read_text())["search"] == search


def test_recipes_list_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert "nas" in [recipe["name"] for recipe in json.loads(capsys.readouterr().out)["recipes"]]
    assert RECIPES["nas"].load() is Nas


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernels", "4"], "kernels is 4; expected odd numbers"),
        (["--kernels", "3", "--expansions", "6"], "one path in each cell"),
        (["--kernels", "3,3"], "each number once"),
        (["--widths", "4,4"], "of 6 blocks; widths has 2"),
        (["--stem", "8"], "stem is 8; expected two numbers"),
        (["--held_out", "0"], "held_out is 0.0; expected more than 0 and less than 1"),
        (["--warm_up", "1"], "warm_up is 1.0"),
        (["--alpha_lr", "0"], "alpha_lr is 0.0; expected more than 0"),
        (["--every", "0"], "every is 0; expected at least 1"),
        (["--every", "50"], "18 batches for the weights, and paths learn after every 50; lower --every"),
        (["--preset", "cifar10"], "reads its images from --data PATH"),
        (["--data", "/nowhere"], "no directory '/nowhere'"),
        (["--image_size", "16"], "the digits are 8 x 8"),
        (["--strategy", "fill"], "strategy 'fill' is of recipes that train end to end"),
        (["--kernel", "3"], "no key 'kernel'"),
    ],
)
def test_errors_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nas", *words]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.strip().splitlines()) == 1


def test_few_samples_are_enough_to_try_it_out() -> None:
    assert len(tiny(every=50).workload(0, num_samples=1).loader) == 2


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Nas(every=0, held_out=2.0, kernels=Numbers((2, 4)))
    assert str(error.value).count("; expected") == 3


def test_any_two_paths_can_be_the_pair() -> None:
    cell = Cell((4, 4, 1), 8, (3, 5), (1, 2))
    drawn = {tuple(cell.sampled(2, number)) for number in range(400)}
    assert drawn == set(permutations(range(5), 2))


def test_supernet_is_the_same_for_a_seed() -> None:
    shape = MobileShape((4, 6), (1, 2), (1, 2), (4, 4), 8, 1)
    made = [supernet(shape, (3, 5), (1, 2), 1, 8, 10, steps=SearchSteps(3, 3, 0), seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(made[0].values(), made[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(made[0].values(), made[2].values(), strict=True))
