"""Chunks and budgets: chosen from shapes alone, halved when memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.errors import InputError
from pullback.core.resources import (
    CPU_CACHED_SET,
    LARGEST_CHUNK,
    WEIGHT_SHARING_ROWS,
    AllocationMeter,
    PeakMeter,
    Resources,
    is_out_of_memory,
    parse_bytes,
    working_set,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (7, 7),
        (2.5e3, 2500),
        ("12", 12),
        ("1kB", 1000),
        ("4GB", 4 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        (" 2gib ", 2**31),
        ("9b", 9),
    ],
)
def test_bytes(text: Any, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "4 G", "-1", 0, -5, "0MB", float("nan"), "1e3", "4GBs"])
def test_no_bytes(text: Any) -> None:
    with pytest.raises(
        InputError, match=r'memory_budget is a number of bytes or text such as "4GB" or "512MiB", got'
    ):
        parse_bytes(text)


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "many", True, "3"])
def test_no_chunk(chunk: Any) -> None:
    with pytest.raises(InputError, match=r'chunk is "auto" or a number of rows, at least 1; got'):
        Resources(chunk)


def test_out_of_memory_by_any_name() -> None:
    for error in (
        torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("MPS backend out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ):  # fmt: skip
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(other)


def test_budget_is_divided_by_what_a_row_needs() -> None:
    """Fixed 100 bytes and 10 a row: 3 % stays aside, the rest holds (970 - 100) / 10 rows."""
    resources = Resources(memory_budget=1000)
    probed: list[int] = []

    def probe(rows: int) -> int:
        probed.append(rows)
        return 100 + 10 * rows

    assert resources.rows(CPU, probe) == 87
    assert resources.rows(CPU, probe) == 87
    assert probed == [1, 2]
    assert Resources(5, 1000).rows(CPU, probe) == 5
    assert Resources(memory_budget=1000).rows(CPU, probe, held=500) == 37
    with pytest.raises(
        InputError, match=r"memory_budget is 100 bytes, but one example needs 110\. Raise the budget"
    ):
        Resources(memory_budget=100).rows(CPU, probe)


def test_automatic_chunk_depends_on_shapes_only() -> None:
    unused: Any = None
    small, large = Resources(), Resources()
    small.row_bytes, large.row_bytes = 1000, 4 * 2**20
    assert small.rows(CPU, unused) == LARGEST_CHUNK
    assert large.rows(CPU, unused) == CPU_CACHED_SET // (8 * 2**20)
    wide = Resources()
    wide.row_bytes = 10 * 2**20  # 24 rows are within the working set, though not within the caches
    assert wide.rows(CPU, unused) == WEIGHT_SHARING_ROWS
    wider = Resources()
    wider.row_bytes = 32 * 2**20
    assert wider.rows(CPU, unused) == int(working_set(CPU) // (64 * 2**20)) < WEIGHT_SHARING_ROWS
    huge = Resources()
    huge.row_bytes = 2**50
    assert huge.rows(CPU, unused) == 1
    assert Resources(3).rows(CPU, unused) == 3


def test_halving_is_remembered_and_ends_at_one_row() -> None:
    resources, error = Resources(64), torch.OutOfMemoryError("full")
    resources.halve(64, error)
    assert (resources.rows(CPU, lambda rows: 0), resources.halved) == (32, 1)
    resources.halve(5, error)
    assert resources.chosen == 2
    resources.halve(12, error, targets=3)
    assert resources.chosen == 2
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        resources.halve(1, error)


def test_peak_meter_follows_life_and_death_of_storages() -> None:
    """By hand: two vectors alive at once, then one; views and in-place results are no new storage."""
    with PeakMeter() as meter:
        a = torch.ones(100, dtype=torch.float64)
        a += 1
        a.view(10, 10).t()
        b = a * 2
        assert meter.live == 1600
        del a
        assert meter.live == 800
        c = b + 1
        del b
        assert (meter.live, meter.peak) == (800, 1600)
        assert float(c.sum()) == 500.0
    before = torch.ones(1000)
    with PeakMeter() as empty:
        before.mul_(2)
    assert empty.peak == 0


def test_allocation_meter_sums_and_sees_random_draws() -> None:
    x = torch.ones(4, 8)
    with AllocationMeter() as meter:
        nn.functional.dropout(x * 2, 0.5, training=False)
    assert meter.bytes == 128
    assert not meter.draws
    for draw in (
        lambda: torch.rand(2),
        lambda: nn.functional.dropout(x, 0.5),
        lambda: torch.randperm(3),
        lambda: x.clone().normal_(),
    ):
        with AllocationMeter() as meter:
            draw()
        assert meter.draws


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_draws_only_with_dropout(dropout: float) -> None:
    q = torch.ones(1, 2, 4, 8)
    with AllocationMeter() as meter, torch.no_grad():
        nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=dropout)
    assert meter.draws == (dropout > 0)
