"""The demo: its known effect on a small run, its files, its honesty about what it leaves out."""

import csv
from pathlib import Path

import pytest
import torch

import pullback as pb
from pullback.attribution import METHODS
from pullback.demo import METRICS, DemoResult, RandomTimesInput, run_demo, usable_methods
from pullback.demo_report import headline
from pullback.evaluation import Trained, leakage, multilayer_perceptron


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo"), images=60, threads=1)


def gradient_leak(result: DemoResult, network: str) -> float:
    (found,) = [each for each in result.networks if each.name == network]
    return found.leaks["gradient"]["null_share@0.1"].estimate


@pytest.mark.slow
def test_the_known_effect_is_there(result: DemoResult) -> None:
    # Shah et al. 2021: standard nets leak, robust and top nets do not; bounds with room around .35, .02, .00
    assert gradient_leak(result, "standard") > 0.25
    assert gradient_leak(result, "robust") < 0.08
    assert gradient_leak(result, "top") < 0.03
    for network in result.networks:
        assert (
            0.5 in network.leaks["random"]["null_mass"]
            or abs(network.leaks["random"]["null_mass"].estimate - 0.5) < 0.02
        )
        assert network.trained.accuracy > 0.5
        assert not network.trained.collapsed


@pytest.mark.slow
def test_every_method_is_measured_or_left_out_with_its_reason(result: DemoResult) -> None:
    spelled = {each.method.partition("(")[0] for each in result.networks[0].attributions.values()}
    assert spelled | set(result.left_out) >= set(METHODS)
    assert "layer" in result.left_out["GradCAM"]
    page = result.report.read_text(encoding="utf-8")
    assert "GradCAM" in page
    assert all(name in page for name in result.networks[0].leaks)


@pytest.mark.slow
def test_the_table_of_numbers_is_what_leakage_gives(result: DemoResult) -> None:
    network = result.networks[0]
    values = network.attributions["integrated gradients"].values
    again = leakage(None, None, values, signal_mask=network.images.signal_mask)
    with (result.report.parent / "leakage.csv").open(encoding="utf-8") as file:
        rows = {(row["network"], row["method"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == sum(len(each.leaks) for each in result.networks) * len(METRICS)
    row = rows["standard", "integrated gradients", "null_mass"]
    assert float(row["mean"]) == pytest.approx(again.mean(), abs=1e-6)
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])
    # the spelling is enough to make the same values again
    redone = pb.explain(network.trained.model, network.images.x[:3], method=row["spelling"])
    torch.testing.assert_close(redone.values, values[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_report_is_one_offline_page_with_its_figures(result: DemoResult) -> None:
    page = result.report.read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    for name in ("leakage.png", "attributions.png"):
        assert (result.report.parent / name).read_bytes().startswith(b"\x89PNG")
    shown = f"{gradient_leak(result, 'standard'):.1%}"
    assert shown in headline(result)
    assert shown in page
    for word in ("gap", "standard error", "evaluations", "chance"):
        assert word in page


@pytest.mark.slow
def test_the_printed_table_has_a_line_for_each_method(result: DemoResult) -> None:
    lines = result.table().splitlines()
    for name, metrics in result.networks[0].leaks.items():
        (line,) = [line for line in lines if line.startswith(f"{name}  ")]
        assert f"{metrics['null_share@0.1'].estimate:.3f}" in line


@pytest.mark.slow
def test_equal_arguments_give_equal_numbers(result: DemoResult, tmp_path: Path) -> None:
    again = run_demo(tmp_path, images=60, threads=1)
    assert again.table() == result.table()


def test_a_collapsed_network_is_reported_and_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(factory, x, y, spec, *, validation):
        return Trained(factory().eval(), 0.1, 0.1, False, True, 0.0, (2.3,))

    monkeypatch.setattr("pullback.demo.train", collapsed)
    result = run_demo(tmp_path, images=8, threads=1, train_images=20)
    assert all(not network.leaks and not network.attributions for network in result.networks)
    assert "not scored: standard, robust, top" in result.report.read_text(encoding="utf-8")
    with (tmp_path / "leakage.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["collapsed"], row["mean"]) for row in rows] == [("True", "")] * 3


def test_threads_are_set_for_the_run_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(factory, x, y, spec, *, validation):
        seen.append(torch.get_num_threads())
        return Trained(factory().eval(), 0.1, 0.1, False, True, 0.0, (2.3,))

    monkeypatch.setattr("pullback.demo.train", noting)
    before = torch.get_num_threads()
    run_demo(tmp_path, images=8, threads=2, train_images=20)
    assert seen == [2, 2, 2]
    assert torch.get_num_threads() == before


def test_controls_come_last_and_random_times_input_is_zero_on_black_pixels() -> None:
    x = torch.rand(4, 1, 56, 28, generator=torch.Generator().manual_seed(0))
    x[:, :, :28] = 0
    net = multilayer_perceptron(1568, 10).eval()
    methods, _ = usable_methods(net, x, seed=3)
    assert list(methods)[-3:] == ["random", "edges", "random × input"]
    assert methods["SmoothGrad"].seed == 3
    values = pb.explain(net, x, method=RandomTimesInput()).values
    assert float(values[:, :, :28].abs().max()) == 0
    assert float(values[:, :, 28:].abs().min()) > 0
