"""Which operations can have an implicit bias, by how it is found."""

from __future__ import annotations

from typing import Final

from ...core.operations import NONLINEAR
from ..rules.surrogate import names

__all__ = ["AFFINE", "ELEMENTWISE", "HOMOGENEOUS", "NORMS", "OPERATIONS"]

NORMS: Final = names("norm linalg_norm linalg_vector_norm linalg_matrix_norm")
"""Of degree one unless they count."""

HOMOGENEOUS: Final = names(
    """
    relu leaky_relu prelu rrelu abs amax amin aminmax max_pool1d max_pool2d max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices fractional_max_pool2d
    fractional_max_pool3d topk sort msort kthvalue median nanmedian mode cummax cummin hardshrink std
    """
)
"""g(λx) = λ g(x) for λ > 0, and no room for a constant: nothing to record."""

AFFINE: Final = names(
    """
    cat stack hstack vstack dstack column_stack where masked_fill index_fill index_put scatter scatter_add
    index_add index_copy masked_scatter select_scatter slice_scatter diagonal_scatter as_strided_scatter
    pad constant_pad_nd fill block_diag complex unsafe_index_put index_put_impl
    """
)
"""A constant among their arguments is part of the result: b is the result at zero signal."""

ELEMENTWISE: Final = names(
    """
    relu6 selu celu mish hardtanh hardsigmoid softshrink threshold logsigmoid sign maximum minimum fmax fmin
    clamp clamp_min clamp_max exp2 expm1 log2 log10 log1p logaddexp logaddexp2 pow float_power sin cos tan
    asin acos atan atan2 sinh cosh asinh acosh atanh sinc erf erfc erfinv lgamma digamma logit xlogy hypot
    fmod remainder lerp addcdiv nan_to_num round floor ceil trunc fix frac polygamma mvlgamma i0 i0e i1 i1e
    erfcx ndtr ndtri log_ndtr entr xlog1py zeta copysign ldexp sgn heaviside floor_divide gelu silu sigmoid
    tanh softplus elu hardswish exp log
    """
)
"""An entry of the result depends on the operands' entries at the same place."""

OPERATIONS: Final = (
    (NONLINEAR - HOMOGENEOUS - {"embedding"})
    | AFFINE
    | ELEMENTWISE
    | NORMS
    | names("add sub quantile nanquantile dist")
)
"""Canonical names of every operation whose implicit bias may differ from zero."""
