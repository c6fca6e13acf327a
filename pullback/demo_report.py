"""The pages and pictures of the demo: what is seen, in plain words, and how far to trust each number."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pullback.demo import CONTROLS, METRICS, DemoResult, Network
from pullback.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["write_demo"]

_TITLES = {"standard": "standard training", "robust": "robust training", "top": "digit always on top"}
_COLOURS = {"standard": "#b2182b", "robust": "#2166ac", "top": "#4d9221"}
_SHOWN = ("gradient", "SmoothGrad", "integrated gradients")
_EXAMPLES = 4
_LIT = 0.1

_INTRODUCTION = """\
Each image below has two halves: a handwritten digit, and a square with a cross that is the same in every \
image and says nothing about the class. A coin decides which is on top. We train three small networks to \
name the digit, ask {count} attribution methods which pixels each decision rests on, and measure how much \
of the answer lands on the empty half. That share is called leakage. Nobody has to judge the maps by eye: \
where the signal is, is known.

In short: {headline}

This does not say that the method is broken. The gradient of the standard network really is large on the \
square: the network reacts to changes there, since in another image the digit could have been there. \
Explanations are about the network, not about the world."""

_HOW_TO_READ = """\
How to read it. On the left, the share of the strongest 10 % of pixels that lie on the empty half: 0 is \
perfect, 0.5 is what pixels drawn at random get. A whisker is a 95 % bootstrap interval over {images} \
test images; it does not cover another training run. The controls at the bottom do not look at the \
network at all: a method that is no better than them tells nothing here.

Beware of the methods that multiply by the input (input × gradient, integrated gradients, DeepLift). They \
are zero on black pixels, and only about {lit:.0%} of an image's pixels are lit. The strongest 10 % must \
then take in most lit pixels, weak ones too, so the share on the left cannot fall to 0 even for a network \
that ignores the square. For them the measure on the right is the fair one: null mass, the share of all \
|attribution| on the empty half. Compare them with the control "random × input", which is zero on the \
same pixels. Expected gradients compare with other test images: where all images agree, as they do on a \
square that never moves, they are exactly 0."""

_TRUST = """\
How far to trust each number. "gap" is what the values of a complete method fail to add up to, in units \
of the score (the logit): small beside the score, the sum can be taken at its word. "standard error" is \
the noise of methods that average over random draws, relative to the size of the map: 0.1 means that \
about a tenth of the map is chance. "evaluations" counts gradients per image: the cost. A dash means that \
the method promises no such thing."""


def write_demo(folder: Path, result: DemoResult) -> None:
    """Write ``report.html`` and the PNG figures of a demo run into ``folder``."""
    from pullback.viz import Attributions, Figure, Prose, Table, write_report

    scored = [network for network in result.networks if network.leaks]
    collapsed = [network.name for network in result.networks if not network.leaks]
    first = result.networks[0]
    sections: list[Any] = []
    introduction = _INTRODUCTION.format(
        count=len(set(first.leaks) - set(CONTROLS)), headline=headline(result)
    )
    if collapsed:
        introduction += f"\n\nCollapsed, and therefore not scored: {', '.join(collapsed)}. "
        introduction += "Such a network answers alike for every image, so its maps mean nothing."
    sections.append(Prose(introduction))
    if scored:
        maps, bars = maps_figure(scored), bars_figure(scored)
        maps.savefig(folder / "attributions.png", dpi=144, facecolor="white", metadata={"Software": None})
        bars.savefig(folder / "leakage.png", dpi=144, facecolor="white", metadata={"Software": None})
        lit = float((first.images.x > _LIT).float().mean())
        sections += [
            Figure(
                "The same digits for three networks. Red speaks for the predicted class, blue against it.",
                maps,
            ),
            Figure("Leakage of each method on each network, with controls that know no network.", bars),
            Prose(_HOW_TO_READ.format(images=len(first.images), lit=lit)),
            Table(
                "Share of the strongest 10 % on the empty half (null_share@0.1)",
                *leakage_rows(scored, METRICS[0]),
            ),
            Table(
                "Share of all |attribution| on the empty half (null_mass)", *leakage_rows(scored, METRICS[1])
            ),
        ]
    sections.append(Table("The networks: MLP 1568-128-128-10, Adam 1e-3, batch 128", *network_rows(result)))
    if scored:
        sections += [Prose(_TRUST), Table("Trust and cost, on the standard network", *trust_rows(scored[0]))]
        few = {name: each[:2] for name, each in scored[0].attributions.items()}
        sections.append(Attributions("Every method on two images of the standard network", few))
    sections.append(Prose(_colophon(result)))
    write_report(
        folder / "report.html", sections, title="What does a network look at? Three answers, measured"
    )


_DATA = {
    "standard": "digit in a random half",
    "robust": "the same, perturbed by PGD (l2, radius 2, 7 steps)",
    "top": "digit always in the upper half",
}


def headline(result: DemoResult) -> str:
    """The effect in one sentence, from the measured numbers of the plain gradient."""
    parts = [
        f"{at.estimate:.1%} with {_TITLES[network.name]}"
        for network in result.networks
        if (at := network.leaks.get("gradient", {}).get(METRICS[0])) is not None
    ]
    return (
        f"of the strongest pixels of the plain gradient, the empty half gets {_listed(parts)} (chance: 50 %)."
    )


