"""Pictures of coefficients: read back from the artists, against values, frequencies and the signal beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.domains import (
    DCT,
    ICA,
    PCA,
    STFT,
    Chain,
    Fourier,
    Linear,
    Polar,
    SeasonalTrend,
    Wavelet,
)
from pullback.core.errors import InputError
from pullback.result import load
from pullback.viz import Attributions, components, levels, spectrum, time_frequency, write_report

BANDS = {"slow": (0.0, 5.0), "fast": (5.0, 12.0), "beyond": (90.0, 95.0)}
SIGNAL = torch.rand(2, 2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def rendered(ax: Any) -> np.ndarray:
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())


class Weighted(nn.Module):
    """Σ over time and channels of squares, weighted."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.linspace(-1, 2, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
        return (x.square() * weights).flatten(1).sum(1, keepdim=True)


def explained(domain: Any, x: Tensor = SIGNAL) -> pb.Attribution:
    return pb.explain(Weighted(), x, target=0, method=pb.InDomain(domain, pb.IntegratedGradients(steps=2)))


def panels(ax: Any) -> list[Any]:
    return [each for each in ax.figure.axes if each.get_ylabel() != "amplitude of the signal"]


# ---------------------------------------------------------------------- functions of arrays


def test_a_spectrum_folds_negative_frequencies_and_shades_bands() -> None:
    frequencies = torch.fft.fftfreq(8, 1 / 32.0)
    ax = spectrum(np.arange(8.0), frequencies, bands=BANDS, amplitude=np.ones(8))
    assert ax.lines[0].get_xdata().tolist() == [0.0, 4.0, 8.0, 12.0, 16.0]
    assert ax.lines[0].get_ydata().tolist() == [0.0, 1 + 7.0, 2 + 6.0, 3 + 5.0, 4.0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("frequency (Hz)", "attribution")
    assert [text.get_text() for text in ax.texts] == ["slow", "fast"]  # the third is not on the axis
    shades = [patch.get_x() + patch.get_width() for patch in ax.patches]
    assert shades == pytest.approx([5.0, 12.0])
    (behind,) = [each for each in ax.figure.axes if each is not ax]
    assert behind.lines[0].get_ydata().tolist() == [1.0, 2.0, 2.0, 2.0, 1.0]
    assert rendered(ax).any()


def test_named_rows_are_curves_and_others_their_sum() -> None:
    values, at = np.array([[1.0, -2.0, 3.0], [1.0, 1.0, 1.0]]), [0.0, 1.0, 2.0]
    named = spectrum(values, at, names=["amplitude", "phase$"])
    assert [line.get_ydata().tolist() for line in named.lines[:2]] == values.tolist()
    assert [text.get_text() for text in named.get_legend().get_texts()] == ["amplitude", r"phase\$"]
    assert spectrum(values, at).lines[0].get_ydata().tolist() == [2.0, -1.0, 4.0]
    assert rendered(spectrum([1.0], [0.0])).any()
    assert rendered(spectrum([float("nan"), 1.0], [0.0, 1.0])).any()


def test_a_time_frequency_map_has_its_values_between_the_right_edges() -> None:
    values = np.arange(6.0).reshape(3, 2) - 2
    ax = time_frequency(np.stack([values, values]), [0.0, 4.0, 8.0], [1.0, 2.0], bands=BANDS, percentile=100)
    (mesh,) = ax.collections
    assert np.array_equal(np.asarray(mesh.get_array()).reshape(3, 2), 2 * values)
    assert mesh.get_clim() == (-6.0, 6.0)
    assert mesh.get_coordinates()[:, 0, 1].tolist() == [0.0, 2.0, 6.0, 10.0]  # nothing is below 0 Hz
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0.5, 1.5, 2.5]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "frequency (Hz)")
    assert [line.get_ydata()[0] for line in ax.lines] == [5.0, 5.0]
    assert rendered(ax).any()


