"""IDX files written byte by byte from the format's definition, then read; and the ways they can be broken."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from pullback.core.errors import FormatError, InputError
from pullback.datasets import load_idx

HEADER_2X3 = struct.pack(">II", 2, 3)


@pytest.mark.parametrize(
    ("code", "letter", "dtype", "values"),
    [
        (0x08, "B", torch.uint8, [0, 1, 2, 127, 128, 255]),
        (0x09, "b", torch.int8, [0, 1, -1, 127, -128, 5]),
        (0x0B, "h", torch.int16, [0, 1, -1, 32767, -32768, 258]),
        (0x0C, "i", torch.int32, [0, 1, -1, 2**31 - 1, -(2**31), 66051]),
        (0x0D, "f", torch.float32, [0.0, 1.5, -2.25, 1e30, -1e-30, 3.0]),
        (0x0E, "d", torch.float64, [0.0, 1.5, -2.25, 1e300, -1e-300, 0.1]),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_every_type_is_read_big_endian(
    tmp_path: Path, code: int, letter: str, dtype: torch.dtype, values: list[float], gzipped: bool
) -> None:
    content = bytes([0, 0, code, 2]) + HEADER_2X3 + struct.pack(f">6{letter}", *values)
    path = tmp_path / "array"  # no suffix: gzip is recognised by content
    path.write_bytes(gzip.compress(content, mtime=0) if gzipped else content)
    assert torch.equal(load_idx(path), torch.tensor(values, dtype=dtype).reshape(2, 3))


def test_a_dimension_of_zero_is_an_empty_tensor(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(bytes([0, 0, 8, 2]) + struct.pack(">II", 0, 28))
    assert load_idx(path).shape == (0, 28)


def test_the_result_can_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "array"
    path.write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + b"\x01\x02")
    assert load_idx(path).add_(1).tolist() == [2, 3]


GOOD = bytes([0, 0, 8, 2]) + HEADER_2X3 + bytes(6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG\r\n", "starts with 89 50 4e 47"),
        (b"\x00\x00\x08", "starts with 00 00 08"),
        (bytes([0, 0, 0x0A, 2]) + HEADER_2X3 + bytes(6), "unknown IDX type code 0x0A"),
        (bytes([0, 0, 8, 0]) + bytes(1), "0 dimensions"),
        (bytes([0, 0, 8, 200]) + bytes(900), "200 dimensions"),
        (GOOD[:9], "truncated in its header: 5 of 8 bytes"),
        (GOOD[:-1], "truncated: 5 of the 6 bytes that 2 x 3"),
        (GOOD + b"\x00", "goes on after the 6 bytes"),
        (bytes([0, 0, 8, 4]) + struct.pack(">IIII", *[2**31] * 4), "over the limit of 1,073,741,824"),
        (gzip.compress(GOOD, mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff\xff\xff\xff", "damaged gzip"),
        (gzip.compress(GOOD[:-1], mtime=0), "truncated: 5 of the 6"),
        (b"\x1f\x8b\x08", "damaged gzip"),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        load_idx(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_damaged_checksum_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "broken.gz"
    content = bytearray(gzip.compress(GOOD, mtime=0))
    content[-8] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="damaged gzip"):
        load_idx(path)


def test_the_limit_can_be_lowered_and_raised(tmp_path: Path) -> None:
    path = tmp_path / "array"
    path.write_bytes(GOOD)
    assert load_idx(path, limit=6).numel() == 6
    with pytest.raises(FormatError, match="pass a larger limit="):
        load_idx(path, limit=5)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        load_idx(tmp_path / "train-images-idx3-ubyte.gz")
