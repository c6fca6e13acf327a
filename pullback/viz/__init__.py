"""Seeing attributions: pure functions from arrays to matplotlib Axes, and one offline HTML report."""

from pullback.viz.components import components, levels
from pullback.viz.curves import bars, curve
from pullback.viz.image import heat_map, overlay
from pullback.viz.leaderboard import level_curves, metric_bars, rank_table
from pullback.viz.report import Attributions, Figure, Prose, Table, Tokens, write_report
from pullback.viz.series import series
from pullback.viz.spectrum import spectrum, time_frequency
from pullback.viz.tokens import html_spans, token_strip

__all__ = [
    "Attributions",
    "Figure",
    "Prose",
    "Table",
    "Tokens",
    "bars",
    "components",
    "curve",
    "heat_map",
    "html_spans",
    "level_curves",
    "levels",
    "metric_bars",
    "overlay",
    "rank_table",
    "series",
    "spectrum",
    "time_frequency",
    "token_strip",
    "write_report",
]
