"""Hashes of teachers and tokenizers tell apart what makes a cache wrong, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from support.chats import MARKED, backend, llama, tokenizer
from torch import nn

import pipestill as ps


def test_a_teacher_is_its_weights_and_its_structure() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh())
    first = ps.cache.teacher_hash(model)
    assert ps.cache.teacher_hash(copy.deepcopy(model).train()) == first
    others = [copy.deepcopy(model) for _ in range(4)]
    with torch.no_grad():
        others[0][0].weight[1, 2] += 1e-6
        others[1][1].running_mean[0] += 1
    others[2][2] = nn.ReLU()
    others[3] = others[3].double()
    assert len({first, *map(ps.cache.teacher_hash, others)}) == 5


def test_a_teacher_with_a_config_is_its_settings() -> None:
    model = llama()
    first = ps.cache.teacher_hash(model)
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = True
    assert ps.cache.teacher_hash(model) == first
    model.config.rms_norm_eps = 1e-3
    assert ps.cache.teacher_hash(model) != first


def test_shared_weights_are_hashed_once_and_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    apart = copy.deepcopy(model)
    apart[1].weight = nn.Parameter(apart[0].weight.detach().clone())
    assert ps.cache.teacher_hash(model) == ps.cache.teacher_hash(apart)


def test_a_teacher_without_weights_is_refused() -> None:
    with pytest.raises(ps.UserError, match="'weight' is on the meta device"):
        ps.cache.teacher_hash(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ps.UserError, match="teacher is 'gpt2'; expected an nn.Module"):
        ps.cache.teacher_hash("gpt2")  # type: ignore[arg-type]


def test_a_tokenizer_is_what_its_numbers_stand_for() -> None:
    first = ps.cache.tokenizer_hash(tokenizer())
    padded = tokenizer(MARKED)
    padded.backend_tokenizer.enable_padding()
    padded.backend_tokenizer.enable_truncation(7)
    assert ps.cache.tokenizer_hash(padded) == ps.cache.tokenizer_hash(backend()) == first
    more = tokenizer()
    more.add_tokens(["pipestill"])
    assert ps.cache.tokenizer_hash(more) != first
    with pytest.raises(ps.UserError, match="expected one of transformers or of tokenizers"):
        ps.cache.tokenizer_hash("gpt2")
