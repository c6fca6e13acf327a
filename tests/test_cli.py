"""The command line: results equal to the library's, one-line errors with the way out, exit codes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pullback as pb
from pullback.cli import app, main
from pullback.commands.inputs import image_tensor
from pullback.commands.targets import parse_target

NETS = """
import torch
from torch import nn

def image_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 3))

def broken():
    raise RuntimeError("weights are missing")

def number():
    return 3

"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a module of nets, an image and an array."""
    from PIL import Image

    (tmp_path / "my_nets.py").write_text(NETS, encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    np.save(tmp_path / "x.npy", (pixels / 255.0)[None, None])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a word tokenizer, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: index for index, word in enumerate(["[UNK]", "the", "cat", "sat", "on", "mat"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    path = tmp_path_factory.mktemp("gpt2")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=6, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error line of a call that must end with exit code 2, one line on stderr and nothing on stdout."""
    assert main([str(each) for each in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    return shown.err


def built() -> torch.nn.Module:
    import my_nets

    return my_nets.image_net().eval()


def test_explain_prints_what_the_library_gives_and_saves_it(folder: Path) -> None:
    arguments = ["explain", "my_nets:image_net", "x.npy", "--method", "ig(steps=8)", "--target", "1"]
    done = CliRunner().invoke(app, [*arguments, "--out", "a.safetensors", "--html", "a.html"])
    assert done.exit_code == 0, done.output
    x = torch.from_numpy(np.load("x.npy")).float()
    expected = pb.explain(built(), x, method="ig(steps=8)", target=1)
    saved = pb.load("a.safetensors")
    assert torch.equal(saved.values, expected.values)
    assert str(expected) in done.output
    assert "wrote a.safetensors" in done.output
    assert "<html" in (folder / "a.html").read_text(encoding="utf-8")


def test_the_saved_record_is_enough_to_run_again(folder: Path) -> None:
    given = ["explain", "my_nets:image_net", "grey.png", "--size=8x8", "--seed=3", "--chunk=2"]
    assert (
        main([*given, "--method=smoothgrad(samples=4)", "--target=Margin(0, 2)", "--out=a.safetensors"]) == 0
    )
    first = pb.load("a.safetensors")
    command = shlex.split(first.meta["run"]["command"])
    assert command[0] == "pullback"
    assert main([*command[1:], "--out=b.safetensors"]) == 0
    assert torch.equal(first.values, pb.load("b.safetensors").values)
    assert first.meta["run"]["sha256"]
    assert "seed=3" in first.method


def test_json_is_one_document_with_the_question_and_the_trust(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "my_nets:image_net", "x.npy", "--json", "--site=0", "--method=gradcam"]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = pb.explain(built(), torch.from_numpy(np.load("x.npy")).float(), site="0", method="gradcam")
    assert (document["method"], document["site"]) == (expected.method, "0")
    assert document["score"] == pytest.approx(expected.score.tolist())
    leaf = document["leaves"]["0"]
    assert leaf["shape"] == [1, 1, 6, 6]
    assert leaf["sum"] == pytest.approx(expected.values.sum((1, 2, 3)).tolist())
    top = leaf["largest"][0][0]
    assert float(expected.values[0][tuple(top["index"])]) == pytest.approx(top["value"])
    assert top["value"] == pytest.approx(float(expected.values.abs().max()))


def test_text_goes_through_the_tokenizer_of_the_directory(
    language_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    arguments = ["explain", str(language_model), "--text", "the cat sat on the", "--target", "mat", "--json"]
    assert main([*arguments, "--method=ixg"]) == 0
    document = json.loads(capsys.readouterr().out)
    tokens = document["leaves"]["embeddings"]["tokens"][0]
    assert [each["token"] for each in tokens] == ["the", "cat", "sat", "on", "the"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model).eval()
    target = parse_target("mat", tokenizer, language_model=True)
    inputs = tokenizer("the cat sat on the", return_tensors="pt")
    expected = pb.explain(model, inputs, target=target, method="ixg")
    assert document["score"] == pytest.approx(expected.score.tolist())
    direct = model(**inputs).logits[0, -1].detach().log_softmax(-1)[5]
    assert document["score"][0] == pytest.approx(float(direct), rel=1e-5)
    assert [each["value"] for each in tokens] == pytest.approx(expected.values.sum(2)[0].tolist())


def test_an_image_is_scaled_by_its_depth_resized_and_laid_out_channels_first(tmp_path: Path) -> None:
    from PIL import Image

    deep = np.array([[0, 65535], [32768, 16384]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    read = image_tensor(tmp_path / "deep.png", None, None)
    assert read.shape == (1, 1, 2, 2)
    # eight bits remain: half a step of 1/255, rounded down
    torch.testing.assert_close(read[0, 0], torch.from_numpy(deep / 65535.0).float(), atol=1 / 255, rtol=0)
    colour = np.zeros((2, 3, 3), dtype=np.uint8)
    colour[..., 1] = 255
    Image.fromarray(colour).save(tmp_path / "green.png")
    green = image_tensor(tmp_path / "green.png", None, None)
    assert green.shape == (1, 3, 2, 3)
    assert green[0, 1].min() == 1
    assert green[0, [0, 2]].max() == 0
    assert image_tensor(tmp_path / "green.png", (4, 5), 1).shape == (1, 1, 4, 5)


def test_mistakes_are_one_line_with_the_way_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, x = "my_nets:image_net", "x.npy"
    (folder / "junk.npy").write_bytes(b"not an array")
    (folder / "junk.png").write_bytes(b"not an image")
    for arguments, way_out in [
        (["explain", net], "--text"),
        (["explain", "my_nets:image_nets", x], 'Nearest: "image_net"'),
        (["explain", "no_such_module:net", x], "no module"),
        (["explain", "no/such/directory", x], "module:factory"),
        (["explain", str(folder), x], "config.json"),
        (["explain", "my_nets:broken", x], "weights are missing"),
        (["explain", "my_nets:number", x], "nn.Module"),
        (["explain", net, "none.npy"], "no file none.npy"),
        (["explain", net, "junk.npy"], "numpy.save"),
        (["explain", net, "junk.png"], "image"),
        (["explain", net, "my_nets.py"], ".npy"),
        (["explain", net, "--text", "words"], "--tokenizer"),
        (["explain", net, "grey.png", "--size", "9x9"], "--size"),
        (["explain", net, "grey.png", "--size", "big"], "56x28"),
        (["explain", net, x, "--target", "7"], "3 classes"),
        (["explain", net, x, "--target", "Margn(1, 2)"], 'Nearest: "Margin"'),
        (["explain", net, x, "--method", "smoothgrd"], 'Nearest: "SmoothGrad"'),
        (["explain", net, x, "--site", "layer4"], "Nearest"),
        (["explain", net, x, "--chunk", "many"], "such as 16"),
        (["explain", net, x, "--memory-budget", "much"], "4GB"),
        (["explain", net, x, "--out", "none/a.safetensors"], "Create it first"),
        (["explain", net, x, "--metod", "ig"], "See: pullback explain --help"),
        (["explain", net, x, "--seed", "one"], "integer"),
        (["explian"], "See: pullback --help"),
        (["demo", "--images", "5000"], "1000"),
    ]:
        assert way_out in mistake(capsys, *arguments), arguments


def test_an_internal_error_is_not_called_a_mistake(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self, problem):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(pb.Gradient, "__call__", failing)
    assert main(["explain", "my_nets:image_net", "x.npy", "--method=gradient"]) == 1
    shown = capsys.readouterr().err
    assert "internal error, RuntimeError: a fault of ours" in shown.splitlines()[-1]
    assert "Traceback" in shown


def test_list_names_every_method_and_baseline_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for cls in [*pb.METHODS.values(), pb.Blur, pb.Zeros]:
        assert f"  {cls.__name__}(" in text
        assert cls.__doc__.partition("\n")[0] in text
    assert main(["list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    steps = {row["name"]: row["parameters"] for row in document["methods"]}["IntegratedGradients"]
    assert "steps=64" in steps


def test_doctor_examines_a_model_with_and_without_input(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "my_nets:image_net"]) == 0
    assert "Sequential: 239 parameters" in capsys.readouterr().out
    assert main(["doctor", "my_nets:image_net", "x.npy", "--site=0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ready"]
    assert {row["method"]: row["works"] for row in document["methods"]}["GradCAM"]
    assert main(["doctor", "my_nets:image_net", "grey.png", "--size=9"]) == 0
    assert "stops: RuntimeError in the model" in capsys.readouterr().out


def test_targets_are_read_without_evaluating_them() -> None:
    assert parse_target(None) is None
    assert parse_target("-1") == -1
    assert parse_target("sports car, sport car") == "sports car, sport car"
    with pytest.raises(pb.TargetError, match="Give numbers or quoted text"):
        parse_target("Logit(__import__('os'))")


def test_the_process_ends_with_the_exit_code_and_loads_nothing_for_help(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment
        )

    code = (
        "import sys, pullback; assert 'typer' not in sys.modules; from pullback.cli import main; "
        "assert main(['--help']) == 0; "
        "heavy = {'transformers', 'matplotlib', 'captum', 'skimage', 'scipy', 'PIL'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = run("-c", code)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.endswith("[]\n")
    assert "explain" in shown.stdout
    failed = run("-m", "pullback", "explain", "my_nets:image_net", "none.npy")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: no file none.npy. Give an image, a .npy array or a .txt file.\n"
    assert run("-m", "pullback", "--version").stdout == f"pullback {pb.__version__}\n"
