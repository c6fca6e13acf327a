"""Files: everything comes back as it was, and nothing but FormatError comes out of a damaged one."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from pullback.core.errors import FormatError
from pullback.result import load
from tests.test_result import assert_same_attribution, attribution


def test_round_trip(tmp_path: Path) -> None:
    complex_point = torch.randn(4, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    a = attribution(
        values={
            "z": torch.randn(4, 5).bfloat16(),
            "x": torch.ones(4, 2, requires_grad=True).T.contiguous().T,
        },
        point={"z": complex_point.conj(), "x": torch.ones(4, 2).half()},
        domain="Fourier(sides='two')",
        diagnostics={
            **attribution().diagnostics,
            "odd": {"$tensor": (1, 2.5, None, True, ("a", [])), "text": "\u2028 \ud83d \x00 é"},
            "floats": [float("nan"), float("inf"), -0.0],
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(3),
            "converged": None,
        },
    )
    a.save(tmp_path / "a.safetensors")
    back = load(tmp_path / "a.safetensors")
    assert_same_attribution(
        back, attribution(**{**vars(a), "values": {k: v.detach() for k, v in a.values.items()}})
    )
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(back.point["z"], complex_point.conj())  # not the conjugate of it


def test_shared_storage_and_text_targets(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    a = attribution(
        values=whole[:, :3], point=whole, target=("a", "b", "c", "d"), diagnostics={"view": whole[:, ::2]}
    )
    a.save(tmp_path / "a")
    assert_same_attribution(load(tmp_path / "a"), a)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    attribution().save(path)
    before = path.read_bytes()
    with pytest.raises(FormatError, match=r"meta\['model'\] is a object.*str\(\.\.\.\)"):
        attribution(meta={"model": object()}).save(path)
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(FormatError, match="nested more than 32 deep"):
        attribution(meta={"deep": deep}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_replace_removes_the_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        attribution().save(tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def header_file(path: Path, metadata: dict[str, str] | None) -> Path:
    header = json.dumps({"__metadata__": metadata} if metadata is not None else {}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def document(**changes: Any) -> dict[str, str]:
    return {"pullback": json.dumps({"format": "pullback.Attribution", "schema": 1, "fields": {}, **changes})}


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (None, "without a pullback document"),
        ({"other": "1"}, "without a pullback document"),
        ({"pullback": "{"}, "not JSON"),
        ({"pullback": "NaN"}, "bare NaN"),
        ({"pullback": "9" * 10_000}, "not JSON"),
        ({"pullback": "[" * 200_000}, "not JSON"),
        ({"pullback": "[" * 500 + "]" * 500}, "holds 'list'"),
        ({"pullback": '"text"'}, "holds 'str'"),
        (
            document(format="pullback.SteeringVector"),
            "holds 'pullback.SteeringVector', not 'pullback.Attribution'",
        ),
        (
            document(schema=2),
            r"schema version 2; this pullback reads version 1.*pip install --upgrade pullback",
        ),
        (document(schema=True), "schema version True"),
        (document(), "damaged"),
        (document(fields=[]), "damaged"),
        (document(fields={"values": {"$tensor": "nowhere", "complex": False}}), "damaged.*nowhere"),
        (document(fields={"values": json.loads("[" * 300 + "]" * 300)}), "nested more than 64 deep"),
    ],
)
def test_wrong_documents(tmp_path: Path, metadata: dict[str, str] | None, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        load(header_file(tmp_path / "a", metadata))


def test_a_document_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attribution().save(tmp_path / "a")
    monkeypatch.setattr("pullback.storage._LONGEST_DOCUMENT", 100)
    with pytest.raises(FormatError, match="the limit is 100"):
        load(tmp_path / "a")


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"PK\x03\x04" + b"\0" * 64, b"\xff" * 64, b"{}" * 20])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FormatError, match=r"not a safetensors file, or is damaged.*Attribution\.save\(\)"):
        load(tmp_path / "a")


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


def test_five_hundred_mutated_files_load_or_raise_format_error(tmp_path: Path) -> None:
    path, damaged = tmp_path / "a", tmp_path / "b"
    attribution(point=torch.ones(4, 2, dtype=torch.complex64)).save(path)
    whole, random_source = path.read_bytes(), random.Random(0)
    length = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for trial in range(500):
        data = bytearray(whole)
        kind = trial % 5
        if kind == 0:
            data = data[: random_source.randrange(len(data))]
        elif kind == 1:
            data[random_source.randrange(length)] = random_source.randrange(256)
        elif kind == 2:  # a digit or letter of the header for another: still JSON, often
            place = random_source.choice([i for i in range(8, length) if chr(data[i]).isalnum()])
            data[place] = ord(random_source.choice("0123456789abt"))
        elif kind == 3:
            start = random_source.randrange(8, length)
            data[start : start + random_source.randrange(1, 9)] = b""
            data[:8] = struct.pack("<Q", length - 8 - (len(whole) - len(data)))
        else:
            start = random_source.randrange(8, length)
            data[start:start] = bytes(random_source.choices(b'[]{}",:$0', k=3))
            data[:8] = struct.pack("<Q", length - 8 + 3)
        damaged.write_bytes(data)
        try:
            load(damaged)
        except FormatError:
            refused += 1
    assert refused > 300  # the rest are valid files with other content


def test_five_hundred_mutated_documents_load_or_raise_format_error(tmp_path: Path) -> None:
    from safetensors.torch import load as read_tensors
    from safetensors.torch import save as write_tensors

    attribution().save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    tensors = read_tensors(data)
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["pullback"]
    random_source = random.Random(1)
    odd = [
        None,
        True,
        7,
        -1.5,
        "text",
        [],
        {},
        [1],
        {"$tensor": "0", "complex": True},
        {"$tuple": 3},
        {"$dict": "ab"},
    ]

    def mutate(node: Any, chance: float) -> Any:
        if random_source.random() < chance:
            return random_source.choice(
                [*odd, {"$tensor": str(random_source.randrange(9)), "complex": False}]
            )
        if isinstance(node, dict):
            return {key: mutate(value, chance) for key, value in node.items()}
        return [mutate(value, chance) for value in node] if isinstance(node, list) else node

    refused = 0
    for _ in range(500):
        fields = mutate(json.loads(text)["fields"], 0.04)
        (tmp_path / "b").write_bytes(write_tensors(tensors, document(fields=fields)))
        try:
            found = load(tmp_path / "b")
        except FormatError:
            refused += 1
        else:
            str(found)
    assert refused > 100
