"""An attribution as a pandas table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pullback.viz.draw import tokens_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from pullback.result import Attribution

__all__ = ["dataframe"]


def dataframe(attribution: Attribution) -> DataFrame:
    """A row per (example, element), or per (example, token) with the sum over the token's features.

    Columns: ``leaf`` (where there are several), ``example``, ``explained`` (the label), then ``position`` and
    ``token``, or ``dim_1``, ``dim_2``, ... as counted in ``values``; last ``value``.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_dataframe() needs pandas, which pullback does not: pip install pandas"
        ) from error
    explained = np.asarray(attribution.labels, dtype=object)
    frames = []
    for name, leaf in attribution.leaves().items():
        values, tokens = leaf.detach().cpu(), tokens_of(attribution, leaf)
        values = values.double() if values.is_floating_point() else values
        if tokens is not None and values.ndim > 2:
            values = values.flatten(2).sum(2)
        places = np.indices(tuple(values.shape)).reshape(values.ndim, -1)
        columns: dict[str, Any] = {} if name == attribution.site else {"leaf": name}
        columns |= {"example": places[0], "explained": explained[places[0]]}
        if tokens is None:
            columns |= {f"dim_{axis}": places[axis] for axis in range(1, values.ndim)}
        else:
            padded = [[*words, *[None] * (values.shape[1] - len(words))] for words in tokens]
            columns |= {"position": places[1], "token": [padded[row][column] for row, column in places.T]}
        frame = pandas.DataFrame({**columns, "value": values.reshape(-1).numpy()})
        frames.append(frame if tokens is None else frame[frame["token"].notna()])
    return pandas.concat(frames, ignore_index=True)
