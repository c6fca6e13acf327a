"""The shadow on real architectures, and under the wrappers that people put around them."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import ModelError
from pullback.core.shadow import shadow
from tests.core.test_shadow import assert_same, fingerprint, leaves
from tests.zoo.architectures import ARCHITECTURES, gpt2, llama, tokens

pytest.importorskip("transformers")


def tensors(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = fingerprint(model)
    built = shadow(model)
    assert built.notes == ()
    assert not built.scripted
    private = built.module
    embeddings: list[Tensor] = []

    def grow(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.requires_grad:  # a router gives several
            return output
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # what follows may work in place

    starts = [
        module
        for module in private.modules()
        if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    ]
    for start in starts:
        start.register_forward_hook(grow)
    output = tensors(private(**inputs))
    reached = [value for value in output.values() if value.requires_grad]
    assert reached
    total = sum(value.sum() for value in reached)
    assert {id(leaf) for leaf in leaves(total)} <= {id(start) for start in embeddings}
    got = torch.autograd.grad(total, [*parameters, *embeddings], allow_unused=True)
    assert all(gradient is None for gradient in got[: len(parameters)])
    assert any(gradient is not None for gradient in got[len(parameters) :])
    assert_same(before, fingerprint(model))

    shared = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    copied = dict(private.named_parameters(remove_duplicate=False)) | dict(private.named_buffers())
    assert {key: value.data_ptr() for key, value in shared.items()} == {
        key: value.data_ptr() for key, value in copied.items()
    }
    assert len(list(private.parameters())) == len(list(model.parameters()))  # tied parameters stay tied
    plain = tensors(shadow(model).module(**inputs))
    frozen = tensors(model.requires_grad_(False)(**inputs))
    for key, value in frozen.items():
        assert torch.equal(plain[key], value), key


def test_generate_is_equal_and_leaves_no_trace() -> None:
    model, inputs = gpt2()
    before = fingerprint(model)
    settings = {"max_new_tokens": 4, "do_sample": False}
    got = shadow(model).module.generate(**inputs, **settings)
    assert_same(before, fingerprint(model))
    assert torch.equal(got, model.generate(**inputs, **settings))


def logits_without_leak(model: nn.Module) -> tuple[Tensor, tuple[str, ...]]:
    """Logits of the shadow and their gradient on fixed embeddings; autograd may reach nothing else."""
    before = fingerprint(model)
    built = shadow(model)
    table = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    embeddings = table[tokens()].requires_grad_()
    output: Tensor = built.module(inputs_embeds=embeddings).logits
    assert all(leaf is embeddings for leaf in leaves(output))
    gradient = torch.autograd.grad(output.sum(), embeddings)[0]
    assert gradient.abs().max() > 0
    assert_same(before, fingerprint(model))
    return torch.cat([output.flatten(), gradient.flatten()]).detach(), built.notes


@pytest.mark.parametrize("where", ["root", "layer", "nested", "in_place", "forward", "hooked"])
def test_compiled_models_are_unwrapped_and_noted(where: str) -> None:
    model, _ = llama()
    expected, _ = logits_without_leak(model)
    names = [name for name, _ in model.named_modules()]
    if where in ("root", "hooked"):
        model = torch.compile(model, backend="eager")
    if where == "nested":
        model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
        model = torch.compile(model, backend="eager")
    if where == "layer":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    if where == "in_place":
        model.model.layers[0].compile(backend="eager")
    if where == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    if where == "hooked":
        model.register_forward_hook(lambda *_: None)
    got, notes = logits_without_leak(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert [name for name, _ in shadow(model).module.named_modules()] == names
    assert len(notes) == (3 if where == "nested" else 1)
    assert all("compile" in note for note in notes)
    assert ("own hooks do not run" in notes[0]) == (where == "hooked")
    fired = []
    private = shadow(model).module
    private.model.layers[0].mlp.register_forward_hook(lambda *_: fired.append(1))
    private(tokens())
    assert fired == [1]


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_is_unwrapped_at_the_root_and_inside() -> None:
    expected, _ = logits_without_leak(llama()[0])
    root = nn.parallel.DistributedDataParallel(llama()[0])
    got, notes = logits_without_leak(root)
    assert torch.equal(got, expected)
    assert notes == ("the model was unwrapped from DistributedDataParallel.",)
    inside = llama()[0]
    inside.model.layers[0] = nn.parallel.DistributedDataParallel(inside.model.layers[0])
    private, notes, _ = shadow(inside)
    assert notes == ("'model.layers.0' was unwrapped from DistributedDataParallel.",)
    assert [name for name, _ in private.named_modules()] == [name for name, _ in llama()[0].named_modules()]


def test_data_parallel_is_unwrapped() -> None:
    got, notes = logits_without_leak(nn.DataParallel(llama()[0]))
    assert torch.equal(got, logits_without_leak(llama()[0])[0])
    assert notes == ("the model was unwrapped from DataParallel.",)


@pytest.mark.usefixtures("process_group")
def test_fully_sharded_models_are_refused_with_the_way_out() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(model[1], mesh=mesh)
    with pytest.raises(ModelError, match=r"'1' is wrapped by FSDP.*full_state_dict=True"):
        shadow(model)
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh))
    with pytest.raises(ModelError, match=r"'weight' is a DTensor.*get_model_state_dict"):
        shadow(model)


def test_peft_lora() -> None:
    peft = pytest.importorskip("peft")
    base, _ = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    got, notes = logits_without_leak(model)
    assert notes == ()
    model.requires_grad_(False)
    assert torch.equal(logits_without_leak(model)[0], got)
    private = shadow(model).module
    private.disable_adapter_layers()
    assert not torch.equal(private(tokens()).logits, model(tokens()).logits)
    with model.disable_adapter():
        assert torch.equal(private(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("offload", ["none", "cpu", "disk", "buffers"])
def test_accelerate_dispatch(offload: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, _ = logits_without_leak(gpt2()[0])
    model, _ = gpt2()
    if offload == "none":
        accelerate.hooks.add_hook_to_module(
            model.transformer.h[0], accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
        )
    elif offload == "disk":
        model = accelerate.disk_offload(
            model, str(tmp_path / "weights"), execution_device=torch.device("cpu")
        )
    else:
        model = accelerate.cpu_offload(
            model, execution_device=torch.device("cpu"), offload_buffers=offload == "buffers"
        )
    weight = model.transformer.h[0].attn.c_attn.weight
    assert weight.is_meta == (offload != "none")
    hook = (
        model.transformer.h[0].attn.c_attn._hf_hook if offload != "none" else model.transformer.h[0]._hf_hook
    )
    before = {name: repr(value) for name, value in vars(hook).items() if name != "weights_map"}
    got, _ = logits_without_leak(model)
    assert torch.equal(got, expected)
    assert {name: repr(value) for name, value in vars(hook).items() if name != "weights_map"} == before
    assert model.transformer.h[0].attn.c_attn.weight is weight
    assert torch.equal(got, logits_without_leak(model)[0])
    assert model(tokens()).logits.shape == (2, 7, 40)


def test_scripts_are_kept_and_noted() -> None:
    script = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    assert shadow(script).module is script
    private, notes, scripted = shadow(nn.Sequential(nn.Linear(3, 3), script))
    assert scripted
    assert private[1] is script
    assert notes == ("'1' is a ScriptModule and was kept as it is: it cannot be hooked inside.",)


def test_lazy_modules_and_non_modules_are_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ModelError, match=r"'0\.weight' is an uninitialised.*Run the model once first"):
        shadow(model)
    model(torch.ones(1, 3))
    assert shadow(model).module[0].in_features == 3
    with pytest.raises(ModelError, match=r"is a function; expected a torch\.nn\.Module.*Wrap"):
        shadow(lambda x: x)  # type: ignore[arg-type]


def test_building_while_another_thread_adds_and_removes_hooks() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(6)]).eval()
    x, stop, errors = torch.randn(2, 3), threading.Event(), []
    expected = model(x)

    def disturb() -> None:
        while not stop.is_set():
            handles = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
            model.note = [1]
            for handle in handles:
                handle.remove()
            del model.note

    def build() -> None:
        try:
            for _ in range(60):
                torch.testing.assert_close(shadow(model).module(x), expected, rtol=1e-5, atol=1e-6)
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        other = threading.Thread(target=disturb)
        builders = [threading.Thread(target=build) for _ in range(3)]
        for thread in (other, *builders):
            thread.start()
        for thread in builders:
            thread.join()
        stop.set()
        other.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert not any(module._forward_hooks for module in model.modules())
