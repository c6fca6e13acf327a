"""The binary format of CIFAR-10: planes and labels where they belong, damage named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pullback.core.errors import FormatError, InputError
from pullback.datasets import cifar10


def write(file: Path, labels: list[int], seed: int = 0) -> np.ndarray:
    """Random images in the format, (n, 3, 32, 32) uint8."""
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    )
    return images


@pytest.mark.parametrize("inside", [".", "cifar-10-batches-bin", "cifar10"])
def test_images_and_labels_are_those_of_the_files(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path / inside / "data_batch_1.bin", [3, 0, 9])
    second = write(tmp_path / inside / "data_batch_2.bin", [1], seed=1)
    test = write(tmp_path / inside / "test_batch.bin", [7, 7], seed=2)
    data = cifar10(tmp_path)
    assert data.y.tolist() == [3, 0, 9, 1]
    assert torch.equal(data.x[:3], torch.from_numpy(first) / 255)
    assert torch.equal(data.x[3:], torch.from_numpy(second) / 255)
    # red, green, blue: the first plane of the first record begins after its label
    raw = (tmp_path / inside / "data_batch_1.bin").read_bytes()
    assert float(data.x[0, 0, 0, 1]) == pytest.approx(raw[2] / 255)
    assert float(data.x[0, 2, 31, 31]) == pytest.approx(raw[3072] / 255)
    monkeypatch.setenv("PULLBACK_DATA", str(tmp_path))
    tested = cifar10("env", "test")
    assert torch.equal(tested.x, torch.from_numpy(test) / 255)
    assert len(data[1:3]) == 2
    assert data.meta["sha256"] != tested.meta["sha256"]


def test_what_is_not_the_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no files data_batch_1\.bin.*Expected root="):
        cifar10(tmp_path)
    with pytest.raises(InputError, match="split='dev' was given"):
        cifar10(tmp_path, "dev")  # type: ignore[arg-type]
    file = tmp_path / "test_batch.bin"
    write(file, [1, 2])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"has 6145 bytes\. Expected a multiple of 3073"):
        cifar10(tmp_path, "test")
    write(file, [1, 20])
    with pytest.raises(FormatError, match=r"has the label 20\. Expected 0 to 9; is it CIFAR-100"):
        cifar10(tmp_path, "test")
    file.write_bytes(b"")
    with pytest.raises(FormatError, match="has 0 bytes"):
        cifar10(tmp_path, "test")
