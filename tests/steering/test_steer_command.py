"""``pullback steer``: what the commands write is what the library gives, and mistakes are told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pullback as pb
from pullback.cli import app, main
from pullback.steering import Pair, Setting, evaluate, fit, load

WORDS = ["[UNK]", "the", "cat", "sat", "on", "mat", "dog", "ran", "red", "blue"]
PROMPTS = ["the cat", "the dog", "on the mat", "red the", "blue dog", "mat cat sat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a word tokenizer, and pairs in files."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path = tmp_path_factory.mktemp("steer")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        path / "model"
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=10, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path / "model")
    for name, prompts in (("fit", PROMPTS[:3]), ("validation", PROMPTS[3:4]), ("test", PROMPTS[4:])):
        rows = [{"prompt": prompt, "preferred": "red", "dispreferred": "blue"} for prompt in prompts]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (path / "neutral.txt").write_text("the cat sat on the mat\nthe dog ran\n")
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["steer", *map(str, arguments)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def vector(folder: Path) -> Path:
    printed = run(
        "fit",
        folder / "model",
        folder / "fit.jsonl",
        "--out",
        folder / "v.safetensors",
        "--k",
        1,
        "--steps",
        4,
    )
    assert "directions at blocks 0, 1, 2" in printed
    assert "completeness gap" in printed
    return folder / "v.safetensors"


def test_fit_is_fit(folder: Path, vector: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    again = fit(model, tokenizer, [Pair(prompt, "red", "blue") for prompt in PROMPTS[:3]], k=1, steps=4)
    found = load(vector, model=model)
    for layer, direction in again.directions.items():
        torch.testing.assert_close(found.directions[layer], direction)


def test_apply_shows_both(folder: Path, vector: Path) -> None:
    printed = run(
        "apply", folder / "model", vector, "--text", "the cat", "--tokens", 4, "--strength", 2, "--json"
    )
    record = json.loads(printed)
    assert record["prompt"] == "the cat"
    assert record["setting"] == "strength 2 at all blocks"
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    inputs = tokenizer("the cat", return_tensors="pt")
    with load(vector).apply(model, 2.0):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert record["steered"] == tokenizer.decode(out[0, 2:], skip_special_tokens=True)


def test_evaluate_writes_what_evaluate_gives(folder: Path, vector: Path, tmp_path: Path) -> None:
    printed = run(
        "evaluate", folder / "model", vector, folder / "test.jsonl", "--fit-pairs", folder / "fit.jsonl",
        "--validation", folder / "validation.jsonl", "--neutral", folder / "neutral.txt", "--budget", 3,
        "--generate", 3, "--draws", 3, "--instruction", "the red", "--out", tmp_path / "out.json",
        "--csv", tmp_path / "out.csv", "--html", tmp_path / "out.html",
    )  # fmt: skip
    document = json.loads((tmp_path / "out.json").read_text())
    assert list(document["values"]) == [
        "none", "prompt", "vector", "random_tokens", "mean_diff", "mean_grad", "random directions",
    ]  # fmt: skip
    assert document["settings"]["run"]["budget"] == 3
    assert all(flag in printed for flag in document["flags"])
    page = (tmp_path / "out.html").read_text()
    for text in (
        "What speaks against it", "margin by strength", "how well the fitting pairs agree", "tokens that were masked",
        "Greedy continuations", "blue dog",
    ):  # fmt: skip
        assert text in page, text
    assert "http://" not in page.replace("http://www.w3.org", "")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    chosen = document["settings"]["settings"]["vector"]
    items = [Pair(prompt, "red", "blue") for prompt in PROMPTS[4:]]
    printed_setting = Setting(
        float(chosen.split()[1]), None if "all" in chosen else [int(chosen.split("[")[1][:-1])]
    )
    again = evaluate(model, tokenizer, load(vector), items, setting=printed_setting, draws=2)
    assert document["values"]["vector"]["margin"] == pytest.approx(
        again.conditions["vector"].values["margin"].tolist(), rel=1e-5
    )


def test_mistakes_are_one_line(
    folder: Path, vector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "the"}\n')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "text.jsonl").write_text("the cat\n")
    model, test = str(folder / "model"), str(folder / "test.jsonl")
    out = ["--out", str(tmp_path / "v.safetensors")]
    for arguments, text in (
        (["fit", model, str(tmp_path / "broken.jsonl"), *out], "line 1 is"),
        (["fit", model, str(tmp_path / "text.jsonl"), *out], "is no JSON"),
        (["fit", model, str(tmp_path / "missing.jsonl"), *out], "cannot be read"),
        (["fit", model, str(tmp_path / "none.jsonl"), *out], "pairs is empty"),
        (["fit", model, test, "--layers", "one", *out], 'expected numbers such as "4,5,6"'),
        (["fit", model, test, "--method", "best", *out], "expected one of 'grains'"),
        (["evaluate", model, str(vector), test, "--fit-pairs", test], "were fitted on"),
        (
            ["evaluate", model, str(vector), test, "--html", str(tmp_path / "no" / "x.html")],
            "cannot be written",
        ),
        (["evaluate", model, test, test], ""),
    ):
        assert main(["steer", *arguments]) == 2, arguments
        told = capsys.readouterr().err.strip()
        assert text in told
        assert "\n" not in told


def test_names_are_public() -> None:
    for name in (
        "evaluate",
        "sweep",
        "Question",
        "Setting",
        "load_truthfulqa",
        "split_questions",
        "contrastive_pairs",
    ):
        assert name in pb.steering.__all__
