"""Questions with right and wrong answers: TruthfulQA from a file, and splits that do not overlap."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from pullback.core.errors import FormatError, InputError

from .answers import Question
from .pairs import Pair

__all__ = ["contrastive_pairs", "load_truthfulqa", "split_questions"]

_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
Item = TypeVar("Item")


def load_truthfulqa(
    path: str | os.PathLike[str], prompt: str = "Q: {question}\nA:", answer: str = " {answer}"
) -> list[Question]:
    """TruthfulQA's questions, from its TruthfulQA.csv or mc_task.json.

    The first right answer is the "Best Answer" of the CSV, or the right one of MC1. Categories are the groups. Prompts
    and answers are set with the templates; those of the paper's protocol put six more examples before.

    Args:
        path: the file, as the authors publish it.
        prompt: template with "{question}".
        answer: template with "{answer}"; a tokenizer that merges spaces wants one here.

    Raises FormatError where a column is missing or a row has no right or no wrong answer.

    Source: Lin, Hilton, Evans 2022, TruthfulQA (arXiv:2109.07958); github.com/sylinrl/TruthfulQA.

    >>> import tempfile, pathlib
    >>> text = "Category,Question,Best Answer,Correct Answers,Incorrect Answers\\nLaw,Why?,So,So; Thus,No"
    >>> path = pathlib.Path(tempfile.mkdtemp(), "t.csv")
    >>> _ = path.write_text(text.replace("\\n", chr(10)))
    >>> load_truthfulqa(path)[0].correct
    (' So', ' Thus')
    """
    found = []
    rows = _of_json(Path(path)) if Path(path).suffix == ".json" else _of_csv(Path(path))
    for question, category, correct, incorrect in rows:
        if not correct or not incorrect:
            raise FormatError(
                f'{path}: "{question}" has {len(correct)} right and {len(incorrect)} wrong answers; expected at least '
                "one of each."
            )
        found.append(
            Question(
                prompt.format(question=question),
                tuple(answer.format(answer=each) for each in correct),
                tuple(answer.format(answer=each) for each in incorrect),
                group=category,
            )
        )
    return found


def _of_csv(path: Path) -> list[tuple[str, str, list[str], list[str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or [])]:
            raise FormatError(
                f"{path} has no column {missing[0]!r}; expected TruthfulQA.csv, with {list(_COLUMNS)}."
            )
        rows = list(reader)
    found = []
    for row in rows:
        best = row["Best Answer"].strip()
        correct = [best, *_listed(row["Correct Answers"])]
        incorrect = [each for each in _listed(row["Incorrect Answers"]) if each not in correct]
        found.append(
            (
                row["Question"].strip(),
                row.get("Category") or "",
                list(dict.fromkeys(filter(None, correct))),
                incorrect,
            )
        )
    return found


def _of_json(path: Path) -> list[tuple[str, str, list[str], list[str]]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for entry in entries:
            one, all_of = entry["mc1_targets"], entry["mc2_targets"]
            correct = [each for each, right in {**one, **all_of}.items() if right]
            best = next(each for each, right in one.items() if right)
            incorrect = [each for each, right in {**one, **all_of}.items() if not right]
            found.append(
                (entry["question"], "", list(dict.fromkeys([best, *correct])), list(dict.fromkeys(incorrect)))
            )
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise FormatError(
            f'{path} is no mc_task.json ({type(error).__name__}: {error}); expected a list of objects with "question", '
            '"mc1_targets" and "mc2_targets".'
        ) from error
    return found


def _listed(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(";") if part.strip()]


def split_questions(items: Sequence[Item], sizes: Sequence[int], seed: int = 0) -> tuple[list[Item], ...]:
    """Disjoint random parts of so many items each, to fit, to validate and to report on.

    Items with one prompt come into one part, so that no part tells of another. A size of -1 takes the rest.

    Raises InputError where the items do not suffice, or for more than one -1.

    >>> [len(part) for part in split_questions([([5, n], 7, 8) for n in range(10)], (3, 2, -1))]
    [3, 2, 5]
    """
    prompts: dict[str, list[Item]] = {}
    for item in items:
        prompt = item[0] if isinstance(item, tuple) else getattr(item, "prompt", item)
        prompts.setdefault(repr(prompt), []).append(item)
    groups = list(prompts.values())
    asked = sum(size for size in sizes if size >= 0)
    if sum(size < 0 for size in sizes) > 1 or any(size == 0 for size in sizes) or asked > len(groups):
        raise InputError(
            f"sizes={tuple(sizes)} of {len(groups)} different prompts; expected positive sizes that they suffice for, "
            "with at most one -1 for the rest."
        )
    order: list[int] = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    parts, start = [], 0
    for size in sizes:
        stop = start + (size if size >= 0 else len(groups) - asked)
        parts.append([item for number in order[start:stop] for item in groups[number]])
        start = stop
    return tuple(parts)


def contrastive_pairs(questions: Sequence[Question], per_question: int = 1) -> list[Pair]:
    """Pairs to fit on: the answer to prefer against the first so many wrong ones of each question.

    >>> from pullback.steering import Question
    >>> [pair.dispreferred for pair in contrastive_pairs([Question([5], (7,), (8, 9))], per_question=2)]
    [8, 9]
    """
    return [
        Pair(asked.prompt, asked.correct[0], wrong, asked.image)
        for asked in questions
        for wrong in asked.incorrect[:per_question]
    ]
