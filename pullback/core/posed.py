"""A model posed at a site: rows of values in, one score per row out, on a private shadow of the user's model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from .contiguity import contiguous_gradients_behind
from .domain import Domain, domain_rows
from .edits import edit
from .errors import InputError, ModelError, SiteError
from .inputs import ModelInputs
from .overrides import rules_resumed
from .points import Point, leaves, map_leaves, or_zeros, take
from .resources import is_out_of_memory
from .sites import Site
from .targets import Resolved

__all__ = [
    "PosedModel",
    "Variant",
    "free_positions",
    "gradient_of",
    "gradients_enabled",
    "held",
    "kept_random_state",
    "random_state_lock",
]


random_state_lock = threading.RLock()
"""Held by whoever reads, seeds and puts back the global random state, which all threads share."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One call of the model that a target needs: the inputs as given, or with a continuation appended.

    ``kept`` (B, T') marks the positions of a longer sequence that are the prompt's; None where nothing was appended.
    """

    inputs: ModelInputs
    kept: Tensor | None = None


@dataclass(eq=False)
class PosedModel:
    """Everything fixed by ``pose``: the shadow, the inputs, the site, the targets and the clean point.

    ``whole`` asks for the batch in one piece, where a row's draws or statistics depend on its place in the batch.
    ``domain`` says of which coordinates the points are, where the site is in a domain.
    ``lock`` makes one posed model safe to evaluate from several threads: hooks on the shadow are per forward.
    """

    module: Callable[..., Any]
    variants: Sequence[Variant]
    site: Site
    leaf_names: tuple[str, ...]
    point: Point
    targets: tuple[Resolved, ...]
    paired: bool = False
    free: Tensor | None = None
    stochastic: bool = False
    generators: tuple[torch.Generator, ...] = ()
    batch_norms: bool = False
    whole: bool = False
    asked_site: str = "input"
    token_site: bool = False
    tokenizer: Any = None
    domain: Domain | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def inputs(self) -> ModelInputs:
        return self.variants[0].inputs

    @property
    def config(self) -> Any:
        return getattr(self.module, "config", None)

    @property
    def batch(self) -> int:
        return self.inputs.batch

    def output(self, z: Point, examples: Tensor) -> Any:
        """The model's output where the value at the site is z, one row per entry of ``examples``."""
        if self.domain is not None:
            assert isinstance(z, Tensor)
            z = domain_rows(self.domain, examples).synthesis(z)
        try:
            outputs = tuple(self._call(variant, z, examples) for variant in self.variants)
        except (RuntimeError, ValueError, IndexError) as error:
            if (explained := self._without_rows(error, examples)) is None:
                raise
            raise explained from error
        return outputs if self.paired else outputs[0]

    def _without_rows(self, error: Exception, examples: Tensor) -> InputError | None:
        """Where other rows than the whole batch failed and an input has no rows to repeat: what to type instead."""
        everyone = len(examples) == self.batch and bool((examples == torch.arange(self.batch)).all())
        if everyone or isinstance(error, SiteError) or is_out_of_memory(error):
            return None
        rowless = [
            f"{name} {tuple(leaf.shape)}"
            for name, leaf in self.inputs.leaf.items()
            if name not in self.inputs.examples and leaf.dim() > 1
        ]
        if not rowless:
            return None
        return InputError(
            f"the forward failed for {len(examples)} rows though not for the batch of {self.batch}: {error}. "
            f"{', '.join(rowless)} has no row for each example (image patches, for instance), so examples cannot be "
            f"repeated or left out. Pass chunk={self.batch}, which evaluates the batch as it is, or one example."
        )

    def scores(
        self,
        z: Point,
        examples: Tensor,
        asked: Tensor,
        watch: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """One score per row, (R,), differentiable in z. ``asked`` says which target each row is for.

        ``watch`` is shown the model's output before the targets score it.
        """
        place = torch.arange(len(examples))
        if len(self.targets) > 1 and not torch.is_grad_enabled():
            place, first = _same_places(z, examples)
            z, examples = map_leaves(lambda leaf: leaf[first.to(leaf.device)], z), examples[first]
        z = self.held(z, examples)
        output = self.output(z, examples)
        if watch is not None:
            watch(output)
        return self.asked_scores(output, examples, asked, place)

    def asked_scores(
        self, output: Any, examples: Tensor, asked: Tensor, place: Tensor | None = None
    ) -> Tensor:
        """The score each row asks for, (R,), from the model's output; row r lies at row ``place[r]`` of it."""
        if len(self.targets) == 1:
            return self.score_of(0, output, examples)
        every = torch.stack(
            [self.score_of(number, output, examples) for number in range(len(self.targets))], 1
        )
        every = every if place is None else every[place.to(every.device)]
        return every.gather(1, asked.to(every.device)[:, None])[:, 0]

    def score_of(self, number: int, output: Any, examples: Tensor) -> Tensor:
        score = self.targets[number].score(output, examples)
        if self.batch_norms and len(examples) == 1:
            contiguous_gradients_behind(score)
        return score

    def held(self, z: Point, examples: Tensor) -> Point:
        """z with padding kept at its clean value: it never moves, so it never receives attribution."""
        return held(z, take(self.point, examples), self.free, examples)

    def gradients(self, z: Point, examples: Tensor, asked: Tensor) -> tuple[Tensor, Point]:
        """Scores (R,) and their gradients at z. Rows that ask several targets at one place share its forward."""
        if len(self.targets) == 1:
            variables = map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), z)
            scores = self.scores(variables, examples, asked)
            return scores.detach(), gradient_of(scores, variables, self.site)
        place, first = _same_places(z, examples)
        unique = map_leaves(lambda leaf: leaf[first.to(leaf.device)].detach().clone().requires_grad_(), z)
        held = self.held(unique, examples[first])
        output = self.output(held, examples[first])
        scores = torch.empty(
            len(examples), dtype=torch.float64 if leaves(z)[0].device.type != "mps" else torch.float32
        )
        gradient = map_leaves(torch.empty_like, z)
        numbers = asked.unique().tolist()
        for number in numbers:
            rows = (asked == number).nonzero()[:, 0]
            score = self.score_of(number, output, examples[first])
            part = gradient_of(score, unique, self.site, keep=number != numbers[-1])
            scores[rows] = score.detach().to(scores)[place[rows]]

            def fill(into: Tensor, found: Tensor, rows: Tensor = rows) -> Tensor:
                into[rows.to(into.device)] = found[place[rows].to(found.device)]
                return into

            gradient = map_leaves(fill, gradient, part)
        return scores, gradient

    def _call(self, variant: Variant, z: Point, examples: Tensor) -> Any:
        if self.site.kind == "input":
            replaced = z if isinstance(z, dict) else {self.leaf_names[0]: z}
            # cloned so that an in-place first operation does not meet a leaf
            args, kwargs = variant.inputs.rows(
                examples, {name: leaf.clone() for name, leaf in replaced.items()}
            )
            return self._run(args, kwargs)
        assert isinstance(z, Tensor)
        value = z
        used = 0

        def substitute(current: Tensor, call: int) -> Tensor:
            nonlocal used
            used += 1
            if variant.kept is None:
                return value.to(current.dtype).clone()
            kept = variant.kept.to(current.device).index_select(0, examples.to(current.device))
            padded = torch.cat(
                [value, value.new_zeros(len(value), kept.shape[1] - value.shape[1], *value.shape[2:])], 1
            )
            return torch.where(kept.reshape(*kept.shape, *[1] * (current.dim() - 2)), padded, current)

        args, kwargs = variant.inputs.rows(examples, {})
        assert isinstance(self.module, nn.Module)
        with edit(self.module, [(self.site, substitute)]):
            output = self._run(args, kwargs)
        if used != 1:
            raise SiteError(
                f'"{self.site}" ran {used} times in this forward pass but once in the first one: the model takes '
                "another way through its modules at other values, so the site has no fixed place. Choose another site."
            )
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with kept_random_state(0, self.generators) if self.stochastic else nullcontext(), rules_resumed():
            return self.module(*args, **kwargs)