def test_components_are_rows_with_their_sums() -> None:
    signals = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    ax = components(
        np.array([[1.0, -2.0, 4.0], [0.5, 0.0, 0.0]]), ["trend", "rest"], signals, time=[0.0, 0.5, 1.0]
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["trend\n+3", "rest\n+0.5"]
    assert ax.lines[0].get_ydata().tolist() == [0.4, 0.0, -0.4]  # upwards on an axis that grows downwards
    assert ax.lines[1].get_ydata().tolist() == [1.0, 1.0, 1.0]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert np.asarray(ax.collections[0].get_array()).shape == (2, 3)
    gates = components([3.0, -1.0], ["trend", "rest"], signals)
    assert np.asarray(gates.collections[0].get_array()).ravel().tolist() == [3.0, -1.0]
    assert gates.collections[0].get_clim() == (-3.0, 3.0)
    assert gates.get_xlabel() == "time (samples)"
    assert rendered(gates).any()


def test_levels_span_the_same_time() -> None:
    ax = levels(
        [[1.0], [2.0, -3.0], [0.0] * 4], ["approximation", "detail 2", "detail 1"], duration=2.0, unit="s"
    )
    assert [mesh.get_coordinates()[0, :, 0].tolist() for mesh in ax.collections][:2] == [
        [0.0, 2.0],
        [0.0, 1.0, 2.0],
    ]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "approximation\n+1",
        "detail 2\n-1",
        "detail 1\n+0",
    ]
    assert len({mesh.get_clim() for mesh in ax.collections}) == 1
    assert rendered(ax).any()


def test_arrays_that_do_not_fit_are_refused() -> None:
    for call, text in (
        (lambda: spectrum([1.0, 2.0], [1.0]), r"frequencies \(F,\); got \(1, 2\) and \(1,\)"),
        (lambda: spectrum([1.0], [1.0], names=["a", "b"]), "a name for each of 1 curves; got 2"),
        (lambda: spectrum([1.0], [1.0], amplitude=[1.0, 2.0]), "an amplitude for each of 1 frequencies"),
        (lambda: spectrum([1.0, 2.0], [0.0, 1.0], bands={"b": (2.0, 1.0)}), r"low < high; got \(2.0, 1.0\)"),
        (lambda: time_frequency(np.ones((2, 3)), [0.0, 1.0], [0.0, 1.0]), r"got \(2, 3\), \(2,\) and \(2,\)"),
        (lambda: time_frequency(np.ones((1, 2)), [0.0], [1.0, 0.0]), "times to increase"),
        (lambda: components([1.0], ["a", "b"], np.ones((2, 4))), r"values \(1, 1\)"),
        (lambda: levels([[1.0]], ["a", "b"]), "each of 2 levels"),
    ):
        with pytest.raises(InputError, match=text):
            call()


# ---------------------------------------------------------------------- attributions


@pytest.mark.parametrize(
    "domain", [Fourier(sample_rate=32.0), Fourier("one", sample_rate=32.0), DCT(sample_rate=32.0)]
)
def test_a_spectrum_below_its_signal(domain: Any) -> None:
    result = explained(domain)
    ax = result.plot(example=1, bands=pb.Bands(BANDS))
    assert float(np.sum(ax.lines[0].get_ydata())) == pytest.approx(float(result.values[1].sum()))
    assert ax.lines[0].get_xdata()[-1] == pytest.approx(16.0, abs=0.5)
    assert [text.get_text() for text in ax.texts] == ["slow", "fast"]
    above, main = panels(ax)
    assert main is ax
    assert len(above.lines) == 2  # one for each channel
    assert np.allclose(above.lines[1].get_ydata(), SIGNAL[1, 1])
    assert above.lines[0].get_xdata()[-1] == pytest.approx(63 / 32)
    assert above.get_xlabel() == "time (s)"
    assert rendered(ax).any()


def test_without_a_sample_rate_there_are_no_hz() -> None:
    ax = explained(Fourier()).plot()
    assert ax.get_xlabel() == "frequency (cycles per sample)"
    assert ax.lines[0].get_xdata()[-1] == 0.5
    assert panels(ax)[0].get_xlabel() == "time (samples)"
    with pytest.raises(InputError, match=r"Bands are in Hz, but Fourier\(.*has no sample rate"):
        explained(Fourier()).plot(bands=BANDS)


def test_axes_given_take_the_attribution_alone() -> None:
    own = Figure().add_subplot()
    assert explained(Fourier()).plot(own) is own
    assert [each for each in panels(own) if each is not own] == []


def test_other_dimensions_and_chains_have_their_frequencies() -> None:
    turned = explained(Fourier("one", dim=1), SIGNAL.transpose(1, 2).contiguous()).plot()
    assert len(turned.lines[0].get_xdata()) == 33
    assert np.allclose(panels(turned)[0].lines[1].get_ydata(), SIGNAL[0, 1])
    chained = explained(
        Chain(Linear(2 * torch.eye(2, dtype=torch.float64), dim=1), Fourier("one", sample_rate=8.0))
    )
    assert chained.plot().lines[0].get_xdata()[-1] == 4.0


def test_polar_draws_both_curves() -> None:
    result = explained(Polar(0.1, sample_rate=32.0))
    ax = result.plot()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["amplitude", "phase"]
    assert np.allclose(ax.lines[1].get_ydata(), result.values[0, :, 1].sum(0))


