"""The memory-lean backward: equal to the native one to the bit, from a fraction of its memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.lean import SMALLEST, lean_backward

Run = Callable[[Tensor], Tensor]

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.to(memory_format=formats[x.dim()]) if x.dim() in formats else x
    if layout == "sliced":
        return F.pad(x, (1, 2))[..., 1:-2]
    if layout == "transposed":
        return x.transpose(-1, 1).contiguous().transpose(-1, 1)
    return x


def value_and_gradient(run: Run, x: Tensor, covector_layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    # multiplied by one so that an in-place first operation does not meet a leaf
    x = x.detach().requires_grad_()
    value = run(x * 1)
    covector = laid_out(draw(*value.shape, dtype=value.dtype, seed=1), covector_layout)
    return value.detach(), torch.autograd.grad(value, x, covector)[0]


def is_lean(run: Run, x: Tensor) -> bool:
    """Whether any step of the graph is one of ours."""
    pending, found = [run(x.detach().requires_grad_() * 1).grad_fn], False
    while pending:
        node = pending.pop()
        if node is not None:
            found = found or type(node).__module__ == "pullback.core.lean" or hasattr(node, "_forward_cls")
            pending += [following for following, _ in node.next_functions]
    return found


def require_equal(run: Run, x: Tensor, *, lean: bool = True) -> None:
    for layout in ("contiguous", "channels_last", "transposed"):
        wanted = value_and_gradient(run, x, layout)
        with lean_backward(0):
            assert is_lean(run, x) is lean
            found = value_and_gradient(run, x, layout)
        for ours, native in zip(found, wanted, strict=True):
            assert torch.equal(ours, native)
            assert ours.stride() == native.stride()
            assert ours.dtype == native.dtype
        assert wanted[1].abs().sum() > 0


LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]
CONVOLUTIONS: dict[str, dict[str, int]] = {
    "plain": {},
    "strided": {"stride": 2},
    "padded": {"padding": 2},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "all": {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, layout: str, dtype: torch.dtype) -> None:
    for n, transposed, biased in itertools.product((1, 2, 3), (False, True), (False, True)):
        options = CONVOLUTIONS[name]
        if transposed:
            options = {**options, **({"output_padding": 1} if "stride" in options else {})}
        run = getattr(F, f"conv_transpose{n}d" if transposed else f"conv{n}d")
        groups = options.get("groups", 1)
        weight = draw(4, 8 // groups if transposed else 4 // groups, *[3] * n, dtype=dtype, seed=2)
        bias = draw(8 if transposed else 4, dtype=dtype, seed=3) if biased else None
        x = laid_out(draw(2, 4, *[9, 8, 10][:n], dtype=dtype), layout)
        require_equal(lambda z, run=run, weight=weight, bias=bias, o=options: run(z, weight, bias, **o), x)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [2, 3])
def test_padding_by_name(padding: str, size: int) -> None:
    layer = nn.Conv2d(3, 4, size, padding=padding, dilation=(3, 1)).requires_grad_(False)
    # an even kernel pads one side first, which is left to torch
    require_equal(layer, draw(2, 3, 9, 9), lean=not (padding == "same" and size == 2))


@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_convolution_as_in_residual_networks(batch: int, kernel: int) -> None:
    """Sizes at which the CPU chooses other kernels."""
    layer = nn.Conv2d(16, 32, kernel, 2, kernel // 2, bias=False).requires_grad_(False)
    require_equal(layer, draw(batch, 16, 28, 28))
    require_equal(layer, laid_out(draw(batch, 16, 28, 28), "channels_last"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (3, 6, 5, 8), (2, 6, 3, 4, 5)])
def test_batch_norm(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = laid_out(draw(*shape, dtype=dtype), layout if len(shape) > 2 else "contiguous")
    mean, variance = draw(6, dtype=dtype, seed=2), draw(6, dtype=dtype, seed=3).exp()
    weight, bias = draw(6, dtype=dtype, seed=4), draw(6, dtype=dtype, seed=5)
    for affine in ((None, None), (weight, None), (weight, bias)):
        require_equal(lambda z, affine=affine: F.batch_norm(z, mean, variance, *affine, eps=1e-3), x)
    if dtype is torch.bfloat16:
        wide = [each.float() for each in (mean, variance, weight, bias)]
        require_equal(lambda z: F.batch_norm(z, *wide), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu(layout: str, dtype: torch.dtype) -> None:
    x = laid_out(draw(2, 5, 7, 9, dtype=dtype), layout)
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, float("inf")])
    runs: list[Run] = [F.relu, torch.relu, Tensor.relu, torch.relu_, nn.ReLU(inplace=True)]
    for run in runs:
        require_equal(run, x)
        require_equal(lambda z, run=run: run(z + 0.5).sum(1), x)


def test_relu_of_nan_passes_the_gradient_as_natively() -> None:
    x = torch.tensor([float("nan"), 1.0, -1.0]).requires_grad_()
    with lean_backward(0):
        (gradient,) = torch.autograd.grad(torch.relu(x), x, torch.ones(3))
    assert gradient.tolist() == torch.autograd.grad(torch.relu(x), x, torch.ones(3))[0].tolist() == [1, 1, 0]


def test_relu_in_place_on_a_view_is_left_to_torch() -> None:
    def run(z: Tensor) -> Tensor:
        z[:, :2].relu_()
        return z

    require_equal(run, draw(3, 4), lean=False)


POOLINGS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 2},
    "residual": {"kernel_size": 3, "stride": 2, "padding": 1},
    "overlapping": {"kernel_size": 3, "stride": 1},
    "dilated": {"kernel_size": 3, "stride": 1, "dilation": 2, "padding": 1},
    "ceil": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "all": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POOLINGS)
def test_max_pool(name: str, layout: str, dtype: torch.dtype) -> None:
    for n in (1, 2, 3):
        x = laid_out(draw(2, 3, *[8, 11, 10][:n], dtype=dtype), layout)
        # ties too
        x = torch.where(x.abs() < 0.3, torch.zeros_like(x), x)
        require_equal(lambda z, n=n: getattr(F, f"max_pool{n}d")(z, **POOLINGS[name]), x)


def test_max_pool_of_uneven_and_large_windows() -> None:
    x = draw(2, 3, 40, 50)
    for kernel in ((2, 5), (17, 16), (40, 50), (20, 3)):
        require_equal(lambda z, kernel=kernel: F.max_pool2d(z, kernel, (1, 3)), x)
    huge = draw(1, 1, 190, 190)
    require_equal(lambda z: F.max_pool2d(z, 185, 1), huge)
    narrow = draw(1, 2, 9, 2)
    require_equal(lambda z: F.max_pool2d(z, 4, 1, 2), narrow)


def saved(run: Run, x: Tensor) -> int:
    """Bytes kept for the backward beside x itself and the parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(x * 1)
    assert output.grad_fn is not None
    own = [*getattr(run, "parameters", list)(), *getattr(run, "buffers", list)()]
    for tensor in (x, *own):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("layer", "bytes_per_output"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), 0),
        (nn.ConvTranspose2d(4, 8, 3, padding=1), 0),
        (nn.BatchNorm2d(4), 0),
        (nn.ReLU(), 1),
        (nn.ReLU(inplace=True), 1),
        (nn.MaxPool2d(3, 2, 1), 1),
        (nn.MaxPool2d(17), 2),
    ],
)
def test_bytes_kept(layer: nn.Module, bytes_per_output: int) -> None:
    layer.eval().requires_grad_(False)
    x = draw(2, 4, 136, 136)
    with lean_backward():
        kept = saved(layer, x)
        assert kept == bytes_per_output * layer(x).numel()
    assert saved(layer, x) >= min(x.nbytes, 4 * layer(x).numel())


def test_small_operations_are_left_to_torch() -> None:
    with lean_backward():
        assert not is_lean(torch.relu, draw(1, SMALLEST - 1))
        assert is_lean(torch.relu, draw(1, SMALLEST))


def test_trainable_parameters_keep_their_gradients() -> None:
    x = draw(2, 4, 8, 8).requires_grad_()
    for layer in (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval()):
        native = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        with lean_backward(0):
            ours = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(ours, native, strict=True))


def test_batch_statistics_are_left_to_torch() -> None:
    x = draw(4, 3, 5)
    require_equal(lambda z: F.batch_norm(z, None, None, training=True), x, lean=False)


def test_transforms_autocast_and_forward_mode_are_left_to_torch() -> None:
    layer = nn.Conv2d(3, 4, 3).requires_grad_(False)
    x = draw(2, 3, 6, 6)

    def score(z: Tensor) -> Tensor:
        return layer(z).relu().sum()

    wanted = torch.func.vmap(torch.func.grad(lambda z: score(z[None])))(x)
    tangent = torch.func.jvp(score, (x,), (torch.ones_like(x),))[1]
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradient(lambda z: layer(z).float(), x)
    with lean_backward(0):
        assert torch.equal(torch.func.vmap(torch.func.grad(lambda z: score(z[None])))(x), wanted)
        assert torch.equal(torch.func.jvp(score, (x,), (torch.ones_like(x),))[1], tangent)
        with torch.autocast("cpu", torch.bfloat16):
            found = value_and_gradient(lambda z: layer(z).float(), x)
        assert all(torch.equal(a, b) for a, b in zip(found, cast, strict=True))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(score(dual)).tangent, tangent)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_second_derivatives(layout: str) -> None:
    """Of a square after each operation; they are right, not refused."""
    norm = nn.BatchNorm2d(4).eval().double()
    nn.init.normal_(norm.weight)
    layers = [nn.Conv2d(3, 4, 3).double(), norm, nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers).requires_grad_(False)
    x = laid_out(draw(2, 3, 8, 8, dtype=torch.float64), layout).requires_grad_()

    def curvature() -> Tensor:
        (first,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    wanted = curvature()
    with lean_backward(0):
        assert torch.equal(curvature(), wanted)
    assert wanted.abs().sum() > 0
