"""The suites: what they measure is what the metrics say, the known effects show, and nothing plausible stands in for
what cannot be measured."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import InputError, MethodError
from pullback.core.pose import pose
from pullback.evaluation import Measurements, deletion, leakage
from pullback.evaluation.suites import SUITES, Retraining, Suite, run_suites, suite
from pullback.evaluation.suites.cases import Case, loaded, trained_net
from pullback.evaluation.suites.compared import (
    CONTROLS,
    METHODS,
    Blurred,
    OfModel,
    TimesInput,
    Upsampled,
    made,
)
from pullback.evaluation.suites.metrics import METRICS, names_of
from tests.killing import kill_after, needs_fork

SMALL = suite(
    "blockmnist", images=40, seeds=1, training_images=1500, epochs=5,
    methods=("gradient", "integrated gradients", "gradcam"), controls=("random", "edges", "blurred gradient"),
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measurements, Path]:
    folder = tmp_path_factory.mktemp("suite")
    return SMALL.run(out=folder), folder


def test_the_numbers_are_those_of_the_metrics(small: tuple[Measurements, Path]) -> None:
    found, _ = small
    case = Case("block_mnist", "standard", 0, None, "perceptron", 1500, 5)
    net, data = trained_net(case), loaded("block_mnist", None, 1500)
    x = data.test_x[:40]
    assert data.signal is not None
    map_ = pb.explain(net.model, x, method="gradient")
    expected = leakage(None, None, map_.values, signal_mask=data.signal[:40]).values  # type: ignore[arg-type]
    values = found.values("block_mnist", "standard", "gradient", "leakage")
    assert values.shape == (1, 40)
    assert torch.allclose(values[0], expected, rtol=1e-3)
    facts = found.settings["models"]["block_mnist, standard, seed 0"]
    assert facts["accuracy"] == pytest.approx(net.accuracy, abs=1e-3)


def test_leakage_of_standard_nets_and_none_in_the_top_variant(small: tuple[Measurements, Path]) -> None:
    found, _ = small
    share = {
        model: found.values(*model, "gradient", "null_share@0.1").mean()
        for model in (("block_mnist", "standard"), ("block_mnist", "robust"), ("block_mnist_top", "standard"))
    }
    # measured with 1,500 images and 5 epochs: 0.3, 0.03, 0.005; with 4,000: 0.29, 0.004, 0
    assert share["block_mnist", "standard"] > 0.2
    assert share["block_mnist", "robust"] < 0.12
    assert share["block_mnist_top", "standard"] < 0.05
    random = found.values("block_mnist", "standard", "random", "leakage")
    assert abs(float(random.mean()) - 0.5) < 0.03
    scores = {
        score.method: score
        for score in found.scores()
        if (score.data, score.model, score.metric) == ("block_mnist_top", "standard", "leakage")
    }
    assert scores["gradient"].standing.beats_controls
    assert scores["edges"].control
    assert scores["blurred gradient"].variant


def test_what_a_model_cannot_have_is_a_row_that_says_so(small: tuple[Measurements, Path]) -> None:
    found, _ = small
    rows = [row for row in found.rows if row.method == "gradcam"]
    assert len(rows) == 3 * 5  # three models, five numbers
    assert all(row.values == () and row.flag.startswith("MethodError: GradCAM(") for row in rows)
    assert "gradcam: MethodError: GradCAM(" in found.to_markdown()


def test_it_resumes_and_its_settings_are_a_suite(small: tuple[Measurements, Path], tmp_path: Path) -> None:
    found, folder = small
    results = folder / "maps" / "results.jsonl"
    before = results.read_bytes()
    results.write_bytes(before[: len(before) // 2])
    again = SMALL.run(out=folder)
    assert repr(again.rows) == repr(found.rows)
    assert sorted(
        line for line in results.read_bytes().splitlines() if line in before.splitlines()
    ) == sorted(before.splitlines())
    found.to_json(tmp_path / "measurements.json")
    assert Suite.from_settings(Measurements.load(tmp_path / "measurements.json").settings) == SMALL
    with pytest.raises(InputError, match="The settings are of no suite"):
        Suite.from_settings({"suite": {"name": "x", "colour": 1}})
    with pytest.raises(InputError, match="The settings are of no suite"):
        Suite.from_settings({})


@needs_fork
def test_killed_in_the_middle_the_table_is_the_same(small: tuple[Measurements, Path], tmp_path: Path) -> None:
    found, _ = small
    file = tmp_path / "maps" / "results.jsonl"
    few = replace(SMALL, models=(("block_mnist", "standard"),))
    for lines in (1, 3):
        kill_after(0.01, lambda: few.run(out=tmp_path), lambda lines=lines: file.exists() and file.read_bytes().count(b"\n") >= lines)  # type: ignore[misc]  # fmt: skip
    rows = few.run(out=tmp_path).rows
    assert repr(rows) == repr(
        [row for row in found.rows if (row.data, row.model) == ("block_mnist", "standard")]
    )


class Collapsed(nn.Module):
    """Answers alike for every image."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :10] + torch.arange(10.0)


