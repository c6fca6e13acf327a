"""On CUDA: the same numbers as on the CPU, memory that runs out, autocast, recurrent kernels, random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.conformance.fingerprint import of_process
from tests.models.recurrent import RecurrentClassifier
from tests.single_input import only
from tests.zoo.architectures import ARCHITECTURES, CORE, gpt2, llama, target_of, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
METHODS = {
    "gradient": pb.Gradient(),
    "input x gradient": pb.InputXGradient(),
    "ig": pb.IntegratedGradients(steps=8),
    "ig to a tolerance": pb.IntegratedGradients(tol=0.05),
    "smoothgrad": pb.SmoothGrad(samples=4),
    "smoothgrad of ig": pb.SmoothGrad(pb.IntegratedGradients(steps=3), samples=2),
    "vargrad": pb.VarGrad(samples=4),
    "expected": pb.ExpectedGradients(samples=4),
    "random": pb.RandomAttribution(),
}
# no float64 kernel for the experts' product; a float32 CUDA kernel of its own
LEFT_OUT = ("mixtral", "rwkv")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """TF32 keeps ten bits of a float32, which is no basis for a comparison at 1e-5."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def convolutional() -> nn.Module:
    # smooth, so that no activation boundary can flip between two devices' roundings
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 4)
    )


