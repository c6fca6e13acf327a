"""``pullback steer``: the library's numbers, saved configurations, and one-line errors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pullback.cli import app, main
from pullback.commands.models import load_tokenizer, named_model
from pullback.datasets import neutral_sentences
from pullback.steering import Pair, Question, Setting, evaluate, fit, load
from tests.steering.worded import ANSWERS, NOUNS, saved, truthfulqa_csv


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def line(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs about three nouns, and questions about the other three."""
    folder = tmp_path_factory.mktemp("steer")
    saved(folder / "model")
    truthfulqa_csv(folder / "TruthfulQA.csv")
    prompts = [f"Q : what is the {noun} ? A :" for noun in NOUNS]
    (folder / "pairs.jsonl").write_text(
        "".join(line(prompt=p, preferred="no", dispreferred="yes") for p in prompts[:3]), encoding="utf-8"
    )
    (folder / "questions.jsonl").write_text(
        line(prompt=prompts[3], true=["no", f"no {ANSWERS[3]}"], false=["yes", "cheese"], best=1)
        + line(prompt=prompts[4], preferred="no", dispreferred="yes"),
        encoding="utf-8",
    )
    (folder / "validation.jsonl").write_text(
        line(prompt=prompts[5], preferred="no", dispreferred="yes"), encoding="utf-8"
    )
    assert (
        run("fit", folder / "model", folder / "pairs.jsonl", "--out", folder / "v.safetensors", "--k", 2)
        is not None
    )
    return folder


def run(*arguments: Any) -> str:
    found = CliRunner().invoke(app, ["steer", *map(str, arguments)])
    assert found.exit_code == 0, found.output + repr(found.exception)
    return found.output


