"""explain_dataset: file i is explain of batch i, whatever the backend and however often it was killed."""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pullback as pb
from pullback.core.errors import FormatError, InputError, SiteError, TaskError
from pullback.dataset_result import joined, shard_name
from tests.killing import kill_after, needs_fork, started

METHOD = pb.SmoothGrad(pb.IntegratedGradients(steps=4), samples=3, seed=1)


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return net.double().eval()


def data(count: int = 11) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _holds(file: Path, lines: int) -> bool:
    return file.exists() and file.read_bytes().count(b"\n") >= lines


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("batch-*.safetensors"))}


def test_every_batch_is_explained_as_explain_does_and_read_lazily(tmp_path: Path) -> None:
    net, x = network(), data()
    result = pb.explain_dataset(net, x.split(4), METHOD, out=tmp_path)
    assert (len(result), result.complete) == (11, True)
    whole = pb.explain(net, x, method=METHOD)
    for number, (batch, part) in enumerate(zip(result.batches(), x.split(4), strict=True)):
        alone = pb.explain(net, part, method=METHOD)
        assert torch.equal(batch.values, alone.values)
        assert torch.equal(pb.load(tmp_path / shard_name(number)).values, alone.values)
    everything = result[:]
    # sums over other batches round differently
    assert torch.allclose(everything.values, whole.values, rtol=1e-12, atol=1e-14)
    assert torch.equal(everything.target, whole.target)
    assert torch.allclose(everything.score, whole.score, rtol=1e-12)
    assert torch.equal(everything.point, x)
    assert everything.method == repr(METHOD)
    order = [10, -11, 5, 3, 3]
    assert torch.equal(result[order].values, everything.values[order])
    assert torch.equal(result[order].point, x[order])
    assert torch.equal(result[4].values, everything.values[4:5])
    assert torch.equal(torch.cat([each.values for each in result]), everything.values)
    assert str(result) == (
        f"<DatasetAttribution of 11 examples in 3 batches by {METHOD!r} in {str(tmp_path)!r}>"
    )
    again = pb.DatasetAttribution(tmp_path)
    assert torch.equal(again[-1].values, everything.values[-1:])


def test_labels_of_a_data_loader_are_left_out_and_the_random_state_stays(tmp_path: Path) -> None:
    net, x = network(), data()
    y = torch.arange(11) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    result = pb.explain_dataset(net, loader, "gradient", out=tmp_path / "predicted")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(result[:].target, net(x).argmax(1))
    asked = pb.explain_dataset(
        net, loader, "gradient", out=tmp_path / "asked", target_of=lambda batch: batch[1]
    )
    assert torch.equal(asked[:].target, y)
    assert torch.equal(asked[:].values, pb.explain(net, x, method="gradient", target=y).values)
    scaled = pb.explain_dataset(
        net, loader, "gradient", out=tmp_path / "scaled", inputs_of=lambda batch: 2 * batch[0], target=1
    )
    assert torch.equal(scaled[:].point, 2 * x)
    assert set(scaled[:].target.tolist()) == {1}


def test_a_finished_batch_is_not_explained_again(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(x.detach().sum()))
            return self.net(x)

    seen: list[float] = []
    net, x = Counting(), data()

    def interrupted() -> Iterator[Tensor]:
        yield from x.split(4)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pb.explain_dataset(net, interrupted(), "gradient", out=tmp_path)
    half = pb.DatasetAttribution(tmp_path)
    assert (len(half), half.complete) == (8, False)
    assert "interrupted" in repr(half)
    times = (tmp_path / "times.jsonl").read_text()
    seen.clear()
    result = pb.explain_dataset(net, x.split(4), "gradient", out=tmp_path)
    assert result.complete
    assert set(seen) == {float(x[8:].sum())}
    assert (tmp_path / "times.jsonl").read_text().startswith(times)
    lost = tmp_path / shard_name(1)
    before = lost.read_bytes()
    lost.unlink()
    with pytest.raises(FormatError, match=r"batch-000001.safetensors is missing. Run explain_dataset again"):
        result[4]
    pb.explain_dataset(net, x.split(4), "gradient", out=tmp_path)
    assert lost.read_bytes() == before
    seen.clear()
    assert torch.equal(pb.explain_dataset(net, x.split(4), "gradient", out=tmp_path)[:].point, x)
    assert seen == []


@needs_fork
def test_killed_at_random_moments_and_by_two_writers_the_files_are_the_same(tmp_path: Path) -> None:
    net, batches = network(), data(60).split(2)

    def work(folder: str) -> Any:
        return pb.explain_dataset(net, batches, METHOD, out=tmp_path / folder)

    work("whole")
    moments = random.Random(0)
    kills = 0
    for number in range(8):
        # a few batches more each time, then anywhere in the next one
        begun = partial(_holds, tmp_path / "killed" / "batches.jsonl", 3 * number)
        kills += kill_after(moments.uniform(0, 0.01), lambda: work("killed"), begun)
    assert kills >= 4  # all, unless the machine is so busy that the work runs ahead of who kills it
    pids = [started(lambda: work("two")) for _ in range(2)]
    work("two")
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    for folder in ("killed", "two"):
        result = work(folder)
        assert result.complete
        assert contents(tmp_path / folder) == contents(tmp_path / "whole")
        lines = (tmp_path / folder / "batches.jsonl").read_text().splitlines()
        assert sorted(line for line in lines if line.endswith("}")) == sorted(
            (tmp_path / "whole" / "batches.jsonl").read_text().splitlines()
        )


