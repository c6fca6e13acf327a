"""Memory of integrated gradients: the lean backward, plain autograd and captum at the same chunk; and checkpointing.

Bytes saved for the backward are those of the distinct storages that autograd keeps after the forward of one chunk,
without the input and the parameters; the peak is the most bytes of tensors alive at once in a whole explanation. Both
are exact and repeat. Times alternate in one process.

    python -m benchmarks.memory [--quick] [--only resnet18,tiny]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import captum.attr
import torch
from torch import Tensor, nn

import pullback as pb
from benchmarks.alternating import alternate, ratio
from benchmarks.models import gpt2, perceptron, resnet18, vit
from pullback.core.lean import lean_backward
from pullback.core.resources import PeakMeter, Resources

STEPS = 32
MIB = 2**20


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Explanations without the lean backward."""
    with patch.object(Resources, "lean_from", lambda self, rows: None):
        yield


def saved_bytes(model: Callable[..., Any], x: Tensor, lean: bool) -> int:
    """Bytes that autograd keeps after a forward, beside the input and the parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    z = x.clone().requires_grad_()
    with (
        lean_backward() if lean else nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        output = model(z)
    for tensor in (z, *own):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once, made while running."""
    with PeakMeter() as meter:
        run()
    return int(meter.peak)


def compare_on(name: str, model: nn.Module, x: Tensor, chunk: int, pairs: int) -> None:
    """Print saved bytes, peaks and times for one convolutional network."""
    print(f"\n## {name}, input {tuple(x.shape[1:])}, chunk {chunk}, {STEPS} steps")
    target = int(model(x).argmax())
    rows = x.expand(chunk, *x.shape[1:]).contiguous()
    trainable = saved_bytes(model, rows, lean=False)
    model.requires_grad_(False)
    lean, frozen = (saved_bytes(model, rows, lean=each) for each in (True, False))
    model.requires_grad_(True)
    print(
        f"  saved for the backward: lean {lean / MIB:.1f} MiB, plain {frozen / MIB:.1f}, "
        f"trainable {trainable / MIB:.1f}; lean / plain {lean / frozen:.3f}"
    )
    method = pb.IntegratedGradients(steps=STEPS, baseline=pb.Zeros())

    def ours() -> Any:
        return pb.explain(model, x, target=target, method=method, chunk=chunk).values

    def plain() -> Any:
        with plain_autograd():
            return ours()

    def peer() -> Any:
        engine = captum.attr.IntegratedGradients(model)
        return engine.attribute(x, target=target, n_steps=STEPS, internal_batch_size=chunk)

    peaks = {way.__name__: peak_bytes(way) for way in (ours, plain, peer)}
    print(
        f"  peak: lean {peaks['ours'] / MIB:.1f} MiB, plain {peaks['plain'] / MIB:.1f}, captum "
        f"{peaks['peer'] / MIB:.1f}; lean / plain {peaks['ours'] / peaks['plain']:.3f}, "
        f"lean / captum {peaks['ours'] / peaks['peer']:.3f}"
    )
    print(f"  equal to the bit: {torch.equal(ours(), plain())}")
    seconds = alternate({"lean": ours, "plain": plain, "captum": peer}, pairs)
    for other in ("plain", "captum"):
        print("  time " + str(ratio(seconds, "lean", other)))


def checkpointing(name: str, model: nn.Module, inputs: Any, chunk: int, pairs: int) -> None:
    """Print peaks and times of a transformer with and without block checkpointing."""
    print(f"\n## {name}, chunk {chunk}: block checkpointing")
    blocks = pb.checkpointed(model)
    method = pb.IntegratedGradients(steps=STEPS, baseline=pb.Zeros())

    def explain(which: nn.Module) -> Any:
        return pb.explain(which, inputs, target=1, method=method, chunk=chunk).values

    ways: dict[str, Callable[[], Any]] = {
        "checkpointed": lambda: explain(blocks),
        "plain": lambda: explain(model),
    }
    peaks = {way: peak_bytes(run) for way, run in ways.items()}
    print(
        f"  peak: {peaks['checkpointed'] / MIB:.1f} MiB, plain {peaks['plain'] / MIB:.1f}; "
        f"ratio {peaks['checkpointed'] / peaks['plain']:.3f}"
    )
    print(f"  equal to the bit: {torch.equal(explain(blocks), explain(model))}")
    print("  time " + str(ratio(alternate(ways, pairs), "checkpointed", "plain")))


def small_convolutional() -> tuple[nn.Module, Tensor]:
    """A two-layer convolutional network on 16 pixels."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(200, 4)).eval(), torch.randn(1, 1, 16, 16)


def main() -> None:
    """Run everything and print ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="three pairs only, to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="parts, comma-separated: resnet18,mid,tiny,vit,gpt2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    pairs = 3 if options.quick else 20
    wanted = options.only.split(",") if options.only else ["resnet18", "mid", "tiny", "vit", "gpt2"]
    if "resnet18" in wanted:
        compare_on("ResNet-18", *resnet18(), 16, pairs)
    if "mid" in wanted:
        compare_on("ResNet-18, small images", resnet18()[0], torch.randn(1, 3, 32, 32), 16, pairs)
    if "tiny" in wanted:
        compare_on("perceptron", *perceptron(), STEPS, 5 * pairs)
        compare_on("small convolutional network", *small_convolutional(), STEPS, 5 * pairs)
    for make in (vit, gpt2):
        if make.__name__ in wanted:
            model, inputs = make()
            checkpointing(make.__name__, model, inputs, 16, pairs)


if __name__ == "__main__":
    main()
