"""``pullback list``: methods and baselines, each with one line."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Annotated, Any

import typer

__all__ = ["entries", "listing"]


def listing(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """List methods and baselines as --method and --baseline take them."""
    from pullback.attribution import ALIASES, BASELINES, METHODS

    known = {"methods": entries(METHODS), "baselines": entries(BASELINES)}
    if as_json:
        typer.echo(json.dumps({**known, "aliases": dict(ALIASES)}, indent=2))
        return
    for kind, rows in known.items():
        typer.echo(f"{kind}:")
        for row in rows:
            typer.echo(f"  {row['name']}({', '.join(row['parameters'])})")
            typer.echo(f"      {row['summary']}")
    typer.echo("short names: " + ", ".join(f"{short} = {name}" for short, name in ALIASES.items()))
    typer.echo("case and underscores do not matter; methods nest: smoothgrad(ig(steps=32), samples=8)")


def entries(classes: Any) -> list[dict[str, Any]]:
    """Name, parameters with defaults, and the docstring's first line of each class."""
    rows = []
    for name, cls in classes.items():
        fields = dataclasses.fields(cls)
        parameters = [
            field.name if (default := _default(field)) is None else f"{field.name}={default}"
            for field in fields
        ]
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        rows.append({"name": name, "parameters": parameters, "summary": summary})
    return rows


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return None if field.default_factory is dataclasses.MISSING else repr(field.default_factory())
