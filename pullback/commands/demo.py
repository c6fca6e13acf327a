"""``pullback demo``: the known effect of BlockMNIST, measured in about a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")] = Path("demo"),
    images: Annotated[int, typer.Option("--images", min=8, max=1000, help="Test images to explain.")] = 500,
    seed: Annotated[int, typer.Option("--seed", help="Of the data, the training and the methods.")] = 0,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads; one is fastest for nets this small.")
    ] = 1,
) -> None:
    """Train three small nets on BlockMNIST, explain them with every method, and write a report."""
    from pullback.demo import run_demo

    result = run_demo(out, images=images, seed=seed, threads=threads)
    typer.echo(result.table())
    typer.echo(f"\nreport: {result.report.resolve()}")
