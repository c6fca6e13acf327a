"""DiffROAR and ROAR against their definitions, and on data whose discriminative part is known."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.datasets.theory import block_signal
from pullback.evaluation import ROAR, DiffROAR, RetrainingResult, TrainSpec, multilayer_perceptron, train
from pullback.evaluation.orders import orders

DATA = block_signal(500, blocks=10, block_size=2, noise=0.05, seed=0)
TRAIN, TEST = (DATA.x[:300], DATA.y[:300]), (DATA.x[300:], DATA.y[300:])
TRUE = (DATA.signal_mask[:300].float(), DATA.signal_mask[300:].float())
QUICK = TrainSpec(epochs=12, batch=64, learning_rate=1e-2)


def net() -> nn.Module:
    return multilayer_perceptron(20, 2, (16,))


@pytest.fixture(scope="module")
def result() -> RetrainingResult:
    measure = DiffROAR(levels=(0.1, 1.0), seeds=4, training=QUICK, mask="zeros", vectorize="stack")
    return measure.run(TRAIN, TEST, {"signal": TRUE}, net, controls={"mine": TRUE})


def test_the_known_signal_scores_high_and_a_random_order_about_zero(result: RetrainingResult) -> None:
    signal = result.score("signal", 0.1)
    # the top 2 of 20 numbers are the whole signal; what is left is noise without any label: chance
    assert signal.accuracies["top"] > 0.98
    assert abs(signal.accuracies["bottom"] - 0.5) < 0.1
    assert signal.interval.low > 0.35
    random = result.score("random", 0.1)
    assert abs(random.interval.estimate) < 0.1
    assert 0.0 in random.interval
    assert result.value("input", 0.1) > 0.35  # zeros do not hide where the signal was
    assert result.compare("signal", "random", 0.1).interval.low > 0.3


def test_at_level_one_both_arms_are_the_same_runs(result: RetrainingResult) -> None:
    for method in result.methods:
        assert result.value(method, 1.0) == 0.0
        assert result.score(method, 1.0).interval.high == 0.0


def test_rows_controls_and_tables(result: RetrainingResult, tmp_path: Path) -> None:
    assert result.methods == ("signal", "mine", "random", "untrained", "input")
    assert {run.method for run in result.runs if run.control} == {"mine", "random", "untrained", "input"}
    # five methods, two levels, two sides, four seeds; random controls have one base per seed
    assert len(result.runs) == len(result.correct) == 5 * 2 * 2 * 4
    assert {run.base_seed for run in result.runs if run.method == "random"} == {0, 1, 2, 3}
    for run, right in zip(result.runs, result.correct, strict=True):
        assert run.value == float(right.double().mean())
    for one, other in zip(result.runs[:16], result.runs[16:32], strict=True):  # "mine" is "signal" again
        assert replace(one, method="", control=False, seconds=0) == replace(
            other, method="", control=False, seconds=0
        )
    assert math.isclose(result.area("signal"), (result.value("signal", 0.1) + 0) / 2)
    result.to_csv(tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [run.value for run in result.runs]
    table = result.to_markdown().splitlines()
    assert len(table) == 2 + 5
    assert table[4].startswith("| random (control) | ")
    assert f"{result.value('signal', 0.1):+.3f}" in table[2]


def masked(x: Tensor, attribution: Tensor, keep: int, first: bool, fill: Tensor) -> Tensor:
    """The definition, example by example and element by element."""
    out = x.clone()
    for row in range(len(x)):
        order = sorted(range(x.shape[1]), key=lambda j: -abs(float(attribution[row, j])))
        kept = order[:keep] if first else order[-keep:]
        for j in range(x.shape[1]):
            if j not in kept:
                out[row, j] = fill[j]
    return out


@pytest.mark.parametrize("way", ["loop", "stack"])
def test_diffroar_and_roar_equal_their_definitions_with_plain_training(way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    attribution = torch.randn(500, 20, generator=generator)
    pair = (attribution[:300], attribution[300:])
    spec = replace(QUICK, epochs=2, seed=3)
    fill = TRAIN[0].mean(0)

    def accuracy(seed: int, keep: int, first: bool) -> float:
        points = masked(TRAIN[0], pair[0], keep, first, fill)
        model = train(net, points, TRAIN[1], replace(spec, seed=seed)).model
        return float(
            (model(masked(TEST[0], pair[1], keep, first, fill)).argmax(1) == TEST[1]).double().mean()
        )

    settings = {"seeds": 2, "training": spec, "controls": (), "validation": 0.0, "vectorize": way}
    found = DiffROAR(levels=(0.3,), **settings).run(TRAIN, TEST, {"a": pair}, net)
    expected = [accuracy(seed, 6, True) - accuracy(seed, 6, False) for seed in (3, 4)]
    assert torch.allclose(found.differences("a", 0.3).mean(1), torch.tensor(expected).double(), atol=1e-12)
    removed = ROAR(levels=(0.3,), mask="mean", **settings).run(TRAIN, TEST, {"a": pair}, net)
    expected = [accuracy(seed, 20, True) - accuracy(seed, 14, False) for seed in (3, 4)]
    assert torch.allclose(removed.differences("a", 0.3).mean(1), torch.tensor(expected).double(), atol=1e-12)


def test_reversing_the_order_reverses_the_sign_exactly() -> None:
    attribution = torch.randn(500, 20, generator=torch.Generator().manual_seed(1))
    sources = {"a": (attribution[:300], attribution[300:]), "-a": (-attribution[:300], -attribution[300:])}
    measure = DiffROAR(
        levels=(0.2,), seeds=3, training=replace(QUICK, epochs=2), ranking="signed", controls=()
    )
    found = measure.run(TRAIN, TEST, sources, net)
    assert found.value("a", 0.2) == -found.value("-a", 0.2)
    assert torch.equal(found.differences("a", 0.2), -found.differences("-a", 0.2))


def test_functions_get_the_predicted_class_and_true_labels_warn() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot((x.sum(1) < 0).long(), 2).to(x)

    seen: list[Tensor] = []

    def attribution(x: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return x

    measure = DiffROAR(levels=(0.5,), seeds=1, training=replace(QUICK, epochs=1), controls=())
    measure.run(TRAIN, TEST, {"f": attribution}, net, model=Wrong())
    assert torch.equal(torch.cat(seen), Wrong()(DATA.x).argmax(1))
    seen.clear()
    with pytest.warns(UserWarning, match="puts the label into the test masks"):
        replace(measure, targets="true").run(TRAIN, TEST, {"f": attribution}, net)
    assert torch.equal(torch.cat(seen), DATA.y)
    with pytest.raises(InputError, match="'f' was given without a model"):
        measure.run(TRAIN, TEST, {"f": attribution}, net)


def test_orders_of_pixels_and_elements_and_ties() -> None:
    x = torch.rand(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    a = torch.tensor([[[[1.0, -5.0], [2.0, 0.0]], [[1.0, 4.0], [-8.0, 0.5]]]]).expand(3, -1, -1, -1)
    # |a| summed over channels: 2, 9, 10, 0.5
    assert orders(a, x, "pixel", "absolute", 0)[0].tolist() == [2, 1, 0, 3]
    assert orders(a, x, "element", "absolute", 0)[0].tolist()[1] == 1
    assert orders(a, x, "element", "signed", 0)[0].tolist()[6] == 7
    with pytest.warns(UserWarning, match="same everywhere"):
        tied = orders(torch.ones_like(x), x, "pixel", "absolute", 0)
    assert tied.dtype == torch.int16
    assert tied.sort(1).values.tolist() == [[0, 1, 2, 3]] * 3
    with pytest.warns(UserWarning, match="same everywhere"):
        assert torch.equal(orders(torch.ones(1, 2, 2, 2), x[1:2], "pixel", "absolute", 0)[0], tied[1])


def test_diverged_training_gives_nan_not_a_plausible_number() -> None:
    spec = TrainSpec(epochs=2, optimizer="sgd", learning_rate=1e20)
    measure = DiffROAR(levels=(0.5,), seeds=2, training=spec, controls=(), vectorize="stack")
    found = measure.run(TRAIN, TEST, {"signal": TRUE}, net)
    assert all(math.isnan(run.value) and not run.converged and run.collapsed for run in found.runs)
    assert math.isnan(found.value("signal", 0.5))
    assert found.score("signal", 0.5).flagged == 4


def test_errors_say_what_was_given() -> None:
    measure = DiffROAR(levels=(0.5,), seeds=1, training=QUICK, controls=())
    with pytest.raises(InputError, match="have NaN or infinite values"):
        measure.run(TRAIN, TEST, {"a": (TRUE[0] * math.nan, TRUE[1])}, net)
    with pytest.raises(InputError, match="of shape"):
        measure.run(TRAIN, TEST, {"a": (TRUE[0][:, :5], TRUE[1])}, net)
    with pytest.raises(InputError, match="keeps 0 of 20 parts"):
        replace(measure, levels=(0.01,)).run(TRAIN, TEST, {"a": TRUE}, net)
    with pytest.raises(InputError, match="training data of shapes"):
        measure.run((TRAIN[0], TRAIN[1].float()), TEST, {"a": TRUE}, net)
    with pytest.raises(InputError, match="finite"):
        measure.run((TRAIN[0] / 0, TRAIN[1]), TEST, {"a": TRUE}, net)
    with pytest.raises(InputError, match="at least one, with different names"):
        measure.run(TRAIN, TEST, {}, net)
    with pytest.raises(MethodError, match="mask='blue'"):
        replace(measure, mask="blue").run(TRAIN, TEST, {"a": TRUE}, net)
    with pytest.raises(MethodError, match=r"levels=\(0.0,\)"):
        DiffROAR(levels=(0.0,))
    with pytest.raises(MethodError, match="seeds=0"):
        ROAR(seeds=0)
    with pytest.raises(MethodError, match=r"controls=\['noise'\]"):
        DiffROAR(controls=("noise",))
    with pytest.raises(MethodError, match="targets='label'"):
        DiffROAR(targets="label")  # type: ignore[arg-type]
