"""The page that the study of methods writes: for each question who answers it best, who is tied, who beats chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pullback.evaluation import Measurements, Score
from pullback.version import __version__

__all__ = ["QUESTIONS", "Answer", "answers", "mean_ranks", "page", "summary"]

# what each group of metrics asks, by how the metrics' names begin
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "Does it lie where the signal is?": ("leakage", "null_share", "relevance rank", "pointing game"),
    "Does the score follow its order?": ("deletion", "insertion", "ROAD"),
    "Do its values predict what removal does?": ("faithfulness correlation", "infidelity", "monotonicity"),
    "Can a model learn from what it keeps?": ("DiffROAR",),
    "Does it stay put under small changes?": ("sensitivity",),
    "Does it depend on the model and on the class?": ("parameter randomization", "random logit"),
}
OURS = "integrated gradients"


@dataclass(frozen=True)
class Answer:
    """How a method does on a question, over all models and metrics of it: ``cells`` of them are defined."""

    method: str
    cells: int
    tied: int
    beats: int
    rank: float


def answers(whole: Measurements, question: str) -> list[Answer]:
    """Of the methods that are no controls, the best first: by how often they are tied with the best."""
    by_method: dict[str, list[Score]] = {}
    for score in whole.scores():
        asked = any(score.metric.startswith(name) for name in QUESTIONS[question])
        if asked and not score.control and not math.isnan(score.interval.estimate):
            by_method.setdefault(score.method, []).append(score)
    found = [
        Answer(
            method=method,
            cells=len(scores),
            tied=sum(score.standing.tied for score in scores),
            beats=sum(score.standing.beats_controls is True for score in scores),
            rank=sum(score.standing.rank.estimate for score in scores) / len(scores),
        )
        for method, scores in by_method.items()
    ]
    return sorted(found, key=lambda answer: (-answer.tied / answer.cells, answer.rank))


def summary(whole: Measurements) -> str:
    """Each question's table as text."""
    lines = []
    for question in QUESTIONS:
        lines += [question, *(f"  {_line(answer)}" for answer in answers(whole, question)[:5])]
    return "\n".join(lines)


_LOGIT = """\
The gradient of an untrained net passes the random logit test, so that nobody beats every control there: that a map \
changes with the class does not say that it has to do with what was learnt."""


def mean_ranks(whole: Measurements) -> list[dict[str, Any]]:
    """Rows for a figure: each method's mean rank on each question."""
    return [
        {
            "data": "", "model": "", "metric": question, "method": answer.method, "control": False,
            "rank": answer.rank, "tied_with_best": 2 * answer.tied >= answer.cells,
        }
        for question in QUESTIONS
        for answer in sorted(answers(whole, question), key=lambda answer: answer.method)
    ]  # fmt: skip