def held(z: Point, clean: Point, free: Tensor | None, examples: Tensor) -> Point:
    """z where it may move, ``free`` (B, T) of each row's example, and the clean value elsewhere."""
    if free is None:
        return z

    def hold(leaf: Tensor, fixed: Tensor) -> Tensor:
        rows = free.to(leaf.device).index_select(0, examples.to(leaf.device))
        return torch.where(rows.reshape(*rows.shape, *[1] * (leaf.dim() - 2)), leaf, fixed)

    return map_leaves(hold, z, clean)


def free_positions(read: ModelInputs, site: Site, point: Point) -> Tensor | None:
    """Where the value may move: token positions that the attention mask calls real. None: everywhere."""
    mask = read.attention_mask
    # embeddings handed in are a sequence of tokens like those looked up
    given = site.kind == "input" and (site.leaf or read.explained[0]) == "inputs_embeds"
    if mask is None or not isinstance(point, Tensor):
        return None
    if not given and (read.token_leaf is None or site.kind == "input"):
        return None
    if point.dim() < 3 or point.shape[:2] != mask.shape or bool(mask.bool().all()):
        return None
    if point.dim() > 3 and point.shape[2] == mask.shape[1]:
        # attention heads before the tokens, as many as there are tokens
        return None
    return mask.bool()


