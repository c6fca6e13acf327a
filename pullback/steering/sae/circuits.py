"""Sparse feature circuits at node level: which latents carry a behaviour, and what is left of it with them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pullback.attribution.patching.posing import pose_pair
from pullback.attribution.patching.scores import Direction, Method, patching_scores
from pullback.core.errors import InputError, MethodError

from .latent_site import Latents
from .model import SparseAutoencoder

__all__ = ["CircuitCurve", "LatentEffects", "Node", "circuit_curve", "latent_effects"]

_ABLATIONS = ("corrupted", "mean", "zero")


class Node(NamedTuple):
    """A latent, or with ``latent`` None the error, at a site; ``position`` None counts all positions as one node.

    ``effect`` is the mean over examples, in the metric's unit.
    """

    site: str
    position: int | None
    latent: int | None
    effect: float


@dataclass(frozen=True, eq=False)
class LatentEffects:
    """Effects of every node: by site ``latents`` (B, T, n) and ``errors`` (B, T), in the metric's unit."""

    latents: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    method: str

    def table(self, per_position: bool = False) -> dict[str, Tensor]:
        """Mean effects over examples by site, (T or 1, n + 1): latents, then the error."""
        found = {}
        for site, latents in self.latents.items():
            both = torch.cat([latents, self.errors[site].unsqueeze(-1)], -1).mean(0)
            found[site] = both if per_position else both.sum(0, keepdim=True)
        return found

    def ranked(self, count: int | None = None, per_position: bool = False) -> list[Node]:
        """The nodes with the largest mean effects, by absolute value; all of them without ``count``."""
        table = self.table(per_position)
        nodes: list[Node] = []
        for site, effects in table.items():
            last = effects.shape[1] - 1
            largest = effects.flatten().abs().argsort(descending=True, stable=True)[:count]
            for flat in largest.tolist():
                position, latent = divmod(flat, last + 1)
                nodes.append(
                    Node(
                        site,
                        position if per_position else None,
                        None if latent == last else latent,
                        float(effects[position, latent]),
                    )
                )
        return sorted(nodes, key=lambda node: -abs(node.effect))[:count]


class CircuitCurve(NamedTuple):
    """Faithfulness F(C) and completeness F(M without C) of circuits of ``sizes`` nodes, and the metric's means.

    ``full`` is m(M), the model's; ``empty`` m(nothing), with every node ablated.
    """

    sizes: list[int]
    faithfulness: list[float]
    completeness: list[float]
    full: float
    empty: float


def latent_effects(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    metric: Any,
    autoencoders: Mapping[str, SparseAutoencoder],
    method: Method = "relp",
    direction: Direction = "noise",
    *,
    selection: Literal["topk", "gradient"] | None = None,
    **settings: Any,
) -> LatentEffects:
    """The effect of each latent and error node on a metric, by patching between two runs.

    Direction "noise" is m(clean run, node as in the corrupted run) - m(clean run), exactly or to first order;
    ``patching_scores`` says how each method finds it. Its "ig" walks a line between the inputs, not, as in the
    paper, between a node's two values.

    Args:
        model, clean, corrupted, metric, method, direction: as in ``patching_scores``; values (B, T, width).
        autoencoders: by site, such as {"transformer.h.8": autoencoder}.
        selection: "topk" for gradient-free latents of a g-SAE.
        settings: of ``patching_scores``, such as steps=20 or uncovered="gradient".

    Raises the errors of ``patching_scores``; InputError without autoencoders.

    Cost: as ``patching_scores``; "exact" one forward per latent, position and example that differs.

    Source: Marks et al. 2025 (arXiv 2403.19647), section 3; Jafari et al. 2025 for "relp".

    Example:
        >>> from pullback.steering.sae import SparseAutoencoderConfig
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).eval()
        >>> autoencoders = {"0": SparseAutoencoder(SparseAutoencoderConfig(4, latents=8, k=2))}
        >>> x = torch.ones(1, 2, 3)
        >>> effects = latent_effects(net, x, -x, lambda y: y.sum((1, 2)), autoencoders, "atp")
        >>> effects.latents["0"].shape
        torch.Size([1, 2, 8])
    """
    _require_autoencoders(autoencoders)
    latents = {site: Latents(each, "latents", selection).at(site) for site, each in autoencoders.items()}
    errors = {site: Latents(each, "error", selection).at(site) for site, each in autoencoders.items()}
    heads = {str(latents[site]): each.config.latents for site, each in autoencoders.items()}
    found = patching_scores(
        model,
        clean,
        corrupted,
        metric,
        [*latents.values(), *errors.values()],
        method,
        direction,
        per_head=heads,
        **settings,
    )
    return LatentEffects(
        {site: found[key] for site, key in latents.items()},
        {site: found[key] for site, key in errors.items()},
        method,
    )