def test_short_time_spectra_are_maps_and_wavelets_are_levels() -> None:
    result = explained(STFT(16, sample_rate=32.0))
    ax = result.plot(bands=BANDS)
    mesh = np.asarray(ax.collections[0].get_array())
    assert np.allclose(mesh.reshape(result.values.shape[2:]), result.values[0].sum(0))
    assert ax.get_ylabel() == "frequency (Hz)"
    assert ax.get_xlim() == panels(ax)[0].get_xlim() == (0.0, 2.0)
    haar = explained(Wavelet("haar", level=2))
    ax = haar.plot()
    sizes = [np.asarray(each.get_array()).size for each in ax.collections]
    assert sizes == [16, 16, 32]
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == [
        "approximation",
        "detail 2",
        "detail 1",
    ]
    total = haar.values[0, :, 32:].sum()
    assert ax.get_yticklabels()[2].get_text() == f"detail 1\n{total:+.3g}"


def test_components_show_their_parts() -> None:
    ica = ICA().fit(SIGNAL)
    result = explained(ica)
    ax = result.plot()
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == [
        "component 0",
        "component 1",
    ]
    assert np.asarray(ax.collections[0].get_array()).shape == (2, 64)
    source = result.point[0, 1].numpy()
    drawn = ax.lines[1].get_ydata()
    assert np.corrcoef(-drawn, source)[0, 1] == pytest.approx(1.0)
    mixing = explained(replace(ica, parts="mixing")).plot()
    assert len(mixing.get_yticks()) == 3
    assert np.asarray(mixing.collections[0].get_array()).size == 3
    across = explained(PCA.fit(SIGNAL, dim=1))
    ax = across.plot()
    assert ax.get_yticklabels()[1].get_text() == f"component 1\n{across.values[0, 1].sum():+.3g}"
    assert np.allclose(panels(ax)[0].lines[1].get_ydata(), SIGNAL[0, 1])
    gates = explained(SeasonalTrend(8), SIGNAL[:, :1]).plot()
    assert [label.get_text().split("\n")[0] for label in gates.get_yticklabels()] == [
        "trend",
        "seasonal",
        "residual",
    ]
    two = explained(SeasonalTrend(8)).plot()
    assert two.get_yticklabels()[3].get_text().startswith("trend, channel 1\n")
    assert rendered(two).any()


def test_patterns_in_time_are_bars_by_name() -> None:
    ax = explained(Linear(torch.eye(64, dtype=torch.float64)[:, :64]), SIGNAL[:, 0]).plot()
    assert len(ax.lines[0].get_xdata()) == 64  # without a place for so many bars
    turned = Linear(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), names=("sum", "difference"))
    for x in (SIGNAL[:, 0, :2], SIGNAL[..., :2]):  # two channels and two names are no courses in time
        ax = explained(turned, x).sum(1).plot() if x.ndim == 3 else explained(turned, x).plot()
        assert [label.get_text() for label in ax.get_yticklabels()] == ["sum", "difference"]


def test_sums_saving_and_taking_examples_keep_the_picture(tmp_path: Path) -> None:
    result = explained(Fourier("one", sample_rate=32.0))
    result.save(tmp_path / "a")
    again = load(tmp_path / "a")[1].sum(1)
    assert again.values.shape == (1, 33)
    ax = again.plot()
    assert np.allclose(ax.lines[0].get_ydata(), result.values[1].sum(0))
    assert np.allclose(panels(ax)[0].lines[0].get_ydata(), SIGNAL[1, 0])
    gates = explained(SeasonalTrend(8)).abs().sum(1).plot()
    assert len(gates.get_yticks()) == 3
    bare = explained(Fourier("one")).sum(-1).plot()  # no frequencies are left
    assert len(bare.patches) == 2


def test_images_at_several_dimensions_stay_images() -> None:
    x = torch.rand(1, 1, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert explained(DCT(dim=(-2, -1)), x).plot().images[0].get_array().shape == (8, 9)


def test_the_report_has_them_all(tmp_path: Path) -> None:
    known = {"spectrum": Fourier(sample_rate=32.0), "map": STFT(16, sample_rate=32.0)}
    found = {name: explained(domain) for name, domain in known.items()}
    write_report(tmp_path / "r.html", [Attributions("domains", found, bands=BANDS)])
    page = (tmp_path / "r.html").read_text()
    assert page.count('class="wide"') == 4
    assert "Fourier(" in page
    assert "STFT(" in page
    result = explained(SeasonalTrend(8))
    assert result._repr_html_().count("data:image/png") == 2
