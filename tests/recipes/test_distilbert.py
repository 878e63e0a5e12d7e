"""The recipe `distilbert`: its presets, what it refuses, how the student starts, and that it learns from a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairwise import every_other

from pipestill import BlockModel
from pipestill.errors import ConfigError, DataError
from pipestill.model.tasks import Supervised
from pipestill.recipes import language, text, tokens
from pipestill.recipes.distilbert import PRESETS, DistilBert
from pipestill.recipes.language import Sizes
from pipestill.recipes.run import preflight, run_recipe
from pipestill.recipes.run_options import Numbers, RunOptions
from pipestill.train.run_directory import RunDirectory
from pipestill.verify import train_few

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quick_plans")

TINY: dict[str, Any] = {
    "hidden_size": 16, "heads": 2, "intermediate_size": 24, "layers": 3, "student_layers": 2, "vocab_size": 150,
    "max_length": 24, "batch_size": 8,
}  # fmt: skip
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Paragraphs that each repeat one word, so that a masked one can be told from the others."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join([WORDS[i * 5 % 12]] * (12 + i % 11)) for i in range(100)))
    return str(path)


def saved(path: Path, model: Any) -> str:
    model.save_pretrained(path)
    return str(path)


def bert(**changes: int) -> Any:
    sizes = {"layers": 3, "hidden_size": 16, "heads": 2, "intermediate_size": 24, "vocab_size": 150, "positions": 24}
    return language.bert(Sizes(**{**sizes, **changes}), dropout=0.0, pad=0, tied=True, seed=1)


def test_presets_are_the_published_models() -> None:
    base, large = (PRESETS[name] for name in ("bert-base", "bert-large"))
    assert (base.layers, base.student_layers, base.hidden_size, base.heads, base.intermediate_size) == (12, 6, 768, 12, 3072)
    assert (large.layers, large.student_layers, large.hidden_size, large.heads) == (24, 12, 1024, 16)
    for preset in (base, large):
        assert (preset.vocab_size, preset.positions, preset.batch_size, preset.epochs, preset.lr) == (30_522, 512, 24, 3, 5e-4)
    recipe = DistilBert(preset="bert-large")
    assert recipe.sizes()[0] == Sizes(24, 1024, 16, 4096, 30_522, 512)
    assert recipe.sizes()[1] == Sizes(12, 1024, 16, 4096, 30_522, 512)
    training = recipe.workload(0).student_training
    assert training.optimizer is torch.optim.AdamW
    assert dict(training.optimizer_options) == {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}
    assert training.lr_schedule is not None
    factors = [training.lr_schedule(100)(step) for step in (0, 4, 5, 99)]
    assert factors == pytest.approx([0.2, 1.0, 1.0, 1 / 95])


@pytest.mark.filterwarnings("ignore:the teacher.s cross entropy with the labels")  # as good as a random one is
@pytest.mark.parametrize("preset", ["bert-base", pytest.param("bert-large", marks=pytest.mark.slow)])
def test_a_published_preset_says_that_its_teacher_is_random(preset: Any, small: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At its depth and a small width, two steps over two stages."""
    recipe = DistilBert(
        preset=preset, data=small, hidden_size=16, heads=2, intermediate_size=24, vocab_size=150, max_length=16, batch_size=4
    )
    workload = recipe.workload(0)
    task = workload.task()
    assert "warning: the teacher has random weights" in capsys.readouterr().err
    assert workload.teacher_origin == "random"
    assert (len(task.teacher_blocks or ()), len(task.student_blocks)) == (
        2 * PRESETS[preset].layers + 2, 2 * PRESETS[preset].student_layers + 2,
    )  # fmt: skip
    options = RunOptions(devices=2, strategy="fill", microbatches=2)
    result = workload.trainer(task, options).fit(workload.train_loader, steps=2)
    assert result.steps == 2