def moved(inputs: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    if isinstance(inputs, dict):
        return {key: moved(value, dtype, device) for key, value in inputs.items()}
    inputs = inputs.to(dtype) if dtype is not None and inputs.is_floating_point() else inputs
    return inputs if device is None else inputs.to(device)


def assert_near(got: Tensor, wanted: Tensor, relative: float) -> None:
    assert got.device.type == "cuda"
    assert (got.cpu() - wanted).abs().max() <= relative * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("site", [None, "0"])
def test_pictures_equal_the_cpu(method: str, dtype: torch.dtype, site: str | None) -> None:
    model, x = seeded(convolutional).to(dtype), noise(3, 3, 8, 8).to(dtype)
    wanted = pb.explain(model, x, target=1, method=METHODS[method], site=site)
    found = pb.explain(model.to(CUDA), x.to(CUDA), target=1, method=METHODS[method], site=site)
    if method == "random" and site is not None:
        return  # keyed by the content of the site, whose last bits differ
    # a variance squares the relative rounding of small differences
    slack = 10 if method == "vargrad" else 1
    assert_near(only(found), only(wanted), slack * TOLERANCE[dtype])
    assert (found.score.cpu() - wanted.score).abs().max() <= TOLERANCE[dtype] * 10
    assert str(found)
    assert only(found[1]).shape[0] == 1


@pytest.mark.parametrize("method", ["gradient", "ig", "smoothgrad of ig"])
@pytest.mark.parametrize("name", [name for name in CORE if name not in LEFT_OUT])
def test_architectures_equal_the_cpu(name: str, method: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    model, inputs = model.double(), moved(inputs, torch.float64)
    target = target_of(name)
    wanted = pb.explain(model, inputs, target=target, method=METHODS[method])
    found = pb.explain(model.to(CUDA), moved(inputs, device=CUDA), target=target, method=METHODS[method])
    # rotary angles and some norms are float32 in transformers, whatever the model's dtype
    assert_near(only(found), only(wanted), 1e-4)


@pytest.mark.parametrize(
    "target", [None, pb.LogProb([3, 4]), pb.Contrast(3, 5), pb.TokenAt(-1), pb.Mean()], ids=repr
)
def test_targets_with_padding_on_cuda(target: Any) -> None:
    model, mask = llama()[0].double(), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    wanted = pb.explain(model, inputs, target=target, method="ig(steps=4)")
    found = pb.explain(model.to(CUDA), moved(inputs, device=CUDA), target=target, method="ig(steps=4)")
    assert_near(only(found), only(wanted), 1e-4)
    assert not only(found)[1, :3].any()
    every = pb.explain_targets(model, moved(inputs, device=CUDA), [3, 4, 5], method="ig(steps=4)")
    assert_near(only(every[1]), only(pb.explain(model.cpu(), inputs, target=4, method="ig(steps=4)")), 1e-4)


def test_text_on_the_cpu_for_a_model_that_moves_it() -> None:
    """accelerate keeps weights on the CPU, computes on CUDA and gives the output back where the input was."""
    accelerate = pytest.importorskip("accelerate")
    wanted = pb.explain(gpt2()[0].double(), tokens(), target=1, method="ig(steps=4)")
    model = accelerate.cpu_offload(gpt2()[0].double(), execution_device=CUDA)
    found = pb.explain(model, tokens(), target=1, method="ig(steps=4)")
    assert_near(only(found), only(wanted), 1e-9)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_draws_are_the_cpus() -> None:
    """A score whose gradient is the point itself shows the noise: the mean over draws, on either device."""

    def half_square(x: Tensor) -> Tensor:
        return x.square().flatten(1).sum(1) / 2

    x, method = noise(2, 3, 5).double(), pb.SmoothGrad(samples=3, noise=0.5)
    wanted = only(pb.explain(half_square, x, method=method))
    found = only(pb.explain(half_square, x.to(CUDA), method=method))
    assert (found.cpu() - x).abs().max() > 0.01
    assert_near(found, wanted, 1e-12)


def test_memory_that_runs_out() -> None:
    """A chunk that cannot fit is halved until it does, and the result is that of small chunks."""
    # about 64 KiB of activations a row, so that the forward fails and not the small sums around it
    model = seeded(lambda: nn.Sequential(nn.Linear(192, 4096), nn.GELU(), nn.Linear(4096, 4))).to(CUDA)
    x, method = noise(4, 192).to(CUDA), pb.SmoothGrad(samples=2048)
    wanted = only(pb.explain(model, x, target=1, method=method, chunk=64))
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() + 192 * 2**20
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.get_device_properties(CUDA).total_memory)
    try:
        found = pb.explain(model, x, target=1, method=method, chunk=8192)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (only(found) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert found.meta["chunk"] < 8192


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_caller(dtype: torch.dtype) -> None:
    model, x = seeded(convolutional).to(CUDA), noise(2, 3, 8, 8).to(CUDA)
    exact = only(pb.explain(model, x, target=1, method="ig(steps=8)"))
    with torch.autocast("cuda", dtype=dtype):
        cast = only(pb.explain(model, x, target=1, method="ig(steps=8)"))
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == dtype
    assert cast.dtype == torch.float32
    assert 0 < (cast - exact).norm() / exact.norm() < 0.15


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_nets_in_eval_mode(kind: type[nn.RNNBase]) -> None:
    """cuDNN has a backward in train mode only; the answer is the eval model's, dropout off."""
    model, x = seeded(lambda: RecurrentClassifier(kind)).double(), noise(2, 5, 3).double()
    wanted = pb.explain(model, x, target=1, method="ig(steps=8)")
    model = model.to(CUDA)
    found = pb.explain(model, x.to(CUDA), target=1, method="ig(steps=8)")
    assert_near(only(found), only(wanted), 1e-10)
    assert not any(module.training for module in model.modules())


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * (1 + 0.1 * torch.randn_like(x)))  # type: ignore[no-any-return]


def test_random_state_of_every_device_is_kept() -> None:
    model, x = seeded(Noisy).to(CUDA), noise(2, 3).to(CUDA)
    torch.cuda.manual_seed_all(7)
    before, process = torch.cuda.get_rng_state_all(), of_process()
    first = only(pb.explain(model, x, target=1, method="smoothgrad(samples=4)"))
    after = torch.cuda.get_rng_state_all()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert of_process() == process
    torch.cuda.manual_seed_all(8)
    assert torch.equal(first, only(pb.explain(model, x, target=1, method="smoothgrad(samples=4)")))