def network_rows(result: DemoResult) -> tuple[list[str], list[list[object]], str]:
    """Columns, rows and a note: how each network was trained and how well it does."""
    columns = ["network", "trained on", "epochs", "test accuracy", "training settled", "collapsed", "seconds"]
    rows: list[list[object]] = []
    for network in result.networks:
        made = network.trained
        rows.append([_TITLES[network.name], _DATA[network.name], len(made.losses), made.accuracy])
        rows[-1] += [made.converged, made.collapsed, round(made.seconds, 1)]
    note = (
        "Robust training gives accuracy away for answering alike to all images within a distance of 2 (l2)."
    )
    return columns, rows, note


def leakage_rows(networks: list[Network], metric: str) -> tuple[list[str], list[list[object]], str]:
    """Columns, rows and a note: one metric of each method on each network."""
    columns = ["method", *(_TITLES[network.name] for network in networks)]
    rows: list[list[object]] = []
    for method in networks[0].leaks:
        found = [network.leaks[method][metric] for network in networks]
        cells = [f"{at.estimate:.3f} [{at.low:.3f}, {at.high:.3f}]" for at in found]
        rows.append([_titled(method), *cells])
    return columns, rows, "Mean over images [95 % interval]; lower is better. All numbers are in leakage.csv."


def trust_rows(network: Network) -> tuple[list[str], list[list[object]], str]:
    """Columns, rows and a note: gap, standard error, evaluations and time of each method."""
    columns = ["method", "gap, median", "gap, worst", "standard error", "evaluations", "seconds", "spelling"]
    rows: list[list[object]] = []
    for name, each in network.attributions.items():
        gap, error = each.diagnostics.get("gap"), each.diagnostics.get("standard_error")
        values = each.values
        assert isinstance(values, Tensor)
        # the recorded error is that of the mean over draws, which VarGrad does not report
        relative = None
        if isinstance(error, Tensor) and not each.method.startswith("VarGrad"):
            relative = float((_norm(error) / _norm(values)).median())
        middle, worst = (None, None) if gap is None else (float(gap.abs().median()), float(gap.abs().max()))
        evaluations = int(each.diagnostics["evaluations"].max())
        rows.append([name, middle, worst, relative, evaluations, round(each.meta["seconds"], 2), each.method])
    note = (
        "Methods share work here: SmoothGrad's sweep also serves VarGrad, one gradient serves all that need "
        "it, and the first of them pays. The spelling is what --method takes."
    )
    return columns, rows, note


def maps_figure(networks: list[Network]) -> MatplotlibFigure:
    """Rows: digits; columns: the image, then some methods for each network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pullback.viz import heat_map

    shown = [name for name in _SHOWN if name in networks[0].attributions]
    columns = len(networks) * (len(shown) + 1)
    figure = Figure(figsize=(0.95 * columns, 1.75 * _EXAMPLES + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subfigures(1, len(networks), wspace=0.03, squeeze=False)
    for panel, network in zip(panels.ravel(), networks, strict=True):
        panel.suptitle(_TITLES[network.name], fontsize=11, color=_COLOURS[network.name], fontweight="bold")
        axes = panel.subplots(_EXAMPLES, len(shown) + 1)
        for row in range(_EXAMPLES):
            axes[row, 0].imshow(
                network.images.x[row, 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            axes[row, 0].set_axis_off()
            for column, name in enumerate(shown, 1):
                values = network.attributions[name].values
                assert isinstance(values, Tensor)
                heat_map(values[row], axes[row, column])
        for column, name in enumerate(("image", *shown)):
            axes[0, column].set_title(name.replace(" ", "\n", 1), fontsize=8)
    return figure


def bars_figure(networks: list[Network]) -> MatplotlibFigure:
    """Both metrics of each method, one bar per network, with intervals; controls last."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(networks[0].leaks)
    figure = Figure(figsize=(10.5, 1.3 + 0.4 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    height = 0.78 / len(networks)
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), METRICS, strict=True):
        for number, network in enumerate(networks):
            at = [network.leaks[name][metric] for name in names]
            places = torch.arange(len(names)) - 0.39 + height * (number + 0.5)
            colour, label = _COLOURS[network.name], _TITLES[network.name] if metric == METRICS[0] else None
            axes.barh(places, [each.estimate for each in at], height, color=colour, label=label)
            axes.hlines(
                places, [each.low for each in at], [each.high for each in at], color="0.15", linewidth=1.1
            )
        axes.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axes.text(0.51, -0.5, "chance", fontsize=8, color="0.3", va="center")
        axes.axhline(len(names) - len(CONTROLS) - 0.5, color="0.8", linewidth=0.8)
        axes.set_yticks(range(len(names)), [_titled(name) for name in names], fontsize=9)
        axes.set_ylim(len(names) - 0.45, -0.75)
        axes.set_xlim(0, 0.85)
        axes.set_xlabel(_AXES[metric], fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=len(networks))
    return figure


_AXES = {
    "null_share@0.1": "share of the strongest 10 % of pixels on the empty half",
    "null_mass": "share of all |attribution| on the empty half",
}


def _titled(method: str) -> str:
    return f"{method} (control)" if method in CONTROLS else method


def _colophon(result: DemoResult) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    text = f"Made by pullback {__version__} with torch {torch.__version__} ({settings}). "
    text += "The same settings give the same numbers."
    if result.left_out:
        text += " Left out, in the words of the error: " + " ".join(
            f"{n}: {why}" for n, why in result.left_out.items()
        )
        text += " Class activation maps need a convolution, and these networks have none."
    source = (
        "The data and the effect: H. Shah, P. Jain, P. Netrapalli, Do input gradients highlight "
        "discriminative features? NeurIPS 2021."
    )
    return f"{text}\n\n{source} The digits are the first 4,000 and 1,000 of MNIST."


def _norm(values: Tensor) -> Tensor:
    return values.double().flatten(1).square().sum(1).sqrt().clamp_min(1e-300)


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
