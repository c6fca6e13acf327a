"""``pullback evaluate``: a named suite of methods, controls and metrics, on embedded data or on one's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["evaluate"]


def evaluate(
    suite: Annotated[
        str, typer.Argument(help='"blockmnist", "diffroar", "faithfulness", "sanity" or "all".')
    ] = "",
    config: Annotated[
        Path | None, typer.Option("--config", help="The measurements.json of a result: run the same again.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write to, and to go on from.")] = Path(
        "evaluation"
    ),
    model: Annotated[
        str | None,
        typer.Option("--model", help="A trained model, module:factory, in place of the suite's own."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help='"mnist", "block_mnist", "fashion-mnist", "cifar10", or a .npz file.'),
    ] = None,
    root: Annotated[
        str | None, typer.Option("--root", help='Folder of the full data, or "env" for PULLBACK_DATA.')
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="A method to compare; give it several times for several."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="A metric to measure; give it several times for several."),
    ] = None,
    images: Annotated[int | None, typer.Option("--images", help="Test images to explain.")] = None,
    training_images: Annotated[
        int | None,
        typer.Option("--training-images", help="Images to train on; all that there are by default."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Of training.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Models to train.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The first of them.")] = None,
    architecture: Annotated[
        str | None, typer.Option("--architecture", help='"convolutional", "perceptron", or module:factory.')
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help='Such as "cuda".')] = None,
    backend: Annotated[str, typer.Option("--backend", help='"serial", "process" or "ray".')] = "serial",
    workers: Annotated[
        int | None, typer.Option("--workers", help="Of the backend; one per core by default.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each worker.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Say how long it would take, and do no more.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the scores as JSON instead of tables.")
    ] = False,
) -> None:
    """Train small nets, explain them with every method, and measure: pullback evaluate blockmnist.

    A run that was stopped goes on where it was. The folder gets measurements.json, table.csv, table.md, report.html.
    """
    from pullback.core.errors import InputError
    from pullback.evaluation.measurements import Measurements
    from pullback.evaluation.suites import Suite, run_suites
    from pullback.evaluation.suites import suite as named

    if bool(suite) == (config is not None):
        raise InputError(
            'give one: a suite, such as "pullback evaluate blockmnist", or --config measurements.json.'
        )
    options: dict[str, Any] = {
        "root": root, "images": images, "training_images": training_images, "epochs": epochs, "seeds": seeds,
        "seed": seed, "architecture": architecture, "methods": tuple(method) if method else None,
        "metrics": tuple(metric) if metric else None, "device": device,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    if model is not None:
        options |= {"models": ((data or "mnist", "given"),), "architecture": model, "seeds": 1}
        _importable()
    elif data is not None:
        options["models"] = ((data, "standard"),)
    running: dict[str, Any] = {"backend": backend, "workers": workers, "threads": threads}
    if config is not None:
        from dataclasses import replace

        chosen: Suite | None = replace(Suite.from_settings(Measurements.load(config).settings), **options)
    else:
        chosen = None if suite == "all" else named(suite, **options)
    if plan:
        if chosen is None:
            raise InputError('--plan was given with "all". Expected one suite.')
        plans = chosen.plan(out=out / chosen.name, backend=running["backend"], workers=workers)
        typer.echo("\n".join(f"{name}: {each}" for name, each in plans.items()))
        return
    result = (
        run_suites("all", out=out, options=options, **running)
        if chosen is None
        else chosen.run(out=out / chosen.name, **running)
    )
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / name for name in ("measurements.json", "table.csv", "table.md", "report.html")}
    result.to_json(files["measurements.json"])
    result.to_csv(files["table.csv"])
    files["table.md"].write_text(result.to_markdown() + "\n", encoding="utf-8")
    result.to_html(
        files["report.html"], title=f"pullback evaluate {suite or (chosen.name if chosen else '')}"
    )
    if as_json:
        scores = [score.to_record() for score in result.scores()]
        typer.echo(
            json.dumps({"scores": _finite(scores), "files": [str(path) for path in files.values()]}, indent=1)
        )
        return
    typer.echo(result.to_markdown())
    typer.echo(f"\nreport: {files['report.html'].resolve()}")


def _importable() -> None:
    """Factories are found in the current directory, by worker processes too."""
    import os
    import sys

    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no word for NaN."""
    return [
        {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}
        for row in rows
    ]
