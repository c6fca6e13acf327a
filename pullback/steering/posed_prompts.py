"""Prompts posed at their embeddings, and the hidden states and gradients at the last token of every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.edits import Edit, edit
from pullback.core.errors import ModelError
from pullback.core.inputs import read_inputs
from pullback.core.points import widest
from pullback.core.pose import pose
from pullback.core.posed import PosedModel, Variant, gradients_enabled
from pullback.core.problem import Problem
from pullback.core.sites import Site
from pullback.core.targets import Contrast, LogProb

from .blocks import find_blocks
from .pairs import EncodedPair, padded_inputs

__all__ = ["PosedPrompts", "answer_states", "last_gradients", "last_states", "pose_prompts"]


@dataclass(frozen=True, eq=False)
class PosedPrompts:
    """The prompts of a batch, cut at their embeddings, images merged.

    Attributes:
        pairs: which pairs, in the order of the rows.
        problem: log p(preferred) - log p(dispreferred) of the embeddings (B, T, width).
        prompt: the model on the prompts alone.
        blocks: the sites of the blocks' outputs.
        last: (B,) the position of the last token where the blocks run.
        real, image: (B, T) bool, what is no padding, and what comes from an image.
        vision_once: False where images are not merged into the sequence, so that every pass sees them again.
    """

    pairs: Sequence[EncodedPair]
    problem: Problem
    prompt: PosedModel
    blocks: tuple[Site, ...]
    last: Tensor
    real: Tensor
    image: Tensor
    vision_once: bool

    @property
    def embeddings(self) -> Tensor:
        """(B, T, width)."""
        assert isinstance(self.problem.point, Tensor)
        return self.problem.point

    @property
    def examples(self) -> Tensor:
        """The number of each row."""
        return torch.arange(len(self.pairs))


@dataclass(frozen=True)
class _Numbered:
    """Answers under made-up names, for targets that encode texts; without the mask token that the real one may have."""

    answers: Mapping[str, tuple[int, ...]]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.answers[text])

    def decode(self, ids: Sequence[int]) -> str:
        return str([int(token) for token in ids])


def pose_prompts(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    *,
    blocks: str | None = None,
    chunk: int | str = "auto",
    whole_answers: bool = False,
) -> PosedPrompts:
    """Pose the contrast of each pair's answers at the prompts' embeddings.

    Images go through the vision tower once: the embeddings they are merged into are put in place of the text's, without
    pixels, if that gives the score it gave with them. ``whole_answers`` also runs the last token of each answer.

    Raises what ``pullback.pose`` raises.
    """
    inputs = padded_inputs(model, tokenizer, pairs)
    target = _contrast(pairs, whole_answers)
    pixels = {name for name, leaf in inputs.items() if leaf.is_floating_point() and not name.endswith("mask")}
    once = True
    if not pixels:
        problem = pose(model, inputs, target=target, site="embeddings", chunk=chunk)
        image = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    else:
        first = LogProb([pair.preferred[0] for pair in pairs])
        seen = pose(model, inputs, target=first, site="embeddings", chunk=chunk)
        rest = {name: leaf for name, leaf in inputs.items() if name not in pixels}
        unseen = _without_pixels(model, rest, first, seen)
        if unseen is not None:
            assert isinstance(seen.point, Tensor)
            assert isinstance(unseen.point, Tensor)
            image = (seen.point != unseen.point).any(-1).cpu()
            problem = pose(model, rest, target=target, site="embeddings", chunk=chunk).at(seen.point)
            inputs = rest
        else:
            once = False
            image = _image_positions(model, tokenizer, inputs["input_ids"])
            problem = pose(model, inputs, target=target, site="embeddings", chunk=chunk)
    module = problem.posed.module
    if not isinstance(module, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    paths = {id(part): path for path, part in module.named_modules()}
    sites = tuple(Site("module", paths[id(block)]) for block in find_blocks(module, blocks).modules)
    prompt = replace(problem.posed, variants=[Variant(read_inputs(inputs, module))], paired=False)
    lengths = torch.tensor([len(pair.ids) for pair in pairs])
    real = torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
    last = lengths - 1
    if "decoder_input_ids" in inputs:
        last = torch.full_like(last, inputs["decoder_input_ids"].shape[1] - 1)
    return PosedPrompts(pairs, problem, prompt, sites, last, real, image & real, once)


def last_states(posed: PosedPrompts, embeddings: Tensor) -> Tensor:
    """The hidden state that leaves each block at the prompt's last token: (B, block, width), float64, on the CPU.

    Read by hooks, so that the last one is before the final norm, where a vector is added. Cost: one forward.
    """
    (found,) = _read(posed, posed.prompt, embeddings, [posed.last])
    return found


def answer_states(posed: PosedPrompts) -> tuple[Tensor, Tensor]:
    """As ``last_states``, at the last token of the preferred and of the dispreferred answer."""
    positions = [
        posed.last + torch.tensor([len(pair.preferred) for pair in posed.pairs]),
        posed.last + torch.tensor([len(pair.dispreferred) for pair in posed.pairs]),
    ]
    preferred, dispreferred = _read(posed, posed.problem.posed, posed.embeddings, positions)
    return preferred, dispreferred


def last_gradients(posed: PosedPrompts) -> Tensor:
    """The derivative of the contrast in each block's output at the prompt's last token: (B, block, width), float64.

    Where the answers run in two forwards, the sum of theirs. Cost: one forward and backward pass of each answer.
    """
    model = posed.problem.posed
    values: list[list[Tensor]] = [[] for _ in posed.blocks]

    def keeper(block: int) -> Edit:
        def keep(value: Tensor, call: int) -> Tensor:
            values[block].append(value)
            return value.clone()  # what follows may work in place

        return keep

    edits = [(site, keeper(block)) for block, site in enumerate(posed.blocks)]
    assert isinstance(model.module, nn.Module)
    with model.lock, gradients_enabled():
        variables = posed.embeddings.detach().clone().requires_grad_()
        with edit(model.module, edits):
            scores = model.scores(variables, posed.examples, torch.zeros_like(posed.examples))
        flat = [value for each in values for value in each]
        found = iter(torch.autograd.grad(scores.sum(), flat, allow_unused=True))
    gradients = []
    for each in values:
        parts = [(next(found), value) for value in each]
        rows = [
            torch.zeros_like(_at(value, posed.last)) if gradient is None else _at(gradient, posed.last)
            for gradient, value in parts
        ]
        gradients.append(torch.stack(rows).sum(0))
    return torch.stack(gradients, 1)


def _read(
    posed: PosedPrompts, model: PosedModel, embeddings: Tensor, positions: list[Tensor]
) -> list[Tensor]:
    """Hidden states (B, block, width) of each of the model's forwards at its positions."""
    found: dict[tuple[int, int], Tensor] = {}

    def reader(block: int) -> Edit:
        def read(value: Tensor, call: int) -> None:
            found[call, block] = _at(value, positions[call])

        return read

    edits = [(site, reader(block)) for block, site in enumerate(posed.blocks)]
    assert isinstance(model.module, nn.Module)
    with model.lock, torch.inference_mode(False), torch.no_grad(), edit(model.module, edits):
        model.output(embeddings, posed.examples)
    return [
        torch.stack([found[call, block] for block in range(len(edits))], 1) for call in range(len(positions))
    ]


