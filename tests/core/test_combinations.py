"""Which combinations there are, and drawing k of them a step."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsplit import CombinationSampler, modality_combinations

names = st.lists(st.text("abcdefg123", min_size=1, max_size=3), min_size=1, max_size=5, unique=True)
THREE = ("text", "audio", "vision")


def test_three_modalities_largest_first_then_as_given() -> None:
    assert modality_combinations(THREE) == [
        ("text", "audio", "vision"),
        ("text", "audio"),
        ("text", "vision"),
        ("audio", "vision"),
        ("text",),
        ("audio",),
        ("vision",),
    ]


@given(names, st.data())
def test_every_combination_of_the_sizes_asked_for(
    modalities: list[str], data: st.DataObject
) -> None:
    low = data.draw(st.integers(1, len(modalities)))
    high = data.draw(st.none() | st.integers(low, len(modalities)))
    largest = len(modalities) if high is None else high
    expected = [
        combination
        for size in range(largest, low - 1, -1)
        for combination in itertools.combinations(modalities, size)
    ]
    assert modality_combinations(modalities, min_size=low, max_size=high) == expected


@given(names, st.integers(0, 100), st.booleans(), st.data())
def test_a_draw_is_k_distinct_combinations(
    modalities: list[str], seed: int, include_full: bool, data: st.DataObject
) -> None:
    every = modality_combinations(modalities)
    k = data.draw(st.integers(1, len(every)))
    sampler = CombinationSampler(modalities, k=k, include_full=include_full, seed=seed)
    for _ in range(3):
        drawn = sampler()
        assert len(drawn) == k == len(set(drawn))
        assert set(drawn) <= set(every)
        if include_full:
            assert tuple(modalities) in drawn


def test_k_is_five_or_as_many_as_there_are() -> None:
    assert len(CombinationSampler(THREE)()) == 5
    assert set(CombinationSampler(("a", "b"))()) == {("a", "b"), ("a",), ("b",)}
    assert set(CombinationSampler(THREE, k=7)()) == set(modality_combinations(THREE))
    with pytest.raises(ValueError, match="8"):
        CombinationSampler(THREE, k=8)


@pytest.mark.parametrize("include_full", [False, True])
def test_draws_are_uniform(include_full: bool) -> None:
    """Chi-squared over the combinations that are drawn by chance; 6 or 5 degrees of freedom."""
    sampler = CombinationSampler(THREE, k=3, include_full=include_full, seed=0)
    draws = 2000
    counts = Counter(c for _ in range(draws) for c in sampler())
    by_chance = [c for c in modality_combinations(THREE) if not (include_full and len(c) == 3)]
    expected = draws * (2 / 6 if include_full else 3 / 7)
    statistic = sum((counts[c] - expected) ** 2 / expected for c in by_chance)
    assert statistic < 25  # p < 0.001
    if include_full:
        assert counts[THREE] == draws


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    def sequence(seed: int) -> list[list[tuple[str, ...]]]:
        sampler = CombinationSampler(THREE, k=3, seed=seed)
        return [list(sampler()) for _ in range(8)]

    state = torch.random.get_rng_state()
    assert sequence(0) == sequence(0) != sequence(1)
    assert len({frozenset(drawn) for drawn in sequence(0)}) > 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_resumes_where_it_stopped() -> None:
    """The state survives ``torch.save`` and ``torch.load``, and does not move on by itself."""
    sampler = CombinationSampler(THREE, k=3, seed=5)
    for _ in range(4):
        sampler()
    state, file = sampler.state_dict(), io.BytesIO()
    rest = [sampler() for _ in range(6)]
    torch.save(state, file)
    file.seek(0)
    resumed = CombinationSampler(THREE, k=3, seed=0)
    resumed.load_state_dict(torch.load(file))
    assert [resumed() for _ in range(6)] == rest
