"""The embedded digits are the first of the published ones, and the full files are found where they lie."""

from __future__ import annotations

import gzip
import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pullback.core.errors import FormatError, InputError
from pullback.datasets import Digits, fashion_mnist, load_idx, mnist
from pullback.datasets.mnist import EMBEDDED
from tests.data_root import data_root

ROOT = data_root()
needs_data = pytest.mark.skipif(
    ROOT is None, reason="the full data: neither PULLBACK_DATA nor ../shared/data exists"
)

# sha256 of the uncompressed originals (data README and golden check 19).
TRAIN_IMAGES = "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
TEST_IMAGES = "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"


def write_files(
    folder: Path, count: int = 3, suffix: str = "", labels: int | None = None, side: int = 28
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = count if labels is None else labels
    pixels = bytes(index % 256 for index in range(count * side * side))
    images_file = bytes([0, 0, 8, 3]) + struct.pack(">III", count, side, side) + pixels
    labels_file = (
        bytes([0, 0, 8, 1]) + struct.pack(">I", labels) + bytes(index % 10 for index in range(labels))
    )
    for name, content in (("images-idx3", images_file), ("labels-idx1", labels_file)):
        data = gzip.compress(content) if suffix else content
        (folder / f"train-{name}-ubyte{suffix}").write_bytes(data)


def test_the_embedded_files_are_the_documented_ones() -> None:
    licence = (EMBEDDED / "LICENSE-MNIST.md").read_text()
    assert "CC BY-SA 3.0" in licence
    files = sorted(EMBEDDED.glob("*.gz"))
    assert len(files) == 4
    for file in files:
        assert hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest() in licence


@needs_data
@pytest.mark.parametrize(("split", "count"), [("train", 4000), ("test", 1000)])
def test_the_embedded_digits_are_the_first_of_the_full_set(split: str, count: int) -> None:
    embedded, full = mnist(split=split), mnist(ROOT, split)
    assert torch.equal(embedded.x, full.x[:count])
    assert torch.equal(embedded.y, full.y[:count])


@needs_data
def test_golden_19_shapes_label_counts_and_bytes_of_the_published_files() -> None:
    train, test = mnist(ROOT), mnist(ROOT, "test")
    assert train.x.shape == (60000, 1, 28, 28)
    assert test.x.shape == (10000, 1, 28, 28)
    assert test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    for split, sha256 in (("train", TRAIN_IMAGES), ("t10k", TEST_IMAGES)):
        raw = gzip.decompress((ROOT / "mnist" / f"{split}-images-idx3-ubyte.gz").read_bytes())
        assert hashlib.sha256(raw).hexdigest() == sha256


@needs_data
def test_golden_19_fashion_mnist_has_the_official_md5() -> None:
    pixels = load_idx(ROOT / "fashion-mnist" / "t10k-images-idx3-ubyte.gz")
    header = bytes([0, 0, 8, 3]) + struct.pack(">III", 10000, 28, 28)
    assert hashlib.md5(header + pixels.numpy().tobytes()).hexdigest() == "8181f5470baa50b63fa0f6fddb340f0a"
    digits = fashion_mnist(ROOT, "test")
    assert digits.y.bincount().tolist() == [1000] * 10
    assert digits.meta["dataset"] == "fashion-mnist"


def test_pixels_are_the_bytes_over_255() -> None:
    stored = load_idx(EMBEDDED / "mnist-test-1000-images-idx3-ubyte.gz")
    x = mnist(split="test").x
    assert x.dtype == torch.float32
    assert torch.equal((x.squeeze(1) * 255).round().to(torch.uint8), stored)
    assert (x.min(), x.max()) == (0, 1)


def test_indexing_gives_pairs_and_subsets() -> None:
    digits = mnist(split="test")
    x, y = digits[7]
    assert torch.equal(x, digits.x[7])
    assert int(y) == int(digits.y[7])
    sevens = digits[digits.y == 7]
    assert isinstance(sevens, Digits)
    assert set(sevens.y.tolist()) == {7}
    assert sevens.meta == digits.meta
    assert torch.equal(digits[[3, 1]].x, digits.x[[3, 1]])
    batch_x, batch_y = next(iter(DataLoader(digits, batch_size=5)))
    assert torch.equal(batch_x, digits.x[:5])
    assert torch.equal(batch_y, digits.y[:5])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", [".", "mnist", "MNIST/raw"])
def test_files_are_found_raw_or_gzipped_in_the_usual_places(tmp_path: Path, suffix: str, place: str) -> None:
    write_files(tmp_path / place, suffix=suffix)
    digits = mnist(tmp_path)
    assert digits.y.tolist() == [0, 1, 2]
    assert digits.x[0, 0, 0, 5] == pytest.approx(5 / 255)


def test_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    with pytest.raises(InputError, match=r"PULLBACK_DATA, which is not set.*leave root out for the embedded"):
        mnist("env")
    monkeypatch.setenv("PULLBACK_DATA", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"absent.*PULLBACK_DATA\) is not a folder"):
        mnist("env")
    monkeypatch.setenv("PULLBACK_DATA", str(tmp_path))
    with pytest.raises(InputError, match="No t10k-images-idx3-ubyte"):
        mnist("env", "test")
    write_files(tmp_path / "mnist")
    assert len(mnist("env")) == 3


def test_nothing_embedded_for_fashion_mnist() -> None:
    with pytest.raises(InputError, match=r"does not come with pullback.*zalandoresearch.*mnist\(\)"):
        fashion_mnist()


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="split='valid' was given"):
        mnist(split="valid")  # type: ignore[arg-type]


def test_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    write_files(tmp_path / "a", labels=4)
    with pytest.raises(FormatError, match=r"\(4,\) labels for 3 images"):
        mnist(tmp_path / "a")
    write_files(tmp_path / "b", side=32)
    with pytest.raises(FormatError, match=r"\(3, 32, 32\).*Expected \(n, 28, 28\)"):
        mnist(tmp_path / "b")


@pytest.mark.parametrize(
    "first", ["pullback.datasets.mnist", "pullback.datasets.block_mnist", "pullback.datasets"]
)
def test_functions_stay_functions_whichever_file_is_imported_first(first: str) -> None:
    code = (
        f"import {first}\nfrom pullback.datasets import block_mnist, mnist\n"
        "import pullback.datasets.mnist, pullback.datasets.block_mnist\n"
        "assert callable(mnist) and callable(block_mnist) and callable(pullback.datasets.mnist)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