def _at(value: Tensor, positions: Tensor) -> Tensor:
    rows = torch.arange(len(value), device=value.device)
    return widest(value.detach()[rows, positions.to(value.device)]).cpu()


def _contrast(pairs: Sequence[EncodedPair], whole_answers: bool) -> Contrast:
    # a target leaves out the last token, which nothing is predicted from: one more makes it run
    after = (0,) if whole_answers else ()
    answers = {f"+{row}": (*pair.preferred, *after) for row, pair in enumerate(pairs)}
    answers |= {f"-{row}": (*pair.dispreferred, *after) for row, pair in enumerate(pairs)}
    names = list(answers)
    return Contrast(names[: len(pairs)], names[len(pairs) :], _Numbered(answers))


def _without_pixels(
    model: nn.Module, rest: Mapping[str, Tensor], target: LogProb, seen: Problem
) -> Problem | None:
    """The problem without pixels, where the merged embeddings in its place give the same score."""
    try:
        unseen = pose(model, dict(rest), target=target, site="embeddings")
        scores = unseen.at(seen.point).score()
    except (ValueError, TypeError, RuntimeError):
        return None
    wanted = seen.score()
    same = torch.allclose(scores, wanted, rtol=1e-3, atol=1e-4) and not torch.equal(
        torch.as_tensor(seen.point), torch.as_tensor(unseen.point)
    )
    return unseen if same else None


def _image_positions(model: nn.Module, tokenizer: Any, ids: Tensor) -> Tensor:
    for source in (tokenizer, getattr(model, "config", None)):
        for name in ("image_token_id", "image_token_index"):
            token = getattr(source, name, None)
            if isinstance(token, int):
                return (ids == token).cpu()
    return torch.zeros_like(ids, dtype=torch.bool, device="cpu")
