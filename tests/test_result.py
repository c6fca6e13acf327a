"""Attribution: views argue from sums, indexing from the parts, files from round trips and damage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.result import Attribution


def attribution(**changes: Any) -> Attribution:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, 3, 6, 8, generator=generator, dtype=torch.float64)
    fields: dict[str, Any] = {
        "values": values,
        "point": values * 2 + 1,
        "target": torch.tensor([3, 1, 4, 1]),
        "score": torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64),
        "method": "IntegratedGradients(steps=64)",
        "site": "input",
        "domain": None,
        "diagnostics": {
            "gap": torch.tensor([1e-3, -2e-3, 0.0, 1e-4], dtype=torch.float64),
            "converged": torch.tensor([True, False, True, True]),
            "evaluations": torch.tensor([64, 256, 64, 64]),
            "standard_error": values.abs(),
            "coverage": {"relu": 17, "depth": {"per_example": torch.arange(4)}, "uncovered": []},
            "notes": ["one", "two", "three", "four"],
        },
        "meta": {"labels": ["a", "b", "c", "d"], "tokens": None, "versions": {"torch": "2.13"}, "seed": 0},
    }
    return Attribution(**{**fields, **changes})


def assert_same(first: Any, second: Any) -> None:
    assert type(first) is type(second) or (isinstance(first, Mapping) and isinstance(second, Mapping))
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert first.shape == second.shape
        assert torch.equal(torch.nan_to_num(first.resolve_conj()), torch.nan_to_num(second.resolve_conj()))
    elif isinstance(first, Mapping):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second or (first != first and second != second)


def assert_same_attribution(first: Attribution, second: Attribution) -> None:
    for name in Attribution.__dataclass_fields__:
        assert_same(getattr(first, name), getattr(second, name))


# ---------------------------------------------------------------------- indexing


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [3, 1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (torch.tensor([2, 2, -4]), [2, 2, 0]),
        ([3, 0], [3, 0]),
        ([], []),
    ],
)
def test_index_cuts_everything_per_example_and_nothing_else(index: Any, rows: list[int]) -> None:
    a = attribution(meta={"labels": ["a", "b", "c", "d"], "tokens": [[str(i)] for i in range(4)], "seed": 0})
    cut = a[index]
    assert len(cut) == len(rows)
    for got, whole in (
        (cut.values, a.values),
        (cut.point, a.point),
        (cut.target, a.target),
        (cut.score, a.score),
        (cut.diagnostics["gap"], a.diagnostics["gap"]),
        (cut.diagnostics["standard_error"], a.diagnostics["standard_error"]),
        (cut.diagnostics["coverage"]["depth"]["per_example"], torch.arange(4)),
    ):
        assert torch.equal(got, whole[rows])
    assert cut.meta["labels"] == ["abcd"[row] for row in rows]
    assert cut.tokens == [[str(row % 4)] for row in rows]
    assert cut.diagnostics["notes"] == ["one", "two", "three", "four"]
    assert str(cut).count("\n") == 2


def test_iteration_gives_each_example_once_and_dicts_and_labels_are_cut() -> None:
    leaves = {"ids": torch.arange(8.0).view(2, 4), "pixels": torch.arange(6.0).view(2, 3)}
    a = attribution(
        values=leaves, point=leaves, target=("x", "y"), score=torch.ones(2), diagnostics={}, meta={}
    )
    parts = list(a)
    assert [part.target for part in parts] == [("x",), ("y",)]
    assert torch.equal(torch.cat([part.values["pixels"] for part in parts]), leaves["pixels"])


def test_index_errors() -> None:
    with pytest.raises(IndexError, match="example 4 of 4"):
        attribution()[4]
    with pytest.raises(InputError, match="expected an int, a slice, a bool tensor"):
        attribution()[torch.ones(2, 2)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"values": torch.ones(4, 2, dtype=torch.complex64)}, "values are real"),
        ({"values": torch.ones(3, 2)}, "there are 4 scores"),
        ({"target": torch.tensor([1])}, "one score and one target per example"),
        ({"values": {}}, "at least one tensor"),
    ],
)
def test_inconsistent_parts_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        attribution(**change)


# ---------------------------------------------------------------------- views


def test_sum_counts_the_batch_dimension_and_keeps_the_total() -> None:
    a = attribution()
    assert torch.equal(a.sum(1).values, a.values[:, 0] + a.values[:, 1] + a.values[:, 2])
    assert torch.allclose(a.sum((-1, 2)).sum(1).values, a.values.flatten(1).sum(1), atol=1e-12)
    assert "gap" in a.sum(1).diagnostics  # still the gap of the same total
    assert "standard_error" not in a.sum(1).diagnostics  # of other elements
    for dim in (0, -4, 4):
        with pytest.raises(InputError, match="dimension 0 counts examples"):
            a.sum(dim)


def test_abs_and_positive_split_the_values_and_drop_the_gap() -> None:
    a = attribution()
    assert torch.equal(a.positive().values * 2 - a.abs().values, a.values)
    for view in (a.abs(), a.positive()):
        assert not {"gap", "converged", "standard_error"} & set(view.diagnostics)
        assert "do not add up" in view.diagnostics["notes"][-1]
    assert a.diagnostics["notes"] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("size", [(6, 8), (12, 16), (13, 29), 31])
def test_conserving_upsample_keeps_every_channels_sum(size: Any) -> None:
    a = attribution()
    large = a.upsample(size, conserve=True)
    assert large.values.shape[2:] == ((size, size) if isinstance(size, int) else size)
    # float64, sums of < 1000 terms of order 1
    assert torch.allclose(large.values.sum((2, 3)), a.values.sum((2, 3)), atol=1e-11, rtol=0)
    assert "gap" in large.diagnostics


def test_plain_upsample_keeps_levels_and_says_that_the_sum_is_gone() -> None:
    a = attribution(values=torch.full((4, 3, 5), 2.5), point=torch.zeros(4, 3, 5))
    large = a.upsample(10)
    assert torch.allclose(large.values, torch.tensor(2.5))
    assert large.values.shape == (4, 10, 10)
    assert "gap" not in large.diagnostics
    with pytest.raises(InputError, match="at least as large"):
        a.upsample(2)


def test_superpixels_hold_segment_sums() -> None:
    image = torch.zeros(2, 3, 24, 24)
    image[:, :, :, 12:] = 1.0
    values = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = attribution(
        values=values,
        point=image,
        target=("p", "q"),
        score=torch.ones(2),
        diagnostics={"gap": torch.ones(2)},
        meta={},
    )
    painted = a.superpixels(segments=8)
    labels = painted.diagnostics["segments"]
    for row in range(2):
        assert set(labels[row, :, :12].unique().tolist()).isdisjoint(labels[row, :, 12:].unique().tolist())
        for label in labels[row].unique():
            inside = labels[row] == label
            total = values[row].sum(0)[inside].sum()
            assert torch.allclose(painted.values[row][inside], total, atol=1e-12)
    assert "gap" not in painted.diagnostics
    assert_same(painted[1].diagnostics["segments"], labels[1:])
    with pytest.raises(InputError, match=r"Pass image="):
        attribution(point=torch.ones(4, 3, 6, 8, dtype=torch.complex64)).superpixels()


# ---------------------------------------------------------------------- text and table


def test_text_is_three_lines_with_the_worst_gap_relative_to_its_sum() -> None:
    values = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    a = attribution(
        values=values,
        point=values,
        target=torch.tensor([281, 7]),
        score=torch.tensor([12.5, 8.0]),
        diagnostics={"gap": torch.tensor([0.0, -0.04]), "evaluations": 64, "notes": ["n"]},
        meta={"labels": ["tabby", "7"]},
        domain="Fourier()",
    )
    assert str(a).splitlines() == [
        "values (2, 2) float32 at 'input' in Fourier()",
        'target 281 "tabby", 7; score 12.5, 8',
        "method IntegratedGradients(steps=64); gap 0.04 (0.01 of the sum); 64 evaluations; 1 note",
    ]
    cancelling = attribution(values=torch.tensor([[1.0, -1.0]] * 4), diagnostics={"gap": torch.ones(4)})
    assert "of the sum" not in str(cancelling)
    assert "... (4 examples)" in str(attribution())
    assert "64 to 256 evaluations" in str(attribution())


def test_dataframe_has_a_row_per_element_and_token_sums() -> None:
    pytest.importorskip("pandas")
    a = attribution()
    table = a.to_dataframe()
    assert list(table.columns) == ["example", "explained", "dim_1", "dim_2", "dim_3", "value"]
    row = table[(table.example == 2) & (table.dim_1 == 1) & (table.dim_2 == 5) & (table.dim_3 == 7)]
    assert row["value"].item() == a.values[2, 1, 5, 7].item()
    words = attribution(
        values=torch.arange(12.0).view(2, 3, 2),
        target=("x", "y"),
        score=torch.ones(2),
        diagnostics={},
        meta={"tokens": [["a", "b", "c"], ["d", "e"]]},
    ).to_dataframe()
    assert words["token"].tolist() == ["a", "b", "c", "d", "e"]  # padding left out
    assert words["value"].tolist() == [1.0, 5.0, 9.0, 13.0, 17.0]


def test_dataframe_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        attribution().to_dataframe()


def test_importing_the_result_loads_no_drawing() -> None:
    code = (
        "import sys, pullback.result, pullback.viz\n"
        "print([m for m in ('matplotlib', 'jinja2', 'skimage', 'pandas', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