def gradient_of(scores: Tensor, variables: Point, site: Site, keep: bool = False) -> Point:
    """The gradient of the sum of scores with respect to the leaves of a point at the site.

    Raises SiteError where no differentiable path leads from there to the scores.
    """
    if not scores.requires_grad:
        raise SiteError(
            f'the score does not depend on "{site}" through differentiable operations: the forward detaches it, '
            "runs under no_grad, or never uses it. Choose a later site, or another target."
        )
    inputs = leaves(variables)
    try:
        found = torch.autograd.grad(scores.sum(), inputs, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        if (explained := _about_checkpoints(error, site)) is None:
            raise
        raise explained from error
    if all(part is None for part in found):
        raise SiteError(
            f'the score does not depend on "{site}": no path leads from there to the target. '
            "Choose a site before the target, or another target."
        )
    return or_zeros(found, variables)


def _about_checkpoints(error: RuntimeError, site: Site) -> ModelError | SiteError | None:
    """What to do where a backward failed because of gradient checkpoints; None where they are not the reason."""
    if isinstance(error, CheckpointError):
        return SiteError(
            f'"{site}" lies inside a checkpointed block, which runs again in the backward pass without what was put at '
            "the site. Choose a site outside the block, or switch checkpointing off: "
            "model.gradient_checkpointing_disable()."
        )
    if "checkpoint is incompatible" in str(error):
        return ModelError(
            "the model has re-entrant gradient checkpoints, which allow no gradient of a value inside the graph. Use "
            "checkpoint(..., use_reentrant=False), or switch them off: model.gradient_checkpointing_disable()."
        )
    return None


def _same_places(z: Point, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows repeat the place before them: (R,) numbers of distinct places, and the first row of each."""
    fresh = torch.ones(len(examples), dtype=torch.bool)
    same = examples[1:] == examples[:-1]
    for leaf in leaves(z):
        same = same & (leaf[1:] == leaf[:-1]).unsqueeze(1).flatten(1).all(1).to(same.device)
    fresh[1:] = ~same
    return fresh.cumsum(0) - 1, fresh.nonzero()[:, 0]


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Autograd on, whatever the caller's mode is: also inside no_grad and inference_mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def kept_random_state(seed: int | None = None, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """The random state of every device in use, and of a model's own generators, is afterwards as before.

    Seeded inside if a seed is given.
    """
    devices = (
        list(range(torch.cuda.device_count()))
        if torch.cuda.is_available() and torch.cuda.is_initialized()
        else []
    )
    with random_state_lock, torch.random.fork_rng(devices), ExitStack() as stack:
        for own in generators:
            stack.callback(own.set_state, own.get_state())
            own.manual_seed(0 if seed is None else seed)
        if seed is not None:
            # torch.manual_seed would also seed CUDA later, when it is first used, after the state was put back
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield
