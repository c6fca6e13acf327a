"""Sites: places in a model, written as text.

``"input"``, ``"input:name"`` (one leaf), ``"embeddings"``, a module's output ``"layer4.1"`` or input
``"layer4.1:input"``, one call of a module that runs several times ``"block@2"`` (counted from 0), one keyword of a
module's input ``"language_model:input.inputs_embeds"``. A site may be seen in other coordinates, such as the latents of
a sparse autoencoder: ``Latents(autoencoder).at("layer4.1")``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .domain import Domain
from .errors import SiteError, nearest
from .inputs import nested_tensors

__all__ = ["Site", "first_tensor_at", "sites"]

_PATTERN = re.compile(
    r"(?P<path>[^@:]*)(?:@(?P<call>\d+))?(?::(?P<side>input|output)(?:\.(?P<leaf>[\w.]+))?)?"
)


@dataclass(frozen=True)
class Site:
    """One place in the model.

    Attributes:
        kind: "input", "embeddings" or "module".
        path: the module's dotted path; empty for the model itself.
        call: which call of the module, counted from 0; None where it runs once.
        side: "output" or "input".
        leaf: which tensor there, by keyword or position; None for the first tensor (all explained ones at "input").
        domain: coordinates that are the value of the site, in place of the tensor that the model has there.

    >>> Site.parse("block@2:input")
    Site(kind='module', path='block', call=2, side='input', leaf=None, domain=None)
    >>> str(Site.parse("input:pixel_values"))
    'input:pixel_values'
    """

    kind: str
    path: str = ""
    call: int | None = None
    side: str = "output"
    leaf: str | None = None
    domain: Domain | None = None

    @property
    def plain(self) -> Site:
        """The same place in the model's own coordinates."""
        return replace(self, domain=None)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a site from its text. Raises SiteError for text that is no site."""
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise SiteError(f'a site is text such as "input" or "layer4.1", got {type(text).__name__}.')
        text = text.strip()
        if text == "input" or text.startswith("input:"):
            return cls("input", leaf=text[6:] or None)
        if text == "embeddings":
            return cls("embeddings")
        match = _PATTERN.fullmatch(text)
        if match is None or not text:
            raise SiteError(
                f'"{text}" is not a site. Write "input", "embeddings", a module path such as "layer4.1", '
                '"layer4.1:input" for what goes into it, "block@2" for one call.'
            )
        call = match["call"]
        return cls(
            "module", match["path"], int(call) if call else None, match["side"] or "output", match["leaf"]
        )

    def __str__(self) -> str:
        if self.domain is not None:
            return f"{self.domain!r} at {self.plain}"
        if self.kind == "input":
            return f"input:{self.leaf}" if self.leaf else "input"
        if self.kind == "embeddings":
            return "embeddings"
        text = self.path + (f"@{self.call}" if self.call is not None else "")
        if self.side == "input" or self.leaf:
            text += f":{self.side}" + (f".{self.leaf}" if self.leaf else "")
        return text

    def module(self, model: nn.Module) -> nn.Module:
        """The module this site belongs to. Raises SiteError with the nearest names."""
        modules = dict(model.named_modules(remove_duplicate=False))
        path = self.path
        for prefix in ("module.", "_orig_mod."):
            if path not in modules and path.startswith(prefix):
                path = path[len(prefix) :]
        if path not in modules:
            names = [name for name in modules if name]
            raise SiteError(
                f'no module "{self.path}" in {type(model).__name__}. Nearest: {nearest(self.path, names)}. '
                f"pullback.sites(model) lists all {len(names)}."
            )
        found: nn.Module = modules[path]
        return found


def sites(model: nn.Module) -> list[str]:
    """Every module path of the model, each of which is a site (its output; add ":input" for its input).

    >>> sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    ['0', '1']
    """
    parts = [[part for part in name.split(".") if part != "_orig_mod"] for name, _ in model.named_modules()]
    return [".".join(path) for path in parts if any(path)]


def first_tensor_at(structure: Any, leaf: str | None) -> tuple[Any, ...]:
    """The keys that lead to the tensor a site means inside a module's output or input.

    Without ``leaf`` it is the first floating tensor found in order; otherwise the entry of that name or position.
    """
    if leaf is None:
        keys: list[Any] = []
        while not hasattr(structure, "is_floating_point"):
            for key, part in _parts(structure):
                if any(tensor.is_floating_point() or tensor.is_complex() for tensor in nested_tensors(part)):
                    keys.append(key)
                    structure = part
                    break
            else:
                raise KeyError("no floating tensor")
        return tuple(keys)
    keys = []
    for name in leaf.split("."):
        found = [key for key, _ in _parts(structure) if str(key) == name]
        if not found:
            raise KeyError(name)
        keys.append(found[0])
        structure = dict(_parts(structure))[found[0]]
    return tuple(keys)


def _parts(structure: Any) -> list[tuple[Any, Any]]:
    if hasattr(structure, "items"):
        return list(structure.items())
    if isinstance(structure, (list, tuple)):
        return list(enumerate(structure))
    return []
