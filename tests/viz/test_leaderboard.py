"""The leaderboard: what is drawn is what the rows say, and no text becomes markup."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pullback.core.errors import InputError
from pullback.viz import level_curves, metric_bars, rank_table
from tests.evaluation.test_measurements import table


def test_bars_have_the_estimates_and_intervals() -> None:
    axes = table().plot("deletion")
    scores = {score.method: score for score in table().scores() if score.metric == "deletion"}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["good", "poor", "dead", "random"]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[:2] == [scores[name].interval.estimate for name in ("good", "poor")]
    assert widths[2] == 0  # nothing is known of it, and a dash says so
    assert [text.get_text().strip() for text in axes.texts] == ["–"]
    assert axes.patches[3].get_hatch() == "///"
    whiskers = axes.collections[0].get_segments()
    assert whiskers[0][:, 0].tolist() == [scores["good"].interval.low, scores["good"].interval.high]
    assert "lower is better" in axes.get_xlabel()
    with pytest.raises(InputError, match="metric='roc' was given"):
        table().plot("roc")
    with pytest.raises(InputError, match="No rows were given"):
        metric_bars([])


def test_ranks_are_colours_and_ties_are_dots() -> None:
    axes = table().plot_ranks()
    colours = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert colours[:2].tolist() == [[1, 1], [2, 2]]
    assert np.isnan(colours[2]).all()
    assert {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines} == {(0, 0), (1, 0)}
    with pytest.raises(InputError, match="No rows were given"):
        rank_table([])
    with pytest.raises(InputError, match="No rows were given"):
        level_curves([])


def test_the_page_is_closed_and_says_what_cannot_be_said(tmp_path: Path) -> None:
    whole = table()
    hostile = "<script>alert(1)</script>"
    rows = [
        row if row.method != "poor" else type(row)(**{**row.__dict__, "method": hostile})
        for row in whole.rows
    ]
    type(whole)(rows, {"name": hostile}).to_html(tmp_path / "page.html", "Mine")
    page = (tmp_path / "page.html").read_text()
    assert hostile not in page
    assert page.count("&lt;script&gt;") >= 2
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "random (control)" in page
    assert "dead: MethodError: no convolution" in page
    assert " best" in page
    assert "†" in page
    assert page.count("data:image/png;base64,") == 1
