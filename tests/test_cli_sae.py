"""``pullback sae``: a run, its measures, its latents and its page, as the library gives them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pullback.cli import app, main
from pullback.steering.sae import evaluate_sae, latent_statistics, load

SITE = "transformer.h.0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a word tokenizer, a text, a TopK run and a gradient run."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("sae")
    names = ["[UNK]", "the", "cat", "sat", "on", "mat", "dog", "ran", "far", "home"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    path = folder / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=10, n_embd=8, n_layer=2, n_head=2, n_positions=16)
        transformers.GPT2LMHeadModel(config).save_pretrained(path)
    draw = torch.randint(1, 10, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(names[i] for i in draw), encoding="utf-8")
    for selection in ("topk", "gradient"):
        done = CliRunner().invoke(
            app,
            ["sae", "train", str(path), str(folder / "text.txt"), "--site", SITE, "--out", str(folder / selection),
             "--latents=24", "--k=3", "--tokens=2000", "--batch-tokens=100", "--length=12", "--log-every=5",
             f"--selection={selection}", "--learning-rate=0.01", "--beta=20"],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "20 steps" in done.output
        assert f"wrote {folder / selection / 'sae'}" in done.output
    return folder


def batches(runs: Path) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    import transformers

    path = runs / "model"
    words = transformers.AutoTokenizer.from_pretrained(path)
    ids = torch.tensor(words((runs / "text.txt").read_text())["input_ids"])
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    return model, list(ids[:600].reshape(50, 12).split(16))


def given(runs: Path, *names: str) -> list[str]:
    return [str(runs / "model"), str(runs / "text.txt"), *(str(runs / name) for name in names)]


def test_evaluate_gives_the_librarys_numbers_and_a_page(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["sae", "evaluate", *given(runs, "topk", "gradient"), "--length=12", "--html", str(page)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    model, tokens = batches(runs)
    for name in ("topk", "gradient"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            expected = evaluate_sae(model, SITE, tokens, load(runs / name / "sae"))
        assert document[name]["selections"] == json.loads(json.dumps(expected.rows()))
        assert [str(each.message) for each in said] == document[name]["warnings"]
        assert document[name]["site"] == SITE
    assert [row["selection"] for row in document["gradient"]["selections"]] == [
        "fresh label", "data label", "gradient-free"
    ]  # fmt: skip
    text = page.read_text(encoding="utf-8")
    for part in (
        "Every way to use each autoencoder",
        "fresh label",
        "strongest contexts",
        "promotes",
        "data:image",
    ):
        assert part in text
    shown = CliRunner().invoke(app, arguments)
    assert "ce_score_mean" in shown.output
    assert f"wrote {page}" in shown.output


def test_show_reads_latents_on_a_text(runs: Path) -> None:
    model, tokens = batches(runs)
    found = latent_statistics(model, SITE, tokens, load(runs / "topk" / "sae"))
    latent = int(found.largest.argmax())
    done = CliRunner().invoke(
        app, ["sae", "show", str(runs / "topk"), *given(runs), "--latent", str(latent), "--length=12"]
    )
    assert done.exit_code == 0, done.output
    assert f"latent {latent}: on {float(found.frequency[latent]):.3%} of tokens" in done.output
    assert f"{float(found.top_values[latent, 0]):8.3g}" in done.output
    assert "[" in done.output.split("promotes")[1]
    plain = CliRunner().invoke(app, ["sae", "show", str(runs / "gradient")])
    assert "width=8, latents=24, k=3, gradient (beta=20)" in plain.output
    assert f"site {SITE}" in plain.output


def test_mistakes_are_named_in_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    wrong = {
        "fewer than one example of 12": [
            "evaluate",
            str(runs / "model"),
            str(short),
            str(runs / "topk"),
            "--length=12",
        ],
        "holds no saved autoencoder": ["evaluate", *given(runs), str(tmp_path)],
        "there is no latent 99": ["show", str(runs / "topk"), *given(runs), "--latent=99", "--length=12"],
        "--length is 4096, and the model takes": [
            "evaluate",
            *given(runs),
            str(runs / "topk"),
            "--length=4096",
        ],
        "latents are shown on a text": ["show", str(runs / "topk"), "--latent=1"],
        "is no file": ["train", str(runs / "model"), "none.txt", "--site=x", "--out", str(tmp_path / "new")],
        'no module "nowhere"': ["train", *given(runs), "--site=nowhere", "--out", str(tmp_path / "new")],
    }
    for text, arguments in wrong.items():
        assert main(["sae", *arguments]) == 2, text
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
