"""Questions with true and false answers from a file, splits that share no question, and neutral sentences."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from pullback.core.errors import FormatError, InputError

__all__ = ["QuestionSplit", "TruthfulQuestion", "load_truthfulqa", "neutral_sentences", "split_questions"]

T = TypeVar("T")


@dataclass(frozen=True)
class TruthfulQuestion:
    """A question of TruthfulQA.

    Attributes:
        question, category, kind: as in the file; the kind is "Adversarial" or "Non-Adversarial".
        best, best_incorrect: the answers that stand for all; ``best`` is among ``correct``.
        correct, incorrect: all answers, without repetitions.
    """

    question: str
    category: str
    kind: str
    best: str
    best_incorrect: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSplit(Generic[T]):
    """Questions to fit a vector on, to choose its strength on, and to test it on; no two share a question."""

    fit: tuple[T, ...]
    validation: tuple[T, ...]
    test: tuple[T, ...]


def load_truthfulqa(path: str | os.PathLike[str]) -> list[TruthfulQuestion]:
    """The questions of a ``TruthfulQA.csv`` file.

    Answers are separated by semicolons. One that is listed as correct and as incorrect counts as neither, unless it is
    the best answer. Files before 2025 name no best incorrect answer: the first incorrect one stands in.

    Raises FormatError for a file without the columns, or with a question without answers.
    Source: Lin, Hilton, Evans 2022 (TruthfulQA, arXiv:2109.07958).
    """
    needed = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    found = []
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise FormatError(
                    f"{path} has no column {missing[0]!r}; expected TruthfulQA.csv with {', '.join(needed)}."
                )
            for row in reader:
                found.append(_question(path, reader.line_num, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path} cannot be read as CSV: {error}. Expected TruthfulQA.csv.") from error
    if not found:
        raise FormatError(f"{path} has no questions; expected TruthfulQA.csv.")
    return found


def split_questions(
    questions: Sequence[T],
    fit: int = 50,
    validation: int = 100,
    test: int | None = None,
    *,
    seed: int = 0,
    key: Callable[[T], Any] | None = None,
) -> QuestionSplit[T]:
    """Split questions at random so that none, however often it stands there, is in two parts.

    Args:
        questions: any objects.
        fit, validation, test: sizes; None for all that remain. A question that is there several times counts once, and
            all of it goes into one part.
        seed: of the order.
        key: what makes two of them one question; None is the attribute ``question``, else ``prompt``, ignoring case and
            space around, else the object.

    Raises InputError where there are fewer questions, or a size is not positive.

    >>> split = split_questions(["a", "b", "A ", "c"], fit=1, validation=1)
    >>> sorted(map(len, (split.fit, split.validation, split.test)))
    [1, 1, 2]
    """
    groups: dict[Any, list[T]] = {}
    for question in questions:
        groups.setdefault(_key(question) if key is None else key(question), []).append(question)
    sizes = {"fit": fit, "validation": validation, "test": 1 if test is None else test}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name}={size!r}; expected a number of questions, at least 1.")
    if sum(sizes.values()) > len(groups):
        raise InputError(
            f"there are {len(groups)} different questions, fewer than {fit} to fit, {validation} to validate and "
            f"{'one' if test is None else test} to test on; ask for fewer."
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [list(groups.values())[place] for place in order]
    ends = (fit, fit + validation, len(groups) if test is None else fit + validation + test)
    parts = [
        tuple(one for group in shuffled[start:end] for one in group)
        for start, end in zip((0, *ends[:2]), ends, strict=True)
    ]
    return QuestionSplit(*parts)


def neutral_sentences() -> list[str]:
    """Plain statements with nothing to be steered about, for the perplexity of a model.

    >>> len(neutral_sentences())
    16
    """
    return list(_NEUTRAL)


def _question(path: Any, line: int, row: dict[str, Any]) -> TruthfulQuestion:
    correct, incorrect = _answers(row["Correct Answers"]), _answers(row["Incorrect Answers"])
    best = (row["Best Answer"] or "").strip()
    if best and best not in correct:
        correct.insert(0, best)
    both = set(correct) & set(incorrect)
    correct = [answer for answer in correct if answer not in both or answer == best]
    incorrect = [answer for answer in incorrect if answer not in both]
    question = (row["Question"] or "").strip()
    if not question or not best or not incorrect:
        raise FormatError(
            f"{path}, line {line}: {question!r} has {len(correct)} correct and {len(incorrect)} incorrect answers and "
            f"the best answer {best!r}; expected a question with answers of both kinds."
        )
    worst = (row.get("Best Incorrect Answer") or "").strip()
    kind, category = (row["Type"] or "").strip(), (row["Category"] or "").strip()
    return TruthfulQuestion(
        question, category, kind, best, worst or incorrect[0], tuple(correct), tuple(incorrect)
    )


def _answers(text: str | None) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in (text or "").split(";") if part.strip()))


def _key(question: Any) -> Any:
    found = getattr(question, "question", getattr(question, "prompt", question))
    return " ".join(found.split()).casefold() if isinstance(found, str) else repr(found)


_NEUTRAL = (
    "The train to the coast leaves every hour from the second platform.",
    "She put the bread in the oven and set the table for four.",
    "A triangle with two equal sides has two equal angles.",
    "The library opens at nine and closes at six, except on Sundays.",
    "He repaired the fence before the winter storms arrived.",
    "The meeting was moved to Thursday because two members were travelling.",
    "Wool is warmer than cotton when it is wet.",
    "They planted tomatoes along the southern wall of the garden.",
    "The river widens below the bridge and slows down near the mill.",
    "Please fold the letter twice and put it in the blue envelope.",
    "The orchestra tuned for a minute, and then the lights went down.",
    "Our neighbours painted their door green last spring.",
    "The recipe asks for two eggs, a cup of flour and some milk.",
    "On clear mornings one can see the mountains from the office.",
    "The bicycle needs a new chain and a little oil.",
    "After the game the players thanked the referee and went home.",
)
