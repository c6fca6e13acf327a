"""TruthfulQA as a file, and splits that share no question."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pullback import FormatError, InputError
from pullback.datasets import load_truthfulqa, neutral_sentences, split_questions
from tests.data_root import data_root

HEADER = "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source\n"


def written(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "TruthfulQA.csv"
    path.write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_answers_are_separated_trimmed_and_told_apart(tmp_path: Path) -> None:
    path = written(
        tmp_path, 'Adversarial,Law, Why? ,No,Yes,"Maybe; No ;No;; Unknown","Yes;Unknown; Never",http://x'
    )
    (found,) = load_truthfulqa(path)
    assert (found.question, found.category, found.kind) == ("Why?", "Law", "Adversarial")
    assert (found.best, found.best_incorrect) == ("No", "Yes")
    assert found.correct == ("Maybe", "No")
    assert found.incorrect == ("Yes", "Never")


def test_a_best_answer_that_is_not_listed_is_added_and_old_files_have_no_best_incorrect_one(
    tmp_path: Path,
) -> None:
    header = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    (found,) = load_truthfulqa(written(tmp_path, "A,B,Why?,No,Maybe,Yes; Never,x", header=header))
    assert found.correct == ("No", "Maybe")
    assert found.best_incorrect == "Yes"


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["1,2"], "a,b\n", "has no column 'Type'"),
        ([], HEADER, "has no questions"),
        (["A,B,Why?,No,Yes,No,,x"], HEADER, "line 2: 'Why?' has 1 correct and 0 incorrect answers"),
        (["A,B,Why?,,Yes,No,Yes,x"], HEADER, "best answer ''"),
    ],
)
def test_files_that_are_not_truthfulqa(tmp_path: Path, rows: list[str], header: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        load_truthfulqa(written(tmp_path, *rows, header=header))
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read as CSV"):
        load_truthfulqa(tmp_path / "none.csv")


@pytest.mark.skipif(data_root() is None, reason="the shared data are not here")
def test_the_real_file_is_its_multiple_choice_task() -> None:
    """``mc_task.json`` was made from it by its authors; it keeps empty answers and, twice, one as true and false."""
    root = data_root()
    assert root is not None
    folder = root / "truthfulqa"
    if not folder.is_dir():
        pytest.skip("TruthfulQA is not here")
    found = load_truthfulqa(folder / "TruthfulQA.csv")
    task = json.loads((folder / "mc_task.json").read_text())
    assert len(found) == len(task) == 790
    different = 0
    for one, wanted in zip(found, task, strict=True):
        labels = wanted["mc2_targets"]
        assert one.question == wanted["question"]
        true = {answer for answer, label in labels.items() if label and answer}
        false = {answer for answer, label in labels.items() if not label and answer}
        different += (set(one.correct), set(one.incorrect)) != (true, false)
        assert [answer for answer, label in wanted["mc1_targets"].items() if label] == [one.best]
    assert different == 2
    split = split_questions(found, fit=50, validation=100)
    texts = [{one.question for one in part} for part in (split.fit, split.validation, split.test)]
    assert list(map(len, texts)) == [50, 100, 640]
    assert sum(map(len, texts)) == len(texts[0] | texts[1] | texts[2])


def test_no_question_is_in_two_parts_however_it_is_spelled() -> None:
    questions = [f"question {number}" for number in range(20)]
    every = [*questions, *(f" QUESTION  {number} " for number in range(20))]
    for seed in range(5):
        split = split_questions(every, 4, 5, 6, seed=seed)
        parts = [
            {" ".join(text.split()).lower() for text in part}
            for part in (split.fit, split.validation, split.test)
        ]
        assert list(map(len, parts)) == [4, 5, 6]
        assert max(Counter(text for part in parts for text in part).values()) == 1
        assert len(split.fit) == 8
    assert split_questions(every, 4, 5, seed=1) == split_questions(every, 4, 5, seed=1)
    assert split_questions(every, 4, 5, seed=1) != split_questions(every, 4, 5, seed=2)
    assert len(split_questions(every, 4, 5).test) == 22


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2), "there are 4 different questions, fewer than 2 to fit, 2 to validate and one to test on"),
        ((1, 1, 3), "fewer than 1 to fit, 1 to validate and 3 to test on"),
        ((0, 1), "fit=0; expected a number of questions"),
        ((1, 1, 0), "test=0"),
    ],
)
def test_too_few_questions(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        split_questions(["a", "b", "c", "d"], *sizes)
    assert message in str(caught.value)


def test_a_key_keeps_together_what_it_says() -> None:
    split = split_questions(list(range(12)), 1, 1, key=lambda number: number % 3)
    for part in (split.fit, split.validation, split.test):
        assert len(part) == 4
        assert len({number % 3 for number in part}) == 1


def test_neutral_sentences_differ() -> None:
    assert len(set(neutral_sentences())) == len(neutral_sentences()) == 16