def mistake(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["steer", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def pieces(folder: Path) -> tuple[Any, Any]:
    return named_model(str(folder / "model")).model, load_tokenizer(folder / "model")


def test_fit_is_the_librarys(folder: Path) -> None:
    model, words = pieces(folder)
    given = [Pair(f"Q : what is the {noun} ? A :", "no", "yes") for noun in NOUNS[:3]]
    wanted, found = fit(model, words, given, k=2), load(folder / "v.safetensors", model=model)
    assert all(cosine == pytest.approx(1.0, abs=1e-6) for cosine in wanted.cosine(found).values())
    assert found.provenance["pairs_digest"] == wanted.provenance["pairs_digest"]
    shown = json.loads(
        run("fit", folder / "model", folder / "pairs.jsonl", "--out", folder / "m.safetensors", "--method", "mean_grad",
            "--layers", "1:", "--json")
    )  # fmt: skip
    assert (shown["pairs"], list(shown["agreement"])) == (3, ["1", "2"])


def test_apply_generates_before_and_after(folder: Path) -> None:
    import torch

    model, words = pieces(folder)
    shown = json.loads(
        run("apply", folder / "model", folder / "v.safetensors", "--text", "the cat sat", "--strength", 1.5, "--layers",
            "-1", "--tokens", 5, "--json")
    )  # fmt: skip
    assert (shown["strength"], shown["layers"]) == (1.5, [2])
    inputs = words("the cat sat", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad(), load(folder / "v.safetensors").apply(model, 1.5, layers=[2]):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, 3:]
    assert shown["generations"][0]["after"] == words.decode([int(t) for t in out if t != 2])
    text = run("apply", folder / "model", folder / "v.safetensors", "--text", "the cat sat", "--tokens", 3)
    assert text.startswith("prompt: the cat sat\nbefore: ")


def test_evaluate_writes_the_librarys_numbers(folder: Path) -> None:
    out, table, page = (folder / name for name in ("found.json", "found.csv", "found.html"))
    text = run(
        "evaluate", folder / "model", folder / "v.safetensors", folder / "questions.jsonl", "--fit-pairs",
        folder / "pairs.jsonl", "--strength", 0.3, "--random-draws", 3, "--generations", 1, "--out", out, "--csv", table,
        "--html", page,
    )  # fmt: skip
    model, words = pieces(folder)
    asked = [
        Question(f"Q : what is the {NOUNS[3]} ? A :", ["no", f"no {ANSWERS[3]}"], ["yes", "cheese"], best=1),
        Pair(f"Q : what is the {NOUNS[4]} ? A :", "no", "yes"),
    ]
    wanted = evaluate(
        model, words, load(folder / "v.safetensors"), asked, setting=Setting(0.3), random_draws=3,
        neutral=neutral_sentences(),
    )  # fmt: skip
    rows = {
        (row["condition"], row["measure"]): row["estimate"] for row in json.loads(out.read_text())["rows"]
    }
    for condition in ("none", "grains", "random"):
        for measure in ("mc1", "mc2", "margin_shift", "perplexity_ratio"):
            assert rows[condition, measure] == pytest.approx(wanted.value(condition, measure), abs=1e-6)
    assert rows["mean_diff", "margin_shift"] is not None
    assert "few_questions" in text
    assert table.read_text().startswith("condition,setting,measure,estimate")
    assert "What speaks for and against" in page.read_text()


def test_a_saved_configuration_runs_again_and_what_is_typed_comes_first(folder: Path) -> None:
    config = folder / "steer.json"
    first = json.loads(
        run("evaluate", folder / "model", folder / "v.safetensors", folder / "questions.jsonl", "--validation",
            folder / "validation.jsonl", "--budget", 1e9, "--random-draws", 2, "--generations", 0, "--save-config",
            config, "--json")
    )  # fmt: skip
    again = json.loads(run("evaluate", "--config", config, "--json"))
    assert again == first
    assert first["settings"]["setting"]["strength"] in (0.1, 0.2, 0.4, 0.8)
    other = json.loads(run("evaluate", "--config", config, "--random-draws", 3, "--json"))
    assert other["settings"]["random_draws"] == 3
    run("fit", folder / "model", folder / "pairs.jsonl", "--method", "mean_diff", "--out", folder / "d.safetensors",
        "--save-config", config)  # fmt: skip
    assert set(json.loads(config.read_text())) == {"evaluate", "fit"}


def test_truthfulqa_is_fitted_chosen_and_tested_on_other_questions(folder: Path) -> None:
    options = [
        "--truthfulqa",
        folder / "TruthfulQA.csv",
        "--fit-questions",
        4,
        "--validation-questions",
        3,
        "--seed",
        2,
    ]
    run("fit", folder / "model", *options, "--method", "mean_diff", "--out", folder / "t.safetensors")
    found = json.loads(
        run("evaluate", folder / "model", folder / "t.safetensors", *options, "--budget", 1e9, "--random-draws", 2,
            "--generations", 0, "--json")
    )  # fmt: skip
    assert (found["settings"]["questions"], found["settings"]["fit_pairs"]) == (5, 4)
    assert found["settings"]["setting"]["strength"] in (0.1, 0.2, 0.4, 0.8)
    typed = json.loads(
        run("evaluate", folder / "model", folder / "t.safetensors", *options, "--strength", 0.25, "--random-draws", 2,
            "--generations", 0, "--json")
    )  # fmt: skip
    assert typed["settings"]["setting"]["strength"] == 0.25


def test_mistakes_say_what_to_type(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, vector, pairs = folder / "model", folder / "v.safetensors", folder / "pairs.jsonl"
    asked = folder / "questions.jsonl"
    broken = folder / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n', encoding="utf-8")
    odd = folder / "odd.json"
    odd.write_text('{"fit": {"metod": "grains"}}', encoding="utf-8")
    empty = folder / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    for arguments, message in (
        (["fit", model, pairs], "there is no out; give --out FILE"),
        (["fit", "--out", vector], "there is no model; give the model, as an argument or in --config"),
        (["fit", model, "--out", vector], "give a file of pairs, or --truthfulqa"),
        (["fit", model, broken, "--out", vector], 'line 1 has no "preferred"'),
        (["fit", model, empty, "--out", vector], "is empty; expected one JSON object a line"),
        (["fit", model, pairs, "--out", vector, "--method", "grain"], "method='grain'"),
        (["fit", "--config", odd], 'the option "metod" for fit, which there is not. Nearest: "method"'),
        (["fit", model, folder / "none.jsonl", "--out", vector], "cannot be read"),
        (["apply", model, vector], "give the prompt with --text"),
        (
            ["apply", model, vector, "--text", "cat", "--strength", "nan"],
            "strength=nan; expected a finite number",
        ),
        (["apply", model, vector, "--text", "cat", "--layers", "x"], '--layers is "x"'),
        (["apply", model, vector, "--text", "cat", "--layers", "7"], "there is no block 7"),
        (["evaluate", model, vector, pairs], 'are prompts that "grains" was fitted on'),
        (["evaluate", model, vector, empty], "is empty"),
        (["evaluate", model, pairs, asked], "pairs.jsonl"),
        (["evaluate", model, vector, asked, "--html", folder / "no" / "x.html"], "cannot be written"),
        (
            ["evaluate", model, vector, asked, "--validation", folder / "validation.jsonl", "--strength", 1],
            "one of the two",
        ),
        (["evaluate", model, vector, asked, "--nonsense"], "See: pullback steer --help"),
    ):
        assert message in mistake(capsys, *arguments), arguments