def test_no_more_batches_live_than_are_worked_on(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def loader() -> Iterator[Tensor]:
        nonlocal most
        for _ in range(20):
            batch = torch.rand(2, 5, dtype=torch.float64)
            alive.append(weakref.ref(batch))
            most = max(most, sum(one() is not None for one in alive))
            yield batch

    pb.explain_dataset(network(), loader(), "gradient", out=tmp_path)
    assert most <= 3


def test_texts_of_other_lengths_are_read_one_at_a_time(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    result = pb.explain_dataset(net, [torch.rand(2, 1, 9), torch.rand(1, 1, 8)], "gradient", out=tmp_path)
    assert [tuple(each.values.shape) for each in result.batches()] == [(2, 1, 9), (1, 1, 8)]
    with pytest.raises(InputError, match=r"values of shapes \(1, 8\) and \(1, 9\) were asked for together"):
        result[:]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    net, x = network(), data()
    folder = tmp_path / "a"

    def explained(batches: Any = None, method: Any = "gradient", model: Any = net, **more: Any) -> Any:
        return pb.explain_dataset(model, batches or x.split(4), method, out=more.pop("out", folder), **more)

    explained()
    other = network()
    other[0].weight.data[0, 0] += 1  # type: ignore[index,union-attr,operator]
    cases = [
        ({"method": "smoothgrad"}, r"holds attributions whose method is 'Gradient\(\)'; \"SmoothGrad\("),
        ({"model": other}, "holds attributions whose model is '"),
        ({"target": 1}, "holds attributions whose target is None; '1' was given"),
        ({"batches": x.split(5)}, "Batch 0 of the loader is not the batch 0 that"),
        ({"batches": x.flip(0).split(4)}, "a loader with shuffle=False and the same batch size"),
        ({"batches": x[:8].split(4)}, "The loader has 2 batches, and .* holds 3"),
        ({"batches": [*x.split(4), x[:1]]}, "The loader has more batches than .*, which is finished with 3"),
        ({"resume": False}, r"holds \d batches of this run and resume=False was given"),
    ]  # fmt: skip
    for more, message in cases:
        with pytest.raises(FormatError, match=message):
            explained(**more)
    with pytest.raises(InputError, match="The loader has no batches"):
        pb.explain_dataset(net, [], "gradient", out=tmp_path / "b")
    with pytest.raises(InputError, match="A batch is a list of 3"):
        explained([[x, x, x]], out=tmp_path / "c")
    with pytest.raises(InputError, match=r"backend='threads' was given. "):
        explained(backend="threads", out=tmp_path / "d")
    with pytest.raises(FormatError, match=r"has no dataset.json. Expected the out= of explain_dataset"):
        pb.DatasetAttribution(tmp_path)
    with pytest.raises(InputError, match=r"No examples were asked for. Expected at least one of 11"):
        pb.DatasetAttribution(folder)[[]]
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(FormatError, match="is damaged, or of another version"):
        pb.DatasetAttribution(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(FormatError, match=r"a batches.jsonl without a dataset.json"):
        explained()


def test_a_batch_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    net, x = network(), data()
    broken = x.clone()
    broken[9] = float("nan")
    with pytest.raises(
        TaskError, match=r"Batch 2 failed \(InputError: .*The 2 finished ones are kept"
    ) as caught:
        pb.explain_dataset(net, broken.split(4), "gradient", out=tmp_path)
    assert isinstance(caught.value.__cause__, InputError)
    assert len(pb.DatasetAttribution(tmp_path)) == 8
    pb.explain_dataset(net, x.split(4), "gradient", out=tmp_path)
    with pytest.raises(TaskError, match="Batch 0 failed") as unknown:
        pb.explain_dataset(net, x.split(4), "gradient", out=tmp_path / "site", site="nowhere")
    assert isinstance(unknown.value.__cause__, SiteError)


def test_what_differs_between_batches_is_joined_or_named() -> None:
    one = torch.ones(2, 3)
    a = pb.Attribution(one, one, torch.tensor([0, 1]), one.sum(1), "m", "input", None, {"gap": torch.ones(2), "evaluations": 4, "notes": ["a"], "coverage": {"relu": 1}, "odd": torch.ones(3)}, {"labels": ["x", "y"], "model": "M"})  # fmt: skip
    b = pb.Attribution(2 * one[:1], one[:1], torch.tensor([2]), one.sum(1)[:1], "m", "input", None, {"gap": torch.zeros(1), "evaluations": 6, "notes": ["b", "a"], "coverage": {"relu": 1}, "odd": torch.ones(4)}, {"labels": ["z"], "model": "M"})  # fmt: skip
    c = joined([a, b])
    assert c.values[:, 0].tolist() == [1, 1, 2]
    assert c.target.tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert c.diagnostics["gap"].tolist() == [1, 1, 0]
    assert c.diagnostics["evaluations"].tolist() == [4, 4, 6]
    assert c.diagnostics["coverage"] == {"relu": 1}
    assert c.diagnostics["notes"] == ["a", "b", "diagnostics that differ between batches are left out: odd"]
    assert c.labels == ["x", "y", "z"]
    assert c.meta["model"] == "M"
