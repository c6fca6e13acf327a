"""What a metric returns: means and intervals over defined values, and text that survives JSON."""

from __future__ import annotations

import json

import pytest
import torch

from pullback.evaluation import MetricResult, bootstrap_interval

NAN = float("nan")


def result(values: list[float]) -> MetricResult:
    return MetricResult(
        "leakage",
        torch.tensor(values),
        "lower",
        curve=torch.tensor([[1.0, NAN]]),
        params={"fractions": (0.1, 0.5), "norm": None, "bad": float("inf")},
        details={"share": torch.tensor([True, False])},
    )


def test_mean_leaves_out_undefined_examples() -> None:
    assert result([1.0, NAN, 2.0, 6.0]).mean() == 3.0
    assert result([NAN]).mean() != result([NAN]).mean()  # NaN, not 0


def test_interval_is_the_bootstrap_interval_of_the_values() -> None:
    values = [0.1, 0.5, NAN, 0.9, 0.3]
    interval = result(values).interval(level=0.8, seed=3)
    assert interval == bootstrap_interval(torch.tensor(values), level=0.8, seed=3)
    assert (interval.count, interval.undefined) == (4, 1)


def test_to_dict_is_strict_json_and_keeps_every_number() -> None:
    text = json.dumps(result([0.5, NAN]).to_dict(), allow_nan=False)
    assert json.loads(text) == {
        "name": "leakage",
        "direction": "lower",
        "mean": 0.5,
        "values": [0.5, None],
        "curve": [[1.0, None]],
        "params": {"fractions": [0.1, 0.5], "norm": None, "bad": None},
        "details": {"share": [True, False]},
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5] * 4, "leakage 0.5 [0.5, 0.5] (95% bootstrap, n=4), lower is better"),
        ([0.5, 0.5, NAN], "leakage 0.5 [0.5, 0.5] (95% bootstrap, n=2, 1 undefined), lower is better"),
        ([NAN], "leakage nan [nan, nan] (95% bootstrap, n=0, 1 undefined), lower is better"),
    ],
)
def test_text_names_the_direction_and_what_is_undefined(values: list[float], text: str) -> None:
    assert str(result(values)) == text