def circuit_curve(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    metric: Callable[[Any], Tensor] | Any,
    autoencoders: Mapping[str, SparseAutoencoder],
    effects: LatentEffects,
    sizes: Sequence[int],
    *,
    ablation: Literal["corrupted", "mean", "zero"] = "mean",
    per_position: bool = False,
    selection: Literal["topk", "gradient"] | None = None,
    chunk: int | str = "auto",
) -> CircuitCurve:
    """How much of a behaviour circuits of the strongest nodes carry: F(C) = (m(C) - m(0)) / (m(M) - m(0)).

    m(C) is the mean metric of the clean runs with every node outside C ablated at all sites at once; nodes of C
    keep what they compute in that run. Completeness is F of all nodes but C: near 0 where C leaves nothing behind.

    Args:
        effects: of ``latent_effects``, whose ranking makes the circuits.
        sizes: numbers of nodes, errors among them.
        ablation: to the node's "mean" over the clean examples at its position, its "corrupted" value, or "zero".
        per_position: whether a latent at two positions is two nodes.
        selection, chunk: as in ``latent_effects`` and ``patching_scores``.

    Raises InputError where m(M) = m(0), so that there is nothing to share out, and for impossible sizes.

    Cost: two forwards per size and four more.

    Source: Marks et al. 2025 (arXiv 2403.19647), section 3.3.
    """
    _require_autoencoders(autoencoders)
    if ablation not in _ABLATIONS:
        raise MethodError(f'ablation is {ablation!r}; expected one of "corrupted", "mean", "zero".')
    table = effects.table(per_position)
    if table.keys() != autoencoders.keys():
        raise InputError(
            f"the effects are of {', '.join(table)}, the autoencoders at {', '.join(autoencoders)}; expected the same."
        )
    order = torch.cat([part.flatten() for part in table.values()]).abs().argsort(descending=True, stable=True)
    if not sizes or any(not 0 <= size <= len(order) for size in sizes):
        raise InputError(f"sizes are {list(sizes)}; expected numbers of nodes from 0 to {len(order)}.")
    sites = {name: Latents(each, "all", selection).at(name) for name, each in autoencoders.items()}
    with torch.inference_mode(False), torch.no_grad():
        pair, at = pose_pair(model, clean, corrupted, metric, list(sites.values()), False, chunk, False)
        values, output = pair.values(pair.clean)
        other = pair.values(pair.corrupted)[0] if ablation == "corrupted" else values

        def ablated(name: str) -> Tensor:
            value = other[at[sites[name]]]
            if ablation == "mean":
                return value.mean(0, keepdim=True).expand_as(value)
            return torch.zeros_like(value) if ablation == "zero" else value

        instead = {name: ablated(name) for name in sites}

        def mean_metric(kept: Tensor) -> float:
            masks, first = {}, 0
            for name, part in table.items():
                mask = kept[first : first + part.numel()].reshape(part.shape)
                first += part.numel()
                width = autoencoders[name].config.width
                masks[name] = torch.cat([mask[:, :-1], mask[:, -1:].expand(-1, width)], 1)

            def scored(rows: Tensor) -> Tensor:
                def change(name: str) -> Callable[[Tensor], Tensor]:
                    mask, given = masks[name], instead[name]
                    return lambda value: torch.where(
                        mask.to(value.device), value, given[rows.to(given.device)].to(value)
                    )

                changes = [(at[sites[name]], change(name)) for name in sites]
                return pair.score(pair.run(pair.clean, rows, changes), rows, output)

            return float(torch.cat([part for _, part in pair.pieces(pair.batch, scored)]).double().mean())

        everything = torch.ones(len(order), dtype=torch.bool)
        full = float(pair.score(output, torch.arange(pair.batch)).double().mean())
        empty = mean_metric(~everything)
        if abs(full - empty) <= 16 * torch.finfo(torch.float32).eps * max(abs(full), abs(empty)):
            raise InputError(
                f"the metric is {full:.6g} with all nodes and {empty:.6g} with none, so there is nothing that a "
                "circuit could carry. Choose another metric, other sites or another ablation."
            )
        faithfulness, completeness = [], []
        for size in sizes:
            inside = torch.zeros_like(everything)
            inside[order[:size].cpu()] = True
            faithfulness.append((mean_metric(inside) - empty) / (full - empty))
            completeness.append((mean_metric(~inside) - empty) / (full - empty))
    return CircuitCurve(list(sizes), faithfulness, completeness, full, empty)


def _require_autoencoders(autoencoders: Mapping[str, SparseAutoencoder]) -> None:
    if not autoencoders:
        raise InputError('no autoencoders given; expected some by site, as {"transformer.h.8": autoencoder}.')
