"""Pictures: what is drawn, read back from the artists, against the values."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pullback.core.errors import InputError
from pullback.result import Attribution
from pullback.viz import bars, curve, heat_map, overlay, series, token_strip
from pullback.viz.drawing import as_array, symmetric_scale
from pullback.viz.image import displayable, heat_colours
from pullback.viz.tokens import readable


def rendered(ax: Any) -> np.ndarray:
    """The pixels, drawn with every warning an error."""
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())


def attribution(values: Any, point: Any = None, tokens: Any = None) -> Attribution:
    count = len(next(iter(values.values())) if isinstance(values, dict) else values)
    labels = tuple("c" for _ in range(count))
    point = values if point is None else point
    return Attribution(values, point, labels, torch.ones(count), "M()", "input", None, {}, {"tokens": tokens})


# ---------------------------------------------------------------------- scale


def test_scale_is_the_percentile_of_absolute_values_and_never_zero() -> None:
    values = torch.cat([torch.full((50,), -2.0), torch.full((50,), 1.0)])
    assert symmetric_scale(values, 100) == 2.0
    assert symmetric_scale(values, 25) == 1.0
    assert symmetric_scale(torch.tensor([0.0] * 200 + [-5.0])) == 5.0  # the 99th percentile itself is 0
    assert symmetric_scale(torch.zeros(3)) == 1.0
    assert symmetric_scale(torch.tensor([float("nan"), float("inf"), -3.0])) == 3.0
    assert symmetric_scale(torch.zeros(0)) == 1.0


def test_arrays_of_any_real_type_and_no_complex() -> None:
    assert as_array(torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True)).dtype == np.float64
    with pytest.raises(InputError, match="complex"):
        as_array(torch.ones(2, dtype=torch.complex64))


# ---------------------------------------------------------------------- images


def test_heat_map_sums_channels_on_a_symmetric_scale() -> None:
    values = torch.tensor([[[1.0, -4.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, -3.0]]])
    ax = heat_map(values, percentile=100)
    (image,) = ax.images
    assert np.array_equal(image.get_array(), [[2.0, -3.0], [0.0, -1.0]])
    assert image.get_clim() == (-3.0, 3.0)
    assert heat_map(values.abs(), percentile=100).images[0].get_clim() == (0.0, 5.0)
    assert heat_map(values.abs(), percentile=100, signed=True).images[0].get_clim() == (-5.0, 5.0)


def test_red_speaks_for_blue_against_zero_is_neutral_and_nan_is_grey() -> None:
    colours = heat_colours(torch.tensor([[1.0, -1.0], [0.0, float("nan")]]))
    red, blue, white, grey = colours.reshape(4, 4)[:, :3]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    assert white.min() > 0.95
    assert np.allclose(grey, 0.6)


@pytest.mark.parametrize("fill", [0.0, 3.0, -3.0, float("nan"), float("inf"), 1e-300, 1e300])
def test_constant_maps_and_images_draw(fill: float) -> None:
    values = torch.full((3, 5, 6), fill, dtype=torch.float64)
    assert np.isfinite(rendered(heat_map(values))).all()
    assert np.isfinite(rendered(overlay(values, values))).all()


def test_axes_given_are_axes_returned_and_pyplot_is_never_loaded() -> None:
    ax = Figure().add_subplot()
    assert heat_map(torch.ones(2, 2), ax) is ax
    code = (
        "import sys, torch, pullback.viz as v\n"
        "v.heat_map(torch.ones(3, 3)).figure.canvas.draw()\n"
        "v.token_strip(['a'], [1.0]); v.series([1.0, 2.0]); v.curve([1], [2]); v.bars(['a'], [1])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_image_ranges() -> None:
    unit = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    assert np.allclose(displayable(unit)[..., 1], unit)
    assert np.allclose(displayable((unit * 256).round().clamp(max=255))[..., 0], unit, atol=1 / 255)
    normalised = displayable(torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0)))
    assert normalised.min() == 0.0
    assert normalised.max() == 1.0
    assert np.allclose(displayable(torch.full((1, 2, 2), -7.0)), 0.5)
    with pytest.raises(InputError, match="1 or 3 channels"):
        displayable(torch.ones(4, 5, 5))


def test_overlay_is_transparent_where_nothing_matters() -> None:
    values = torch.zeros(4, 4)
    values[1, 2] = -2.0
    top = overlay(values, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)), alpha=0.7).images[
        1
    ]
    opacity = top.get_array()[..., 3]
    assert opacity[1, 2] == pytest.approx(0.7)
    assert opacity.sum() == pytest.approx(0.7)
    assert top.get_extent() == [-0.5, 7.5, 7.5, -0.5]  # stretched over the whole image


# ---------------------------------------------------------------------- tokens


def test_strip_wraps_in_reading_order_and_colours_by_sign() -> None:
    tokens = ["Ġword", "$x^2$", "<img>", "日本"] * 12
    values = torch.tensor([1.0, -1.0, 0.0, 0.5]).repeat(12)
    ax = token_strip(tokens, values)
    assert [text.get_text() for text in ax.texts] == [readable(token) for token in tokens]
    places = [(-text.get_position()[1], text.get_position()[0]) for text in ax.texts]
    assert places == sorted(places, key=lambda place: (-place[0], place[1]))
    assert len({row for row, _ in places}) > 1
    red, blue, white = (np.array(patch.get_facecolor()) for patch in ax.patches[:3])
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert white[:3].min() > 0.95
    for text, patch in zip(ax.texts, ax.patches, strict=True):
        luminance = float(np.dot(patch.get_facecolor()[:3], [0.299, 0.587, 0.114]))
        assert (text.get_color() == "white") == (luminance < 0.5)
        right = patch.get_x() + patch.get_width()
        assert right <= ax.get_xlim()[1]


def test_strip_of_odd_input() -> None:
    assert rendered(token_strip(["a" * 500, "", "$", "\\frac{", "\n"], torch.zeros(5, 3))).any()
    assert len(token_strip([], []).texts) == 0
    small = Figure(figsize=(2, 0.5)).add_subplot()
    assert token_strip(["word "] * 40, np.arange(40.0), small) is small
    with pytest.raises(InputError, match="one value for each of 2 tokens"):
        token_strip(["a", "b"], [1.0])


# ---------------------------------------------------------------------- series and curves


def test_series_band_holds_the_summed_values_between_the_right_times() -> None:
    values, signal = torch.tensor([[1.0, -2.0, 0.5], [1.0, 0.0, 0.5]]), torch.tensor([[5.0, 6.0, 7.0]])
    ax = series(values, signal, time=[0.0, 1.0, 4.0])
    (band,) = ax.collections
    assert np.array_equal(np.asarray(band.get_array()).ravel(), [2.0, -2.0, 1.0])
    low, high = band.get_clim()
    assert low == -high == pytest.approx(-2.0, rel=0.05)  # the 99th percentile, interpolated
    assert np.array_equal(band.get_coordinates()[0, :, 0], [-0.5, 0.5, 2.5, 5.5])
    assert np.array_equal(ax.lines[0].get_ydata(), [5.0, 6.0, 7.0])
    assert rendered(ax).any()


def test_series_without_signal_draws_the_values_and_bad_lengths_are_refused() -> None:
    ax = series([1.0, float("nan"), -1.0])
    assert ax.lines[0].get_ydata()[2] == -1.0
    assert rendered(ax).any()
    assert rendered(series([3.0], [1.0])).any()
    with pytest.raises(InputError, match="same number of samples"):
        series([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="increase"):
        series([1.0, 2.0], [1.0, 2.0], time=[1.0, 1.0])


def test_curve_and_bars_draw_their_intervals() -> None:
    ax = curve([0, 1], [0.5, 0.6], [0.4, 0.5], [0.7, 0.8], label="a $")
    assert ax.collections[0].get_paths()[0].get_extents().y1 == pytest.approx(0.8)
    assert rendered(curve([0, 1], [0.1, 0.2], ax=ax, label="b")).any()
    ax = bars(["first $x", "second"], [1.0, -2.0], [0.5, -3.0], [1.5, -1.0])
    assert [patch.get_width() for patch in ax.patches] == [1.0, -2.0]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # first on top
    ends = [segment[:, 0].tolist() for segment in ax.collections[0].get_segments()]
    assert ends == [[0.5, 1.5], [-3.0, -1.0]]
    assert rendered(ax).any()
    with pytest.raises(InputError, match="each of 1 names"):
        bars(["a"], [1.0, 2.0])
    with pytest.raises(InputError, match="of one length"):
        curve([1], [1, 2])


# ---------------------------------------------------------------------- which picture


def test_plot_picks_by_shape() -> None:
    tokens = [["a", "b", "c"], ["d", "e"]]
    strip = attribution(torch.ones(2, 3, 5), tokens=tokens).plot(example=1)
    assert [text.get_text() for text in strip.texts] == ["d", "e"]  # without the padding
    assert attribution(torch.ones(2, 3, 8, 9)).plot().images[0].get_array().shape == (8, 9)
    assert attribution(torch.ones(2, 28, 28)).plot().images[0].get_array().shape == (28, 28)
    point = torch.randn(2, 2, 60)
    assert np.allclose(
        attribution(torch.ones(2, 2, 60), point).plot(example=-1).lines[1].get_ydata(), point[1, 1]
    )
    assert [bar.get_width() for bar in attribution(torch.tensor([[1.0, -2.0]])).plot().patches] == [1.0, -2.0]


def test_complex_points_are_not_drawn_but_their_real_values_are() -> None:
    a = attribution(torch.arange(66.0).view(2, 33), torch.ones(2, 33, dtype=torch.complex64))
    assert np.array_equal(a.plot(example=1).lines[0].get_ydata(), np.arange(33.0, 66.0))


def test_many_elements_show_the_largest_bars_by_index() -> None:
    values = torch.zeros(1, 2, 2, 2, 40)
    values[0, 1, 1, 1, 39], values[0, 0, 0, 0, 3] = -5.0, 4.0
    ax = attribution(values).plot()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert dict(zip(names, (bar.get_width() for bar in ax.patches), strict=True))["319"] == -5.0
    assert "3" in names
    assert len(names) == 24


def test_several_leaves_must_be_named() -> None:
    a = attribution({"pixels": torch.ones(1, 8, 8), "text": torch.tensor([[1.0, 2.0]])})
    with pytest.raises(InputError, match="leaf='pixels' or leaf='text'"):
        a.plot()
    with pytest.raises(InputError, match="No values for leaf 'x'"):
        a.plot(leaf="x")
    with pytest.raises(InputError, match="No example 1; there are 1"):
        a.plot(leaf="text", example=1)
    assert [bar.get_width() for bar in a.plot(leaf="text").patches] == [1.0, 2.0]
