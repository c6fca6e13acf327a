"""The report's correlations are scipy's, its intervals resample examples, and padding is no point."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.patching import patching_scores
from pullback.evaluation.agreement import PatchingReport, patching_report
from tests.attribution.patching_models import gpt2, prompts, two_layers

GROUPS = {
    "residual": ["transformer.h.0", "transformer.h.1"],
    "attention": ["transformer.h.0.attn"],
    "mlp": ["transformer.h.0.mlp", "transformer.h.1.mlp"],
}
TARGET = pb.Contrast([3, 4], [5, 6])


@pytest.fixture(scope="module")
def report() -> PatchingReport:
    return patching_report(gpt2(), *prompts(), TARGET, GROUPS, samples=50)


def test_correlations_are_those_of_scipy(report: PatchingReport) -> None:
    model, (clean, corrupted) = gpt2(), prompts()
    exact = patching_scores(model, clean, corrupted, TARGET, GROUPS["mlp"])
    for method in ("atp", "relp", "ig"):
        found = patching_scores(model, clean, corrupted, TARGET, GROUPS["mlp"], method)  # type: ignore[arg-type]
        # rounded: without an effect on the metric there is no order, but ties
        a = torch.cat([exact[site].flatten() for site in GROUPS["mlp"]]).numpy()
        b = torch.cat([found[site].flatten() for site in GROUPS["mlp"]]).numpy()
        pearson, spearman = stats.pearsonr(a, b)[0], stats.spearmanr(a.round(10), b.round(10))[0]
        assert report.agreement("mlp", method).estimate == pytest.approx(pearson, abs=1e-12)
        assert report.agreement("mlp", method, "spearman").estimate == pytest.approx(spearman, abs=1e-12)
        assert abs(pearson) < 0.99999
    assert len(report.agreements) == 3 * 3 * 2
    assert {each.points for each in report.agreements if each.group == "mlp"} == {20}


def test_a_linear_model_agrees_perfectly() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randn(2, 4, 3, 4, generator=generator, dtype=torch.float64)
    model = two_layers(nn.Identity)

    def metric(output: Tensor) -> Tensor:
        return output[:, :, 0].sum(1)

    report = patching_report(model, clean, corrupted, metric, ["0", "2"], samples=20)
    for each in report.agreements:
        assert each.group == "all"
        assert (each.interval.low, each.interval.estimate, each.interval.high) == pytest.approx((1, 1, 1))
        assert each.interval.count == 4


def test_intervals_resample_whole_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    model = two_layers()
    report = patching_report(model, clean, corrupted, 0, ["0", "1"], ["atp"], samples=30, seed=3)
    exact, atp = (
        torch.cat([report.scores[name][site] for site in ("0", "1")], 1).numpy() for name in ("exact", "atp")
    )
    draw = np.random.default_rng(3)
    values = []
    for _ in range(30):
        pick = draw.integers(5, size=5)
        values.append(stats.pearsonr(exact[pick].ravel(), atp[pick].ravel())[0])
    interval = report.agreement("all", "atp")
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    again = patching_report(model, clean, corrupted, 0, ["0", "1"], ["atp"], samples=30, seed=3)
    assert again.to_rows() == report.to_rows()


def test_examples_are_averaged_first_where_asked(report: PatchingReport) -> None:
    mean = patching_report(gpt2(), *prompts(), TARGET, GROUPS, ["atp"], pool="mean", samples=5)
    a, b = (
        torch.stack([report.scores[name][site].mean(0) for site in GROUPS["residual"]]).flatten().numpy()
        for name in ("exact", "atp")
    )
    assert mean.agreement("residual", "atp").estimate == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-10)
    np.testing.assert_allclose(mean.points("residual", "exact"), a, atol=1e-12)


def test_padding_is_no_point() -> None:
    def padded(ids: Tensor) -> dict[str, Tensor]:
        mask = nn.functional.pad(torch.ones_like(ids), (0, 3))
        return {"input_ids": nn.functional.pad(ids, (0, 3)), "attention_mask": mask}

    clean, corrupted = prompts()
    found = patching_report(gpt2(), padded(clean), padded(corrupted), TARGET, GROUPS, ["atp"], samples=5)
    plain = patching_report(gpt2(), clean, corrupted, TARGET, GROUPS, ["atp"], samples=5)
    for a, b in zip(found.agreements, plain.agreements, strict=True):
        assert a.points == b.points
        assert a.interval.estimate == pytest.approx(b.interval.estimate, abs=1e-8)


def test_constant_scores_have_no_correlation() -> None:
    report = patching_report(nn.Linear(2, 1), torch.ones(1, 2), torch.zeros(1, 2), 0, ["input"], ["atp"])
    interval = report.agreement("all", "atp")
    assert np.isnan([interval.estimate, interval.low, interval.high]).all()
    assert report.to_rows()[0]["estimate"] is None


def test_rows_files_and_picture(report: PatchingReport, tmp_path: Path) -> None:
    rows = report.to_rows()
    written = json.loads(report.save(tmp_path / "report.json").read_text())
    assert written["agreements"] == rows
    assert written["settings"]["direction"] == "denoise"
    stored = torch.tensor(written["scores"]["relp"]["transformer.h.0"], dtype=torch.float64)
    assert torch.equal(stored, report.scores["relp"]["transformer.h.0"])
    with report.save(tmp_path / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["estimate"]) for row in table] == [row["estimate"] for row in rows]
    axes = report.plot().axes
    assert [each.get_title().split(",")[0] for each in axes[:2]] == ["residual: atp", "residual: relp"]
    drawn = np.asarray(axes[1].collections[0].get_offsets())
    np.testing.assert_array_equal(drawn[:, 0], report.points("residual", "exact"))
    np.testing.assert_array_equal(drawn[:, 1], report.points("residual", "relp"))
    assert len(str(report).splitlines()) == 18


def test_errors(report: PatchingReport, tmp_path: Path) -> None:
    with pytest.raises(pb.InputError, match=r'"name.json" or "name.csv", got "report.txt"'):
        report.save(tmp_path / "report.txt")
    with pytest.raises(pb.MethodError, match=r"no pearson of 'eap' in 'mlp'.*atp, relp, ig"):
        report.agreement("mlp", "eap")
    pair = torch.ones(1, 2), torch.zeros(1, 2)
    with pytest.raises(pb.InputError, match="groups of them"):
        patching_report(nn.Linear(2, 1), *pair, 0, {"mlp": []})
    with pytest.raises(pb.MethodError, match='"entries" or "mean"'):
        patching_report(nn.Linear(2, 1), *pair, 0, ["input"], pool="median")  # type: ignore[arg-type]
    with pytest.raises(pb.InputError, match="samples at least 1"):
        patching_report(nn.Linear(2, 1), *pair, 0, ["input"], samples=0)
