"""Steering: closed forms at the block's output, what is restored, threads, and what is refused."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback import MethodError, ModelError
from pullback.core.errors import SiteError
from pullback.steering import SteeringVector, find_blocks
from tests.steering.models import DECODERS, OTHERS, block_outputs, built, hooks, random_vector


def by_hand(h: Tensor, v: Tensor, step: Any, preserve: bool = True) -> Tensor:
    moved = h + step * v.to(h)
    return moved / moved.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True) if preserve else moved


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_every_architecture_is_steered_at_the_blocks_output(name: str) -> None:
    """Tensor and tuple outputs, state spaces, decoders of pairs, vision-language models: row 1 like row 0."""
    model, inputs = built(name)
    vector = random_vector(model, [1])
    plain = block_outputs(model, **inputs)
    with torch.no_grad():
        logits, before = (
            model(**inputs).logits,
            hooks(model),
        )  # transformers has hooks of its own in vision towers
        with vector.apply(model, 0.0) as steering:
            assert torch.equal(model(**inputs).logits, logits)
    assert steering.statistics.layers == {}
    with vector.apply(model, 0.4) as steering:
        steered = block_outputs(model, **inputs)
    assert torch.equal(steered[0], plain[0])
    norm = plain[1].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(
        steered[1], by_hand(plain[1], vector.directions[1], 0.4 * norm), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(steered[1].norm(dim=-1, keepdim=True), norm, rtol=1e-6, atol=0.0)
    assert (steered[1] - plain[1]).norm(dim=-1).min() > 0.1 * norm.min()
    assert steering.statistics.layers[1].tokens == plain[1].shape[0] * plain[1].shape[1]
    assert hooks(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("scale", ["relative", "fit", "absolute"])
@pytest.mark.parametrize("preserve", [True, False])
def test_scales_and_statistics(scale: Any, preserve: bool) -> None:
    model, inputs = built("llama", double=True)
    vector = random_vector(model, [0])
    (h, _), v = block_outputs(model, **inputs), vector.directions[0]
    assert vector.scales[0] == pytest.approx(3.0 * 32**0.5, rel=0.5)
    r = {"relative": h.norm(dim=-1, keepdim=True), "fit": vector.scales[0], "absolute": 1.0}[scale]
    with vector.apply(model, -0.7, scale=scale, preserve_norm=preserve) as steering:
        out = block_outputs(model, **inputs)[0]
    torch.testing.assert_close(out, by_hand(h, v, -0.7 * r, preserve), rtol=1e-12, atol=1e-12)
    seen = steering.statistics.layers[0]
    cosine = torch.nn.functional.cosine_similarity(h, out, dim=-1).clamp(-1, 1)
    assert seen.mean_angle == pytest.approx(float(cosine.acos().rad2deg().mean()), rel=1e-6)
    assert seen.mean_displacement == pytest.approx(
        float(((out - h).norm(dim=-1) / h.norm(dim=-1)).mean()), rel=1e-6
    )
    with (2.0 * vector).apply(model, -0.35, scale=scale, preserve_norm=preserve):
        torch.testing.assert_close(block_outputs(model, **inputs)[0], out, rtol=1e-6, atol=1e-7)


def test_half_precision_keeps_the_norm_as_well_as_it_can() -> None:
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        model, inputs = built("llama")
        model = model.to(dtype)
        plain = block_outputs(model, **inputs)
        with random_vector(model, [1]).apply(model, 0.5):
            steered = block_outputs(model, **inputs)
        assert steered[1].dtype == dtype
        torch.testing.assert_close(
            steered[1].float().norm(dim=-1), plain[1].float().norm(dim=-1), rtol=tolerance, atol=0
        )


def test_nested_contexts_add_up_where_steps_do_not_depend_on_the_state() -> None:
    model, inputs = built("gpt2", double=True)
    v, w = random_vector(model, [0], seed=1), random_vector(model, [0, 1], seed=2)
    settings: dict[str, Any] = {"scale": "absolute", "preserve_norm": False}
    with v.apply(model, 0.5, **settings), w.apply(model, 2.0, **settings):
        nested = block_outputs(model, **inputs)
    with (0.5 * v + 2.0 * w).apply(model, 1.0, **settings):
        summed = block_outputs(model, **inputs)
    torch.testing.assert_close(nested, summed, rtol=1e-6, atol=1e-6)
    with v.apply(model, 0.5), w.apply(model, 2.0):  # two turns, the second from where the first led
        turned = block_outputs(model, **inputs)[0]
    h = block_outputs(model, **inputs)[0]
    norm = h.norm(dim=-1, keepdim=True)
    expected = by_hand(by_hand(h, v.directions[0], 0.5 * norm), w.directions[0], 2.0 * norm)
    torch.testing.assert_close(turned, expected, rtol=1e-10, atol=1e-10)
    with (v - v).apply(model, 3.0):
        assert torch.equal(block_outputs(model, **inputs)[0], h)


def test_everything_is_as_before_after_an_exception() -> None:
    model, inputs = built("llama")
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    model.register_forward_hook(lambda module, args, output: None)
    before = hooks(model)
    vector = random_vector(model)
    with pytest.raises(RuntimeError, match="mine"), vector.apply(model, 0.4) as steering:
        assert list(model.state_dict()) == keys
        model(**inputs)
        raise RuntimeError("mine")
    assert hooks(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    with steering:
        model(**inputs)
        assert steering.statistics.calls == 2
        with pytest.raises(MethodError, match="open already"), steering:
            pass
        assert hooks(model) > before
    assert hooks(model) == before


def test_a_failing_registration_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = built("llama")
    steering = random_vector(model).apply(model)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(find_blocks(model).modules[1], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        steering.__enter__()
    assert hooks(model) == 0


def test_gradients_flow_through_and_inference_mode_leaves_nothing_behind() -> None:
    model, inputs = built("gpt2", double=True)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with random_vector(model).apply(model, 0.3):
        with torch.inference_mode():
            model(**inputs)

        def score(e: Tensor) -> Tensor:
            return model(inputs_embeds=e).logits[:, -1, 5].sum()  # type: ignore[no-any-return]

        x = embedded.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(x), x)
        direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(3)).double()
        with torch.no_grad():
            slope = (score(embedded + 1e-5 * direction) - score(embedded - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_threads_steer_one_model_in_their_own_ways() -> None:
    model, inputs = built("llama")
    vectors = [random_vector(model, seed=seed) for seed in range(2)]
    with torch.no_grad():
        plain = model(**inputs).logits
        expected = []
        for vector in vectors:
            with vector.apply(model, 0.5):
                expected.append(model(**inputs).logits)
    assert not torch.equal(expected[0], expected[1])
    wrong: list[int] = []
    barrier = threading.Barrier(3)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(10):
            with torch.no_grad():
                if number == 2:
                    same = torch.equal(model(**inputs).logits, plain)
                else:
                    with vectors[number].apply(model, 0.5):
                        same = torch.equal(model(**inputs).logits, expected[number])
            wrong.extend([] if same else [number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert hooks(model) == 0


def test_a_model_run_in_another_thread_only_is_told() -> None:
    model, inputs = built("llama")
    steering = random_vector(model).apply(model)
    thread = threading.Thread(target=lambda: model(**inputs))
    steering.__enter__()
    thread.start()
    thread.join()
    with pytest.warns(UserWarning, match="2 block calls of other threads were left alone"):
        steering.__exit__(None, None, None)
    steering.__enter__()
    with pytest.warns(UserWarning, match="the model was not run"):
        steering.__exit__(None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with random_vector(model).apply(model, 0.0):
            model(**inputs)


def test_compiled_models_are_refused_with_the_way_out() -> None:
    model, inputs = built("llama")
    vector = random_vector(model)
    with pytest.raises(ModelError, match=r"the model is compiled.*vector\.apply\(model\._orig_mod"):
        vector.apply(torch.compile(model, backend="eager"))
    with vector.apply(torch.compile(model, backend="eager")._orig_mod):
        model(**inputs)
    blocks = model.model.layers
    blocks[0] = torch.compile(blocks[0], backend="eager")
    with pytest.raises(
        ModelError, match=r'module "model\.layers\.0" is compiled.*model\.layers\.0\._orig_mod'
    ):
        vector.apply(model)
    blocks[0] = blocks[0]._orig_mod
    model.compile(backend="eager")
    with pytest.raises(ModelError, match=r"set model\._compiled_call_impl = None"):
        vector.apply(model)
    model._compiled_call_impl = None
    model._compiled_call = model.forward
    with pytest.raises(ModelError, match=r"del model\._compiled_call.*disable_compile=True"):
        vector.apply(model)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strength": float("nan")}, r"strength=nan; expected a finite number"),
        ({"strength": "much"}, r"strength='much'"),
        ({"scale": "angle"}, r"expected one of 'relative', 'fit', 'absolute'"),
        ({"scope": "answer"}, r"expected 'all', 'prompt', 'generated' or a bool mask"),
        ({"scope": torch.ones(3)}, r"float32 tensor \(3,\); expected bool \(length,\) or \(batch, length\)"),
        ({"gate": torch.ones(2)}, r"the gate gave torch.float32 \(2,\); expected a bool tensor \(batch,\)"),
        ({"layers": 7}, r"there is no block 7: the model has 2, numbered 0 to 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    model, _ = built("llama")
    with pytest.raises(ValueError, match=text):
        random_vector(model).apply(model, **settings)


class Narrow(nn.Module):
    """Three blocks, whose width no config tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_without_config_and_a_vector_of_another_width() -> None:
    model, x = Narrow(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    vector = random_vector(model, [2], width=4)
    with torch.no_grad(), vector.apply(model, 1.0, scale="absolute", preserve_norm=False):
        steered = model(x)
    torch.testing.assert_close(steered, model(x) + vector.directions[2])
    with (
        pytest.raises(
            SiteError, match=r'block 0 of "layers" returned \(2, 3, 4\).*\(batch, length, 5\) was expected'
        ),
        SteeringVector({0: torch.ones(5)}).apply(model),
    ):
        model(x)
    assert hooks(model) == 0