def page(whole: Measurements, models: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    sections = [_INTRODUCTION, _in_short(whole)]
    for question in QUESTIONS:
        found = answers(whole, question)
        if found:
            sections.append(f"## {question}\n\n{_question(whole, question, found)}")
    sections += [_auto(whole), _same(whole), _models(models, whole), _LIMITS]
    return "\n\n".join(sections) + "\n"


_INTRODUCTION = """\
# Which method?

This page is generated: `python -m studies.which_method` measures and writes it. Twelve methods, six controls \
and variants, on three kinds of data: BlockMNIST, where it is known which half of an image carries the label; \
Fashion-MNIST; and the theory's vectors, of which one number in ten carries it. Every comparison is made on the \
same trained nets and the same images; intervals resample both together.

**How to read it.** *Best or tied*: in how many comparisons (one metric on one kind of net) no method could be \
told from it as better: the 95 % interval of the paired difference from the best holds 0. *Beats every control*: \
in how many it is better than a random map, random times input, the input itself, its edges and the gradient of \
an untrained net. A method that does not has not shown, by that metric, that it explains the model. *Mean rank*: \
1 is the best of the methods, with shared places for equal ones; it hides ties, so read it last. No correction \
is made for the number of comparisons, so that one in forty "better" is chance. All numbers with their intervals \
are in `studies/results/which_method/tables.md`.

![Mean ranks of the methods by question](images/ranks.png)

Rows are methods, columns questions; dark is a worse mean rank, a dot is best or tied in at least half of the \
comparisons."""

_LIMITS = """\
## What this does not say

The nets are small, the images too; transformers, texts and large photographs are not here. Metrics of removal \
measure the model on inputs that it was never trained on. Rates (gradient, SmoothGrad, the pullbacks, \
GuidedBackprop) are ranked by size and enter sums of removal times the input; contributions by their sign: \
another convention would move them. Smoothing a map, which adds nothing about the model, improves some scores: \
the row "blurred gradient" in the tables shows which. GradCAM is read at the last convolution, which has few \
places in nets as small as these, and suffers for it. SmoothGrad has 16 samples and integrated gradients 16 \
steps from zero; more samples or another baseline were not tried. DiffROAR rests on two nets and two retrainings \
of each."""


def _in_short(whole: Measurements) -> str:
    lines = ["## In short", ""]
    for question in QUESTIONS:
        found = answers(whole, question)
        if not found:
            continue
        best = found[0]
        near = [each for each in found if each.tied / each.cells >= 0.9 * best.tied / best.cells]
        names = _listed(f"{each.method} ({each.tied} of {each.cells})" for each in near)
        lines.append(f"- **{question}** Most often best or tied: {names}.")
    lines += ["", _tied_cells(whole)]
    return "\n".join(lines)


def _tied_cells(whole: Measurements) -> str:
    """How often there is a winner at all."""
    cells: dict[tuple[str, str, str], list[Score]] = {}
    for score in whole.scores():
        asked = any(score.metric.startswith(name) for names in QUESTIONS.values() for name in names)
        if asked and not score.control and not math.isnan(score.interval.estimate):
            cells.setdefault((score.data, score.model, score.metric), []).append(score)
    alone = sum(sum(score.standing.tied for score in each) == 1 for each in cells.values())
    nobody = sum(not any(score.standing.beats_controls for score in each) for each in cells.values())
    return (
        f"Of {len(cells)} comparisons, {alone} have one method ahead of all others; in the rest at least two cannot be "
        f"told apart. In {nobody} no method beats every control. The questions have different answers, and there is no "
        "method that wins them all: choose by the question."
    )


def _question(whole: Measurements, question: str, found: Sequence[Answer]) -> str:
    metrics = [name for name in whole.metrics if any(name.startswith(each) for each in QUESTIONS[question])]
    lines = [
        f"By {_listed(metrics)}.",
        "",
        "| method | best or tied | beats every control | mean rank |",
        "|---|---|---|---|",
        *(f"| {a.method} | {a.tied} of {a.cells} | {a.beats} of {a.cells} | {a.rank:.1f} |" for a in found),
    ]
    if any(name == "random logit" for name in metrics):
        lines += ["", _LOGIT]
    return "\n".join(lines)


def _auto(whole: Measurements) -> str:
    parts = []
    for question in QUESTIONS:
        for answer in answers(whole, question):
            if answer.method == OURS:
                parts.append(
                    f"- {question} Best or tied in {answer.tied} of {answer.cells}, better than every control in "
                    f"{answer.beats}, mean rank {answer.rank:.1f} of 12."
                )
    return "\n".join(
        [
            '## What `method="auto"` makes of it',
            "",
            "`auto` is asked for one map by someone who has not said what for. It takes integrated gradients, whose "
            "values add up to a change of the score, so that each result carries its own check; the other complete "
            "methods here need rules for the model's operations, or hooks. On the questions of this page it is:",
            "",
            *parts,
            "",
            "Where another method is ahead, ask for it by name: `explain(..., method=...)`. "
            "[What auto chooses](concepts/auto.md) has the rest.",
        ]
    )


def _same(whole: Measurements) -> str:
    """Methods that no number of this study tells apart."""
    tables: dict[str, dict[tuple[str, str, str], float]] = {}
    for score in whole.scores():
        if not score.control and not math.isnan(score.interval.estimate):
            tables.setdefault(score.method, {})[score.data, score.model, score.metric] = (
                score.interval.estimate
            )
    pairs = []
    names = list(tables)
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            one, other = tables[names[first]], tables[names[second]]
            common = one.keys() & other.keys()
            equal = [key for key in common if math.isclose(one[key], other[key], rel_tol=2e-3, abs_tol=1e-4)]
            if common and len(equal) >= 0.75 * len(common):
                pairs.append(f"{names[first]} and {names[second]} ({len(equal)} of {len(common)} numbers)")
    said = (
        f"Some methods are nearly one and the same on these ReLU nets: {_listed(pairs)}."
        if pairs
        else "No two methods gave the same numbers throughout."
    )
    return f"## Ties by construction\n\n{said}"


def _models(models: Mapping[str, Mapping[str, Any]], whole: Measurements) -> str:
    lines = [
        "## The nets",
        "",
        f"pullback {__version__}, two shared EPYC cores, one thread.",
        "",
        "| net | test accuracy | training had converged |",
        "|---|---|---|",
        *(
            f"| {name} | {facts['accuracy']:.3f} | {'yes' if facts['converged'] else 'no'} |"
            for name, facts in models.items()
        ),
    ]
    flags: dict[str, tuple[set[str], set[str]]] = {}
    for row in whole.rows:
        if row.flag and not row.values:
            methods, data = flags.setdefault(row.flag, (set(), set()))
            methods.add(row.method)
            data.add(f"{row.data} ({row.model})")
    if flags:
        lines += ["", "Not measured:", ""]
        lines += [
            f"- {_listed(sorted(methods))} on {_listed(sorted(data))}. {flag}"
            for flag, (methods, data) in flags.items()
        ]
    return "\n".join(lines)


def _listed(parts: Iterable[str]) -> str:
    words = list(parts)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def _line(answer: Answer) -> str:
    return (
        f"{answer.method:<26} best or tied {answer.tied:>3} of {answer.cells:<3} beats every control "
        f"{answer.beats:>3}  mean rank {answer.rank:.1f}"
    )