class Broken(nn.Module):
    """A gradient that is not finite at black pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1).sqrt())  # type: ignore[no-any-return]


def given(model: str, **more: Any) -> Measurements:
    measure = Suite(
        "mine", (("mnist", "given"),), ("deletion", "gini", "random_logit"), methods=("gradient",),
        controls=("random",), architecture=f"tests.evaluation.suites.test_suites:{model}", images=8, seeds=1, **more,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is undefined is in the rows
        return measure.run()


def test_a_collapsed_model_and_maps_that_are_not_finite_give_no_numbers() -> None:
    collapsed = given("Collapsed")
    assert {row.values for row in collapsed.rows} == {()}
    assert {row.flag for row in collapsed.rows} == {
        "the model has collapsed: it answers alike for every image, so its maps mean nothing"
    }
    assert {row.metric for row in collapsed.rows} == {
        "deletion, mean",
        "deletion, zeros",
        "Gini",
        "random logit",
    }
    assert all(math.isnan(score.interval.estimate) for score in collapsed.scores())
    broken = given("Broken")
    own = [row for row in broken.rows if row.method == "gradient"]
    assert all(row.values == () for row in own)
    assert own[0].flag == "InputError: 8 of its 8 maps have NaN or infinite values"
    assert all(len(row.values) == 8 for row in broken.rows if row.method == "random" and row.metric == "Gini")


def test_a_constant_map_is_counted_as_undefined() -> None:
    found = given("Flat")
    (row,) = [row for row in found.rows if (row.method, row.metric) == ("gradient", "Gini")]
    assert row.flag == "undefined for 8 of 8 images"
    assert all(map(math.isnan, row.values))


class Flat(nn.Module):
    """Its classes differ from image to image, and its gradient is zero."""

    def forward(self, x: Tensor) -> Tensor:
        levels = x.detach().flatten(1).sum(1).long() % 10
        return nn.functional.one_hot(levels, 10).float() + 0 * x.flatten(1)[:, :1]


def test_own_data_and_a_model_of_ones_own(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.random((12, 1, 28, 28), dtype=np.float32)
    mask = np.zeros((6, 1, 28, 28), dtype=bool)
    mask[..., :14] = True
    arrays = {"x_train": x[:6], "y_train": np.arange(6), "x_test": x[6:], "y_test": np.arange(6)}
    np.savez(tmp_path / "mine.npz", signal_mask=mask, **arrays)
    measure = Suite(
        "mine", ((str(tmp_path / "mine.npz"), "given"),), ("leakage", "deletion"), methods=("gradient",), controls=(),
        architecture="tests.evaluation.suites.test_suites:net", images=6, seeds=1,
    )  # fmt: skip
    found = measure.run()
    map_ = pb.explain(net(), torch.from_numpy(x[6:]), method="gradient").values
    signal = torch.from_numpy(mask)
    assert torch.allclose(
        found.values("mine", measure.architecture, "gradient", "leakage")[0],
        leakage(None, None, map_, signal_mask=signal).values,  # type: ignore[arg-type]
        rtol=1e-3,
    )
    target = pb.Probability(net()(torch.from_numpy(x[6:])).argmax(1))
    levels = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    expected = deletion(net(), torch.from_numpy(x[6:]), map_, target=target, levels=levels, mask="mean", ranking="absolute")  # fmt: skip
    measured = found.values("mine", measure.architecture, "gradient", "deletion, mean")[0]
    assert torch.allclose(measured, expected.values, rtol=1e-3)
    # the file is read anew when it has changed, and so is the model when its weights have
    np.savez(tmp_path / "mine.npz", signal_mask=~mask, **arrays)
    os.utime(tmp_path / "mine.npz", (1, 1))
    turned = measure.run().values("mine", measure.architecture, "gradient", "leakage")
    assert torch.allclose(
        turned, 1 - found.values("mine", measure.architecture, "gradient", "leakage"), atol=2e-3
    )
    untrained = replace(measure, methods=("gradient",), controls=("untrained gradient",)).run()
    same = [
        untrained.values("mine", measure.architecture, name, "leakage")
        for name in ("gradient", "untrained gradient")
    ]
    assert not torch.allclose(
        same[0], same[1], atol=0.01
    )  # a factory gives trained weights: they are drawn anew
    np.savez(tmp_path / "half.npz", x_train=x)
    with pytest.raises(
        InputError, match=r"half.npz\" cannot be used .*Expected a .npz with floating x_train"
    ):
        replace(measure, models=((str(tmp_path / "half.npz"), "given"),)).run()
    with pytest.raises(InputError, match=r"There is no file"):
        replace(measure, models=(("none.npz", "given"),)).run()


def net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 24 * 24, 10))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_the_parts_of_the_comparison_are_what_their_names_say() -> None:
    model = net()
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([1, 2, 3])
    problem = pose(model, x, target=target)
    gradient = pb.explain(model, x, target=target, method="gradient").values
    assert torch.equal(TimesInput(pb.Gradient())(problem.fresh()), x * gradient)
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    assert torch.allclose(OfModel(pb.Gradient(), other)(problem.fresh())[1].flatten(), other[1].weight[2])
    enlarged = Upsampled()(problem.fresh())
    coarse = pb.explain(model, x, target=target, method="gradcam", site="0").values
    assert torch.allclose(enlarged, nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear"))
    blurred = Blurred(pb.Gradient(), sigma=1.0)(problem.fresh())
    assert float(blurred.sum()) == pytest.approx(float(gradient.abs().sum()), rel=0.02)
    assert float(blurred.flatten(1).var(1).sum()) < float(gradient.abs().flatten(1).var(1).sum())
    for name in (*METHODS, *CONTROLS):
        _, kind, control = made(name, model, net, 0)
        assert (kind in ("contribution", "rate"), control) == (True, name in CONTROLS)
    with pytest.raises(MethodError, match=r"The method 'gradeint' was given.*nearest: \"gradient\""):
        made("gradeint", model, net, 0)


def test_bad_settings_are_named() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"metrics": ("deletin",)}, "The metric 'deletin' was given.*nearest: \"deletion\""),
        ({"images": 0}, "images=0"),
        ({"models": ()}, "0 models were given"),
        ({"models": (("minst", "standard"),)}, "data='minst' was given.*nearest: \"mnist\""),
        ({"models": (("mnist", "best"),)}, "training='best' was given"),
        ({"architecture": "transformer"}, "architecture='transformer' was given"),
        ({"controls": ("noise",)}, r"controls=\['noise'\] was given"),
        ({"metrics": ("leakage",)}, "for 'mnist', whose signal is not known"),
        ({"colour": "red"}, "The setting 'colour' was given"),
    ]
    for options, message in cases:
        with pytest.raises((InputError, MethodError), match=message):
            suite("faithfulness", **options)
    with pytest.raises(InputError, match=r"The suite 'sanitty' was given.*nearest: \"sanity\""):
        suite("sanitty")
    with pytest.raises(InputError, match="CIFAR-10 does not come with pullback"):
        suite("faithfulness", models=(("cifar10", "standard"),)).run()


def test_every_metric_names_its_rows() -> None:
    """What a method without maps is said to lack is what the others have."""
    assert {name for each in SUITES.values() for name in each.metrics} - set(METRICS) == {
        "diffroar",
        "mask_shape",
    }
    measure = Suite(
        "all", (("block_signal", "standard"),), tuple(METRICS), methods=("gradient", "gradcam"), controls=(),
        images=4, seeds=1, epochs=2,
    )  # fmt: skip
    found = measure.run()
    names = {row.metric: row.direction for row in found.rows if row.method == "gradient"}
    assert {row.metric: row.direction for row in found.rows if row.method == "gradcam"} == names
    assert dict(pair for metric in METRICS for pair in names_of(metric, ("mean", "zeros"), 10)) == names


@pytest.mark.slow
def test_diffroar_with_its_controls_and_what_the_mask_gives_away(tmp_path: Path) -> None:
    how = Retraining(levels=(0.05,), seeds=2, epochs=8)
    measure = suite(
        "diffroar", methods=("gradient", "gradcam"), training_images=1200, seeds=1, retraining=how, masks=("zeros",),
    )  # fmt: skip
    found = measure.run(out=tmp_path)
    mean = {
        (score.model, score.method): score.interval.estimate
        for score in found.scores()
        if score.metric == "DiffROAR@0.05, zeros"
    }
    # measured: 0.09 and 0.37; a random order 0.00, the input's own intensity 0.32
    assert mean["robust", "gradient"] > mean["standard", "gradient"] + 0.1
    assert abs(mean["standard", "random"]) < 0.06
    assert mean["standard", "input intensity"] > 0.15
    assert math.isnan(mean["standard", "gradcam"])
    shape = found.values("block_mnist", "standard", "random", "mask shape@0.05").mean()
    assert abs(float(shape) - 0.1) < 0.05  # the shape of a random mask says nothing of ten classes
    assert float(found.values("block_mnist", "standard", "gradient", "mask shape@0.05").mean()) > 0.3
    again = measure.run(out=tmp_path)
    assert repr(again.rows) == repr(found.rows)


@pytest.mark.slow
def test_two_processes_measure_the_same(small: tuple[Measurements, Path], tmp_path: Path) -> None:
    found, _ = small
    few = replace(SMALL, models=(("block_mnist", "standard"),))
    rows = few.run(out=tmp_path, backend="process", workers=2, threads=1).rows
    assert repr(rows) == repr(
        [row for row in found.rows if (row.data, row.model) == ("block_mnist", "standard")]
    )


def test_a_model_in_memory_is_measured_alike_and_left_as_it_was(small: tuple[Measurements, Path]) -> None:
    found, _ = small
    case = Case("block_mnist", "standard", 0, None, "perceptron", 1500, 5)
    model, data = trained_net(case).model, loaded("block_mnist", None, 1500)
    assert data.signal is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    here = SMALL.on(model, data.test_x[:40], data.signal[:40])
    for method in ("gradient", "integrated gradients", "edges", "blurred gradient"):
        one = here.values("x", "Sequential", method, "leakage")
        assert torch.equal(one, found.values("block_mnist", "standard", method, "leakage"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    untrained = suite("blockmnist", methods=("gradient",), controls=("untrained gradient",))
    chance = untrained.on(model, data.test_x[:40], data.signal[:40])
    assert float(chance.values("x", "Sequential", "untrained gradient", "leakage").mean()) == pytest.approx(
        0.5, abs=0.06
    )
    sanity = suite("sanity", methods=("gradient",), controls=("edges",)).on(model, data.test_x[:8])
    assert float(sanity.values("x", "Sequential", "edges", "parameter randomization").mean()) > 0.99
    with pytest.raises(InputError, match=r"None of the metrics .* can be measured here. Expected signal="):
        SMALL.on(model, data.test_x[:4])
    with pytest.raises(InputError, match="A Sequential in train mode and 4 inputs were given"):
        SMALL.on(nn.Sequential(model).train(), data.test_x[:4], data.signal[:4])
    flat = suite("faithfulness", methods=("gradient",), controls=()).on(Collapsed().eval(), data.test_x[:4])
    assert {row.values for row in flat.rows} == {()}


def test_all_suites_are_run_into_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(self: Suite, *, out: Path, **more: Any) -> Measurements:
        seen.append((self.name, out.name, self.images))
        return Measurements([], {"suite": {"name": self.name}})

    monkeypatch.setattr(Suite, "run", run)
    found = run_suites("all", out=tmp_path, options={"images": 3})
    assert seen == [(name, name, 3) for name in SUITES]
    assert json.dumps(found.settings)
    assert set(found.settings) == set(SUITES)