def test_layers_of_the_teacher_that_the_student_starts_from() -> None:
    assert language.spread(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert language.spread(24, 12) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert language.spread(4, 4) == [0, 1, 2, 3]
    assert language.spread(4, 1) == [0]


def test_a_student_of_as_many_layers_starts_as_the_teacher(small: str) -> None:
    workload = DistilBert(**{**TINY, "student_layers": 3}, data=small).workload(0)
    task = workload.task()
    inputs, _ = next(iter(workload.train_loader))
    task.teacher.eval(), task.student.eval()
    taught, got = (BlockModel(model)(inputs) for model in (task.teacher, task.student))
    for name in ("logits", "last_hidden_state"):
        torch.testing.assert_close(got[name], taught[name], rtol=1e-4, atol=1e-5)
    alone = workload.build_student().eval()
    assert not torch.allclose(BlockModel(alone)(inputs)["logits"], taught["logits"], atol=1e-2)


def test_positions_are_frozen_where_the_teacher_gives_them(small: str) -> None:
    name = "distilbert.embeddings.position_embeddings.weight"
    for freeze in (True, False):
        workload = DistilBert(**TINY, data=small, freeze_positions=freeze).workload(0)
        assert workload.build_student().get_parameter(name).requires_grad, "without a teacher they have to be learnt"
        task = workload.task()
        before = task.student.get_parameter(name).clone()
        workload.trainer(task, RunOptions(microbatches=2)).fit(workload.train_loader, steps=2)
        assert torch.equal(task.student.get_parameter(name), before) is freeze


def test_matrices_alone_decay(small: str) -> None:
    workload = DistilBert(**TINY, data=small, weight_decay=0.1).workload(0)
    student, training = workload.build_student(), workload.student_training
    assert training.param_groups is not None
    groups = training.param_groups(dict(student.named_parameters()))
    matrices, others = training.optimizer(groups, **training.optimizer_options).param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() > 1 for p in matrices["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(student.parameters()))


@pytest.fixture(scope="module")
def plain(small: str) -> dict[str, torch.Tensor]:
    """What the plain loop trains with dropout, batches of several lengths and a short last one."""
    recipe = DistilBert(**TINY, data=small, dropout=0.1)
    lengths = {inputs["input_ids"].shape[1] for inputs, _ in recipe.workload(0).train_loader}
    assert len(lengths) > 1
    return train_few(recipe, RunOptions(strategy="reference", microbatches=3), 5)[0]


@pytest.mark.parametrize(("strategy", "devices"), every_other([("fill", 2), ("gpipe", 2), ("1f1b", 3), ("sequential", 2)]))
def test_strategies_are_bit_identical_to_the_plain_loop(
    strategy: str, devices: int, small: str, plain: dict[str, torch.Tensor]
) -> None:
    recipe = DistilBert(**TINY, data=small, dropout=0.1)
    got, _ = train_few(recipe, RunOptions(devices=devices, strategy=strategy, microbatches=3), 5)
    assert got.keys() == plain.keys()
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_a_tied_teacher_over_two_stages(small: str, tmp_path: Path) -> None:
    """Published BERTs share input and output embeddings; a frozen copy in two stages is as good as one."""
    tokens = DistilBert(**TINY, data=small).workload(0).train_loader.collate_fn.tokens  # type: ignore[union-attr]
    tokens.tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = saved(tmp_path / "teacher", bert())
    recipe = DistilBert(
        teacher_model=model, tokenizer=str(tmp_path / "tokenizer.json"), data=small, max_length=24, batch_size=8,
        student_layers=2,
    )  # fmt: skip
    task = recipe.workload(0).task()
    assert task.teacher.get_output_embeddings().weight is task.teacher.get_input_embeddings().weight  # type: ignore[operator]
    options = RunOptions(
        devices=2, strategy="fill", microbatches=2, teacher_partition=Numbers((3, 5)), student_partition=Numbers((3, 3))
    )
    got, _ = train_few(recipe, options, 2)
    plain, _ = train_few(recipe, RunOptions(strategy="reference", microbatches=2), 2)
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_a_tied_student_may_be_in_two_stages(small: str) -> None:
    recipe = DistilBert(**TINY, data=small, tie_embeddings=True)
    got, _ = train_few(recipe, RunOptions(devices=2, microbatches=2, strategy="1f1b"), 2)
    plain, _ = train_few(recipe, RunOptions(strategy="reference", microbatches=2), 2)
    assert all(torch.equal(got[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_the_distilled_student_is_better_than_the_same_one_alone(small: str, tmp_path: Path) -> None:
    """On a text that says what a masked word is; docs/language.md has the figures of the defaults."""
    recipe = DistilBert(**TINY, data=small, epochs=2, teacher_epochs=6, lr=1e-2, teacher_lr=1e-2, dropout=0.0)
    directory = RunDirectory.create(str(tmp_path / "run"), "distilbert")
    summary = run_recipe(recipe, RunOptions(devices=2, microbatches=1), directory, quiet=True)
    metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    assert metrics == summary["metrics"]
    assert "teacher" not in summary
    for model in ("teacher", "student", "student_alone"):
        assert metrics[model]["perplexity"] == pytest.approx(torch.tensor(metrics[model]["cross_entropy"]).exp().item(), rel=1e-4)
        assert 0.0 <= metrics[model]["accuracy"] <= 1.0
    assert metrics["student"]["cross_entropy"] < metrics["student_alone"]["cross_entropy"] - 0.2


# -- what is refused --------------------------------------------------------------------------------------------------


def test_all_problems_of_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        DistilBert(
            max_length=4, student_layers=9, heads=3, temperature=0.0, dropout=1.0, mask_probability=0.0, epochs=0, lr=-1.0,
            soft_target_weight=-1.0,
        )  # fmt: skip
    for expected in (
        "max_length is 4; expected at least 8", "student_layers is 9, more than", "which 3 heads do not divide",
        "temperature is 0.0", "dropout is 1.0", "mask_probability is 0.0", "epochs is 0", "lr is -1.0", "soft_target_weight is",
    ):  # fmt: skip
        assert expected in str(error.value)
    with pytest.raises(ConfigError, match="are all 0"):
        DistilBert(soft_target_weight=0.0, cross_entropy_weight=0.0, cosine_weight=0.0)
    with pytest.raises(ConfigError, match="hidden_size is 64, but it is that of the teacher_model.*vocab_size is 7"):
        DistilBert(teacher_model="some", hidden_size=64, vocab_size=7)


def test_models_that_do_not_fit_are_refused_before_training(small: str, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            DistilBert(data=small, max_length=24, **options).workload(0)

    DistilBert(**TINY, data=small).workload(0).train_loader.collate_fn.tokens.tokenizer.save(  # type: ignore[union-attr]
        tokenizer := str(tmp_path / "tokenizer.json")
    )
    refused("no directory '/nowhere' with a teacher", teacher_model="/nowhere")
    (tmp_path / "empty").mkdir()
    refused("cannot read the teacher '.*empty'", teacher_model=str(tmp_path / "empty"))
    student = language.distilbert(Sizes(2, 24, 2, 24, 99, 24), dropout=0.0, pad=0, tied=False, seed=0)
    other = saved(tmp_path / "student", student)
    refused("is a model of type 'distilbert'; expected 'bert'", teacher_model=other)
    teacher = saved(tmp_path / "teacher", bert())
    refused("tokens, the vocabulary of the teacher '.*teacher' 150; give the tokenizer", teacher_model=teacher)
    refused(
        r"has a vocabulary of 99 tokens and the teacher of 150.*have 24 features and the teacher's 16",
        teacher_model=teacher, tokenizer=tokenizer, student_model=other,
    )  # fmt: skip
    refused("is a model of type 'bert'; expected 'distilbert'", teacher_model=teacher, student_model=teacher)
    large = saved(tmp_path / "large", bert(vocab_size=1000, positions=8))
    refused(
        "tokens, the vocabulary of the teacher '.*large' 1000.*positions for 8 tokens",
        teacher_model=large, tokenizer=tokenizer,
    )  # fmt: skip
    tokens.trained_tokens(text.embedded()[:8], 400).tokenizer.save(tokenizer)
    refused("has 400 tokens, the teacher's vocabulary 100; give --vocab_size", vocab_size=100, tokenizer=tokenizer)


def test_a_text_shorter_than_a_sequence_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one two\n" * 10)
    with pytest.raises(DataError, match="too short: it has .* tokens to train on"):
        preflight(DistilBert(**{**TINY, "max_length": 64}, data=str(tmp_path / "short.txt")), RunOptions())
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="is empty"):
        preflight(DistilBert(**TINY, data=str(tmp_path / "empty.txt")), RunOptions())


def test_a_student_of_ones_own(small: str, tmp_path: Path) -> None:
    sizes = Sizes(2, 16, 2, 24, 150, 24)
    student = language.distilbert(sizes, dropout=0.0, pad=0, tied=False, seed=7)
    recipe = DistilBert(**TINY, data=small, student_model=saved(tmp_path / "student", student))
    task = recipe.workload(0).task()
    state = student.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in task.student.state_dict().items())


def test_grouping_can_be_left_out(small: str) -> None:
    workload = DistilBert(**TINY, data=small, group_by_length=False).workload(0)
    assert workload.length_axis is None
    assert {inputs["input_ids"].shape[1] for inputs, _ in workload.train_loader} == {24}
    task = Supervised(workload.build_student(), workload.supervised_loss)
    options = RunOptions(devices=2, strategy="1f1b", microbatches=2)
    assert workload.trainer(task, options).fit(workload.train_loader, steps=2).steps == 2
