"""The table of measurements: means, intervals and ranks by hand, files that are read back, flags that stay."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from pullback.core.errors import FormatError, InputError
from pullback.datasets.theory import block_signal
from pullback.evaluation import (
    DiffROAR,
    Measurement,
    Measurements,
    TrainSpec,
    hierarchical_bootstrap,
    multilayer_perceptron,
    paired_difference,
)

NAN = float("nan")


def draws(seed: int, shift: float, count: int = 30) -> tuple[float, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple((shift + torch.randn(count, generator=generator, dtype=torch.float64)).tolist())


def table() -> Measurements:
    rows = []
    for seed in (0, 1, 2):
        rows += [
            Measurement("digits", "net", "good", False, "deletion", "lower", seed, draws(seed, -3)),
            Measurement("digits", "net", "poor", False, "deletion", "lower", seed, draws(10 + seed, 0)),
            Measurement("digits", "net", "random", True, "deletion", "lower", seed, draws(20 + seed, 0)),
            Measurement(
                "digits", "net", "dead", False, "deletion", "lower", seed, (), "MethodError: no convolution"
            ),
            Measurement("digits", "net", "good", False, "gini", "higher", seed, (0.5, NAN)),
            Measurement("digits", "net", "poor", False, "gini", "higher", seed, (0.25, 0.25)),
        ]
    return Measurements(rows, {"suite": "mine", "levels": [0.1, 0.2]})


def test_scores_are_over_seeds_and_images_together() -> None:
    found = {(score.method, score.metric): score for score in table().scores()}
    good = found["good", "deletion"]
    values = torch.tensor([draws(seed, -3) for seed in (0, 1, 2)], dtype=torch.float64)
    assert good.interval == hierarchical_bootstrap(values, samples=500)
    assert (good.seeds, good.standing.rank.estimate, good.standing.beats_controls) == (3, 1.0, True)
    assert found["poor", "deletion"].standing.beats_controls is False
    dead = found["dead", "deletion"]
    assert math.isnan(dead.interval.estimate)
    assert dead.flags == ("MethodError: no convolution",)
    assert found["good", "gini"].interval.undefined == 3
    assert found["good", "gini"].interval.estimate == 0.5
    assert table().methods == ("good", "poor", "dead", "random")
    assert table().metrics == ("deletion", "gini")


def test_two_methods_are_compared_on_the_same_images() -> None:
    whole = table()
    found = whole.compare("good", "poor", data="digits", model="net", metric="deletion")
    one, other = (whole.values("digits", "net", name, "deletion") for name in ("good", "poor"))
    assert found.interval == hierarchical_bootstrap(one - other)
    assert found.interval.estimate == pytest.approx(-3, abs=0.5)
    assert found.p_value == paired_difference(one.mean(0), other.mean(0)).p_value < 0.01
    with pytest.raises(InputError, match=r"metric='deletin' was given.*nearest: \"deletion\""):
        whole.values("digits", "net", "good", "deletin")
    with pytest.raises(InputError, match="Nothing was measured for"):
        whole.values("digits", "net", "dead", "gini")


def test_files_hold_everything_and_are_read_back(tmp_path: Path) -> None:
    whole = table()
    whole.to_json(tmp_path / "table.json")
    again = Measurements.load(tmp_path / "table.json")
    assert repr(again.rows) == repr(tuple(whole.rows)) or list(map(repr, again.rows)) == list(
        map(repr, whole.rows)
    )
    assert again.settings == whole.settings
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["settings"]["levels"] == [0.1, 0.2]
    whole.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["method"] == "good"
    assert float(rows[0]["estimate"]) == pytest.approx(whole.scores()[0].interval.estimate, rel=1e-5)
    assert [row["flags"] for row in rows if row["method"] == "dead"] == ["MethodError: no convolution"]
    frame = whole.to_dataframe()
    assert len(frame) == 18
    poor = frame[(frame.method == "poor") & (frame.metric == "deletion") & (frame.seed == 1)]
    assert float(poor["mean"].iloc[0]) == pytest.approx(sum(draws(11, 0)) / 30)
    assert set(frame[frame.method == "dead"].undefined) == {0}
    for text in ("{}", "no json", '{"format": "pullback.Measurements", "schema": 7}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(
            FormatError, match=r"cannot be read .*Expected what Measurements.to_json\(\) wrote"
        ):
            Measurements.load(tmp_path / "other.json")
    with pytest.raises(FormatError, match="FileNotFoundError"):
        Measurements.load(tmp_path / "none.json")


def test_the_markdown_says_what_is_best_what_is_no_better_than_chance_and_what_is_unknown() -> None:
    lines = table().to_markdown().splitlines()
    assert lines[0] == "**digits, net**"
    assert lines[2] == "| method | deletion ↓ | gini ↑ |"
    assert lines[4].startswith("| good | **-")
    assert "†" in lines[5]
    assert "**" not in lines[5]
    assert lines[6] == "| dead | – | – |"
    assert lines[7].startswith("| random (control) | ")
    assert "†" not in lines[7]
    assert lines[-1] == "- dead: MethodError: no convolution"


def test_variants_and_shared_reasons_are_marked() -> None:
    rows = [
        Measurement("d", "m", "a", False, "gini", "higher", 0, (0.1, 0.2), "not converged"),
        Measurement("d", "m", "b", False, "gini", "higher", 0, (0.1, 0.2), "not converged"),
        Measurement("d", "m", "blurred", True, "gini", "higher", 0, (0.5, 0.6), variant=True),
    ]
    whole = Measurements(rows)
    text = whole.to_markdown()
    assert "| blurred (variant) | 0.55" in text
    assert "†" not in text  # there is no control to beat
    assert text.splitlines()[-1] == "- a, b: not converged"
    assert [score.to_record()["variant"] for score in whole.scores()] == [False, False, True]


def test_tables_are_added() -> None:
    other = Measurements(
        [Measurement("letters", "net", "good", False, "gini", "higher", 0, (1.0,))], {"more": 1}
    )
    both = table() + other
    assert len(both.rows) == 19
    assert both.settings["more"] == 1
    assert len(both.to_markdown().split("**letters, net**")) == 2


def test_a_retraining_benchmark_gives_the_same_table(tmp_path: Path) -> None:
    data = block_signal(160, blocks=6, block_size=2, noise=0.05, seed=0)
    fitted, tested = (data.x[:100], data.y[:100]), (data.x[100:], data.y[100:])
    true = (data.signal_mask[:100].float(), data.signal_mask[100:].float())
    measure = DiffROAR(levels=(0.2, 0.5), seeds=3, training=TrainSpec(epochs=8, batch=32, learning_rate=1e-2))
    found = measure.run(fitted, tested, {"signal": true}, lambda: multilayer_perceptron(12, 2, (8,)))
    rows = found.to_measurements("blocks", "net")
    assert torch.equal(
        rows.values("blocks", "net", "signal", "diffroar@0.2"), found.differences("signal", 0.2)
    )
    scores = {(score.method, score.metric): score for score in rows.scores()}
    assert scores["signal", "diffroar@0.2"].interval.estimate == pytest.approx(found.value("signal", 0.2))
    assert scores["signal", "diffroar@0.2"].standing.rank.estimate == 1
    assert scores["random", "diffroar@0.2"].control
    axes = found.plot()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["signal", "random (control)", "untrained (control)", "input (control)"]
    (curve,) = [line for line in axes.lines if line.get_label() == "signal"]
    assert list(curve.get_ydata()) == [found.value("signal", level) for level in (0.2, 0.5)]
    assert list(found.to_dataframe()["value"]) == [run.value for run in found.runs]
    found.to_json(tmp_path / "runs.json")
    document = json.loads((tmp_path / "runs.json").read_text())
    assert len(document["runs"]) == len(found.runs)
    assert document["scores"][0]["interval"]["estimate"] == found.value("signal", 0.2)
