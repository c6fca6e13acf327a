"""The HTML page of a steering vector: what speaks against it first, then what it did and where it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .evaluation_result import SHOWN, SteeringEvaluation
from .pairs import Pair, token_ids_of
from .sweep import SteeringSweep
from .vector import SteeringVector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_steering_report"]

_PAIRS_SHOWN = 8


def write_steering_report(
    path: str | os.PathLike[str],
    evaluation: SteeringEvaluation,
    vectors: Mapping[str, SteeringVector],
    *,
    tokenizer: Any = None,
    fit_pairs: Sequence[Any] = (),
    items: Sequence[Any] = (),
    sweeps: Mapping[str, SteeringSweep] | None = None,
    title: str = "Steering report",
) -> None:
    """Write one self-contained page: flags, the table, strength curves, layer reliability, tokens, generations.

    Args:
        vectors: by the names that they were evaluated under.
        tokenizer: turns token ids into words; ids are shown without.
        fit_pairs: what the vectors were fitted on, whose chosen tokens are drawn.
        items: the questions, for the text before and after.
        sweeps: name -> ``sweep`` of that vector, for the strength curves.
    """
    from pullback.viz.report import Figure, Prose, Section, Table, write_report

    sections: list[Section] = [Prose(_verdict(evaluation))]
    sections.append(
        Table(
            "Held-out items",
            ("condition", *SHOWN, "perplexity ratio"),
            evaluation.cells(),
            "Means over items with bootstrap intervals; for random directions the band that 95 % of them lie in.",
        )
    )
    sections += [
        Figure(f"{name}: {found.criterion} by strength, a line for each choice of blocks", _curves(found))
        for name, found in (sweeps or {}).items()
    ]
    for name, vector in vectors.items():
        agreement = vector.provenance.get("agreement", ())
        if agreement:
            columns = ("block", "pairwise", "to_direction", "explained", "length", "alone")
            sections.append(
                Table(
                    f"{name}: how well the fitting pairs agree, block by block",
                    columns,
                    [[each[column] for column in columns] for each in agreement],
                    "pairwise: mean cosine between the displacements of two pairs; to_direction: to the vector.",
                )
            )
        if strips := _strips(vector, fit_pairs, tokenizer):
            sections.append(Figure(f"{name}: tokens that were masked, and their scores", strips))
    if shown := _generations(evaluation, items, tokenizer):
        names = [name for name, each in evaluation.conditions.items() if each.continuations]
        sections.append(Table("Greedy continuations", ("prompt", *names), shown))
    write_report(path, sections, title)


def _verdict(evaluation: SteeringEvaluation) -> str:
    if not evaluation.flags:
        return "Nothing speaks against the vector here: every control was there and none did as well."
    flags = "\n\n".join(f"⚑ {flag}" for flag in evaluation.flags)
    return f"What speaks against it:\n\n{flags}"


def _curves(found: SteeringSweep) -> Figure:
    """The criterion against strength; hollow where the budget is broken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, layers in enumerate(dict.fromkeys(str(point.setting.layers) for point in found.points)):
        points = sorted(
            (each for each in found.points if str(each.setting.layers) == layers),
            key=lambda each: each.setting.strength,
        )
        colour = f"C{number % 10}"
        strengths, values = [each.setting.strength for each in points], [each.value for each in points]
        axes.plot(
            strengths, values, color=colour, linewidth=1.2, label="all blocks" if layers == "None" else layers
        )
        for each in points:
            face = colour if each.within else "white"
            axes.plot(
                [each.setting.strength], [each.value], "o", color=colour, markerfacecolor=face, markersize=5
            )
    axes.axhline(found.unsteered, color="0.5", linewidth=0.9, linestyle=":", label="unsteered")
    axes.set(xlabel="strength (hollow: over budget)", ylabel=found.criterion)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _strips(vector: SteeringVector, pairs: Sequence[Any], tokenizer: Any) -> Figure | None:
    """The prompts of the first pairs, the chosen tokens coloured by their scores."""
    chosen = vector.provenance.get("chosen")
    if not chosen or not pairs:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pullback.viz.tokens import token_strip

    rows = []
    for number, (pair, entry) in enumerate(zip(pairs[:_PAIRS_SHOWN], chosen, strict=False)):
        pair = pair if isinstance(pair, Pair) else Pair(*pair)
        if isinstance(pair.prompt, Mapping) or pair.image is not None:
            continue  # image tokens have no words
        ids = _prompt_ids(number, pair.prompt, tokenizer)
        scores = [0.0] * len(ids)
        for side in ("positive", "negative"):
            for place, score, *_ in entry[side]:
                scores[place] = float(score)
        rows.append((_words(ids, tokenizer), scores))
    if not rows:
        return None
    figure = Figure(figsize=(7.0, 0.2 + 0.75 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (words, scores) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        token_strip(words, scores, ax=axes)
    return figure


def _generations(evaluation: SteeringEvaluation, items: Sequence[Any], tokenizer: Any) -> list[list[str]]:
    made = [each.continuations for each in evaluation.conditions.values() if each.continuations]
    if not made or not items:
        return []
    rows = []
    for number, item in enumerate(items[:_PAIRS_SHOWN]):
        prompt = item[0] if isinstance(item, tuple) else item.prompt
        shown = (
            prompt if isinstance(prompt, str) else _text(_prompt_ids(number, prompt, tokenizer), tokenizer)
        )
        rows.append([shown, *(_text(continuations[number], tokenizer) for continuations in made)])
    return rows


def _prompt_ids(number: int, prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        words = getattr(tokenizer, "tokenizer", tokenizer)
        return list(words(prompt)["input_ids"])
    if isinstance(prompt, Mapping):
        prompt = prompt["input_ids"]
    return list(token_ids_of(number, "prompt", prompt, tokenizer))


def _words(ids: Sequence[int], tokenizer: Any) -> list[str]:
    convert = getattr(getattr(tokenizer, "tokenizer", tokenizer), "convert_ids_to_tokens", None)
    return [str(token) for token in convert(list(ids))] if convert else [str(each) for each in ids]


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    decode = getattr(getattr(tokenizer, "tokenizer", tokenizer), "decode", None)
    return str(decode(list(ids))) if decode else " ".join(map(str, ids))
