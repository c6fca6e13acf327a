"""pullback evaluate: the library's numbers, files that can be run again, one-line errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pullback.cli import app, main
from pullback.evaluation import Measurements
from pullback.evaluation.suites import suite

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
"""
FEW = ["--images", "6", "--seeds", "1", "--training-images", "200", "--epochs", "2", "--method", "gradient"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_evaluated_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    return tmp_path


def test_a_suite_is_run_and_written(folder: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "sanity", "--metric", "random_logit", *FEW])
    assert result.exit_code == 0, result.output
    assert "| gradient | " in result.output
    assert "| edges (control) | " in result.output
    expected = suite(
        "sanity",
        metrics=("random_logit",),
        images=6,
        seeds=1,
        training_images=200,
        epochs=2,
        methods=("gradient",),
    ).run()
    found = Measurements.load(folder / "evaluation" / "measurements.json")
    assert repr(tuple(found.rows)) == repr(tuple(expected.rows))
    with open(folder / "evaluation" / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {"random logit"}
    assert "random logit" in (folder / "evaluation" / "report.html").read_text()
    assert (folder / "evaluation" / "table.md").read_text().strip() == expected.to_markdown()

    # the saved result is a configuration, and the folder is gone on from
    again = ["evaluate", "--config", "evaluation/measurements.json", "--json"]
    printed = json.loads(CliRunner().invoke(app, again).output)
    assert printed["scores"][0]["estimate"] == expected.scores()[0].interval.estimate
    more = CliRunner().invoke(app, [*again, "--seed", "1", "--out", "other"])
    assert {row.seed for row in Measurements.load(folder / "other" / "measurements.json").rows} == {1}, (
        more.output
    )


def test_a_model_of_ones_own_and_a_plan(folder: Path) -> None:
    given = [
        "evaluate",
        "faithfulness",
        "--model",
        "my_evaluated_nets:net",
        "--metric",
        "deletion",
        "--images",
        "4",
    ]
    result = CliRunner().invoke(app, [*given, "--method", "gradient", "--method", "smoothgrad(samples=2)"])
    assert result.exit_code == 0, result.output
    assert "**mnist, my_evaluated_nets:net**" in result.output
    assert "| smoothgrad(samples=2) | " in result.output
    plan = CliRunner().invoke(app, ["evaluate", "sanity", "--plan", "--out", "planned", *FEW])
    assert "maps: 7 tasks: 1 finished, 6 missing; about " in plan.output
    retraining = CliRunner().invoke(app, ["evaluate", "diffroar", "--plan", *FEW])
    # a method and six controls at two levels, two sides and three seeds
    assert "block_mnist, robust, diffroar, zeros: 84 retrainings of " in retraining.output
    assert retraining.output.count("mask_shape: 84 retrainings") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sanitty"], "The suite 'sanitty' was given"),
        ([], "give one: a suite"),
        (["sanity", "--config", "a.json"], "give one: a suite"),
        (["--config", "none.json"], "none.json cannot be read"),
        (["sanity", "--metric", "roc"], "The metric 'roc' was given"),
        (["sanity", "--method", "gradeint"], "The method 'gradeint' was given"),
        (["sanity", "--data", "cifar10"], "CIFAR-10 does not come with pullback"),
        (["sanity", "--images", "0"], "images=0"),
        (["all", "--plan"], '--plan was given with "all"'),
        (["sanity", "--backend", "threads", *FEW], "backend='threads' was given"),
        (["faithfulness", "--model", "my_evaluated_nets:nut", "--images", "2"], "cannot be imported"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
