"""The spelling table: every way of writing one operation has one canonical name; and what is linear."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = [
    "GATES",
    "LINEAR",
    "NONLINEAR",
    "PRODUCTS",
    "Spelling",
    "canonical",
    "canonical_call",
    "is_nonlinear",
    "node_operation",
]


def _words(text: str) -> list[str]:
    return text.split()


# operation -> positions of its factors: linear while at most one of them carries signal
PRODUCTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_words("mul matmul mm bmm mv dot vdot inner outer ger kron cross linalg_cross"), (0, 1)),
    **dict.fromkeys(_words("linear tensordot linalg_vecdot linalg_matmul _grouped_mm"), (0, 1)),
    **dict.fromkeys(_words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d"), (0, 1)),
    **dict.fromkeys(_words("conv_transpose3d convolution conv_tbc deform_conv2d embedding"), (0, 1)),
    **dict.fromkeys(_words("addmm baddbmm addbmm addmv addr addcmul sparse_addmm"), (1, 2)),
    "bilinear": (0, 1, 2),
    "_trilinear": (0, 1, 2),
}
# operation -> positions that must be constant for it to be linear in the others
GATES: dict[str, tuple[int, ...]] = {
    "div": (1,),
    "lerp": (2,),
    "addcdiv": (2,),
    "grid_sample": (1,),
    "grid_sampler2d": (1,),
    "grid_sampler3d": (1,),
    "linalg_solve": (0,),
    "linalg_solve_triangular": (0,),
    "linalg_solve_ex": (0,),
}
LINEAR: frozenset[str] = frozenset(
    _words(
        """
    add sub neg positive sum mean nansum cumsum diff trace clone contiguous copy to to_copy float double
    half bfloat16 type type_as cpu cuda detach view view_as reshape reshape_as _reshape_alias
    unsafe_view flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to
    broadcast_tensors repeat repeat_interleave tile transpose t permute movedim swapdims adjoint numpy_t
    matrix_h mH mT select slice narrow split split_with_sizes chunk tensor_split unbind hsplit vsplit
    dsplit cat stack hstack vstack dstack column_stack getitem setitem index index_select index_put
    index_add index_copy index_fill gather scatter scatter_add take take_along_dim masked_fill
    masked_scatter masked_select where roll flip fliplr flipud rot90 tril triu diag diagonal diag_embed
    diagonal_scatter select_scatter slice_scatter pad constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d unfold unfold_copy fold
    im2_col col2_im pixel_shuffle pixel_unshuffle channel_shuffle avg_pool1d avg_pool2d avg_pool3d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_avg_pool2d adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d interpolate upsample affine_grid
    affine_grid_generator dropout dropout1d dropout2d dropout3d native_dropout embedding_bag as_strided
    as_strided_scatter alias view_as_real view_as_complex real imag conj resolve_conj resolve_neg
    complex stft istft fill zero zeros_like ones_like meshgrid block_diag atleast_1d atleast_2d
    atleast_3d lift_fresh values unsafe_split unsafe_split_with_sizes to_dense max_unpool1d max_unpool2d
    max_unpool3d max_unpool2d max_unpool3d permute_copy slice_copy squeeze_copy result_type
    mkldnn_to_dense mkldnn_reshape rsub unfold_backward rad2deg deg2rad
    narrow_copy lazy_clone unsafe_index unsafe_index_put
    index_put_impl nan_to_num pack_padded_sequence _pack_padded_sequence _pad_packed_sequence
    """
    )
)
NONLINEAR: frozenset[str] = (
    frozenset(PRODUCTS)
    | frozenset(GATES)
    | frozenset(
        _words(
            """
    relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardtanh hardsigmoid
    softplus softshrink hardshrink threshold logsigmoid log_sigmoid sigmoid tanh glu softmax log_softmax
    scaled_dot_product_attention _native_multi_head_attention _transformer_encoder_layer_fwd batch_norm
    instance_norm layer_norm rms_norm group_norm native_layer_norm native_group_norm _fused_rms_norm
    native_batch_norm norm linalg_norm linalg_vector_norm linalg_matrix_norm var std
    var_mean std_mean renorm weight_norm abs sign max min amax amin aminmax maximum minimum fmax fmin
    clamp clamp_min clamp_max max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
    adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d topk sort msort
    kthvalue median nanmedian mode cummax cummin exp exp2 expm1 log log2 log10 log1p logaddexp
    logaddexp2 logsumexp logcumsumexp sqrt rsqrt reciprocal square pow float_power sin cos tan asin acos
    atan atan2 sinh cosh asinh acosh atanh sinc erf erfc erfinv lgamma digamma logit xlogy prod cumprod
    hypot fmod remainder cosine_similarity cdist pairwise_distance pdist einsum chain_matmul
    linalg_multi_dot matrix_power linalg_matrix_power linalg_inv inverse linalg_det det logdet
    linalg_slogdet matrix_exp linalg_matrix_exp linalg_cholesky cholesky linalg_qr linalg_svd
    linalg_eigh linalg_pinv lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy
    binary_cross_entropy_with_logits cross_entropy_loss flex_attention scatter_reduce index_reduce
    segment_reduce ndtr log_ndtr
    """
        )
    )
)

_OPERATORS: dict[str, str] = {
    **{f"__{name}__": name for name in _words("add sub mul matmul pow neg abs getitem")},
    **{f"__i{name}__": f"{name}_" for name in ["add", "sub", "mul", "pow"]},
    "__radd__": "add",
    "__rmul__": "mul",
    "__pos__": "positive",
    "__imatmul__": "matmul_",
    "__setitem__": "setitem_",
    **dict.fromkeys(("__div__", "__truediv__"), "div"),
    **dict.fromkeys(("__idiv__", "__itruediv__"), "div_"),
    "__mod__": "remainder",
    "__imod__": "remainder_",
}
# x.__rsub__(y) is y - x: the arguments change places
_SWAPPED: dict[str, tuple[str, Callable[..., Any]]] = {
    "__rsub__": ("sub", operator.sub),
    "__rdiv__": ("div", operator.truediv),
    "__rtruediv__": ("div", operator.truediv),
    "__rpow__": ("pow", operator.pow),
    "__rmatmul__": ("matmul", torch.matmul),
    "__rmod__": ("remainder", operator.mod),
}
_ALIASES: dict[str, str] = {
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
    "expit": "sigmoid",
    "arctan": "atan",
    "arctanh": "atanh",
    "arcsin": "asin",
    "arccos": "acos",
    "swapaxes": "transpose",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctan2": "atan2",
    "moveaxis": "movedim",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_safe_softmax": "softmax",
    "hardtanh": "hardtanh",
    "_threshold": "threshold",
    "orgqr": "linalg_householder_product",
    "linalg_matmul": "matmul",
    "log_sigmoid": "logsigmoid",
    "log1_p": "log1p",
    "_unsafe_view": "unsafe_view",
    "_to_copy": "to_copy",
}
# nodes whose type names differ from the operation a user wrote
_NODES: dict[str, str] = {
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "fused_rms_norm": "rms_norm",
    "native_batch_norm": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "miopen_batch_norm": "batch_norm",
    "prelu_kernel": "prelu",
    "safe_softmax": "softmax",
    "copys": "copy",
    "trilinear": "_trilinear",
    "cudnn_convolution": "convolution",
    "mkldnn_convolution": "convolution",
    "grouped_mm": "_grouped_mm",
    "thnn_fused_lstm_cell": "lstm",
    "thnn_fused_gru_cell": "gru",
    "cudnn_rnn": "lstm",
    "mkldnn_rnn_layer": "lstm",
    "mkldnn_linear": "linear",
    "reshape_alias": "_reshape_alias",
    "cat_backward": "cat",
    "pixel_shuffle": "view",
}
_HIDING_MODULES = (
    "torch.nn.functional",
    "torch.functional",
    "torch.autograd",
    "torch._lowrank",
    "torch._lobpcg",
)


@dataclass(frozen=True)
class Spelling:
    """One way of writing an operation: its canonical name and how to call it out of place.

    ``function`` is the out-of-place callable (None where there is none), ``inplace_position`` the position of
    an ``inplace`` argument, ``swapped`` true for reflected operators (``c - x``) and ``composite`` true for
    functions written in Python that hide other operations.
    """

    name: str
    in_place: bool = False
    function: Callable[..., Any] | None = None
    inplace_position: int | None = None
    swapped: bool = False
    composite: bool = False


_SPELLINGS: dict[Any, Spelling | None] = {}


def canonical(function: Callable[..., Any]) -> Spelling | None:
    """The canonical spelling of a torch function, method, operator method or ``torch.ops`` entry.

    None if it is no operation (reading an attribute, for instance).

    >>> import torch
    >>> canonical(torch.ops.aten.relu_.default).name, canonical(torch.Tensor.relu_).in_place
    ('relu', True)
    """
    try:
        return _SPELLINGS[function]
    except KeyError:
        spelling = _SPELLINGS[function] = _resolve(function)
        return spelling


def _resolve(function: Callable[..., Any]) -> Spelling | None:
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        return _resolve_registered(function)
    if isinstance(function, HigherOrderOperator):
        return Spelling(str(function.__name__), function=function)
    written: str = getattr(function, "__name__", "")
    if not written or written in ("__get__", "__set__", "__delete__"):
        return None
    python = isinstance(function, types.FunctionType)
    if python and not (function.__module__ or "").startswith("torch"):
        # somebody else's overridable function: its name says nothing about what it computes, so look inside
        return Spelling(f"{function.__module__}.{written}", function=function, composite=True)
    if written in _SWAPPED:
        name, call = _SWAPPED[written]
        return Spelling(name, function=call, swapped=True)
    if written == "rsub":
        return Spelling("sub", function=_subtract, swapped=True)
    plain = _OPERATORS.get(written, written)
    in_place = _is_in_place(plain)
    name = _name(plain.removesuffix("_") if in_place else plain)
    position = None
    if python:
        try:
            position = [*inspect.signature(function).parameters].index("inplace")
        except ValueError:
            position = None
    hides = python and (function.__module__ in _HIDING_MODULES or written == "backward")
    return Spelling(
        name,
        in_place,
        _out_of_place(plain.removesuffix("_")) if in_place else function,
        position,
        composite=hides and name not in LINEAR and name not in NONLINEAR,
    )


def _resolve_registered(function: OpOverload[Any, Any] | OpOverloadPacket[Any, Any]) -> Spelling:
    packet = function.overloadpacket if isinstance(function, OpOverload) else function
    namespace, written = packet._qualified_op_name.split("::")
    if namespace != "aten":
        return Spelling(f"{namespace}.{written}", function=function)
    if not _is_in_place(written):
        if written == "rsub":
            return Spelling("sub", function=_subtract, swapped=True)
        return Spelling(_name(written), function=function)
    plain = getattr(torch.ops.aten, written[:-1], None)
    if plain is not None and isinstance(function, OpOverload):
        plain = getattr(plain, function._overloadname, plain)
    return Spelling(_name(written[:-1]), True, plain)


def _subtract(left: Any, right: Any, *, alpha: float = 1) -> Tensor:
    return torch.rsub(right, left, alpha=alpha)


def _is_in_place(written: str) -> bool:
    return (
        written.endswith("_")
        and not written.endswith("__")
        and written not in ("requires_grad_", "retain_grad_")
    )


def _name(written: str) -> str:
    bare = written.removeprefix("special_")
    return _ALIASES.get(bare, bare)


def _out_of_place(name: str) -> Callable[..., Any] | None:
    for home in (torch.Tensor, torch, getattr(torch._C, "_nn", None), torch.nn.functional):
        found: Callable[..., Any] | None = getattr(home, name, None)
        if found is not None:
            return found
    return None


def _carries_signal(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def is_nonlinear(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call is nonlinear in the tensors that require grad (a product with a constant is not)."""
    if (factors := PRODUCTS.get(name)) is not None:
        named = [value for key, value in kwargs.items() if key not in ("bias", "out")]
        live = [_carries_signal(args[position]) for position in factors if position < len(args)]
        return sum(live) + sum(map(_carries_signal, named)) >= 2
    if (constant := GATES.get(name)) is not None:
        named = [value for key, value in kwargs.items() if key not in ("input", "self")]
        return any(map(_carries_signal, [args[p] for p in constant if p < len(args)] + named))
    if name == "batch_norm":
        return bool(kwargs.get("training", args[5] if len(args) > 5 else False))
    if name == "einsum":
        operands = [
            item for value in args for item in (value if isinstance(value, (list, tuple)) else (value,))
        ]
        return sum(map(_carries_signal, operands)) >= 2
    return name in NONLINEAR


@functools.lru_cache(maxsize=4096)
def node_operation(node_name: str) -> str:
    """The operation behind an autograd node's name.

    >>> node_operation("ScaledDotProductFlashAttentionForCpuBackward0"), node_operation("MulBackward0")
    ('scaled_dot_product_attention', 'mul')
    """
    stem = re.sub(r"Backward\w?\d*$", "", node_name.rsplit(".", 1)[-1].rsplit("::", 1)[-1])
    stem = re.sub(r"(\d)D", r"\1d", stem)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()
    if snake.startswith("scaled_dot_product_"):
        return "scaled_dot_product_attention"
    if snake.startswith(("upsample_", "fft_")):
        return "interpolate" if snake.startswith("upsample_") else "view"
    snake = _NODES.get(snake, snake)
    return _ALIASES.get(snake, snake)


_BINARY = ("input", "other")
_LEADING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_words("add sub mul div matmul maximum minimum remainder atan2 outer"), _BINARY),
    **dict.fromkeys(("mm", "bmm"), ("input", "mat2")),
    "pow": ("input", "exponent"),
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], ("input", "weight", "bias")),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addcmul": ("input", "tensor1", "tensor2"),
    "scaled_dot_product_attention": ("query", "key", "value"),
    "cat": ("tensors",),
    "stack": ("tensors",),
    "where": ("condition", "input", "other"),
}


def _by_position(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs:
        if "self" in kwargs:
            kwargs = {"input" if key == "self" else key: value for key, value in kwargs.items()}
        for key in _LEADING.get(name, ("input",))[len(args) :]:
            if key not in kwargs:
                break
            args, kwargs = (*args, kwargs[key]), {k: v for k, v in kwargs.items() if k != key}
    return args, kwargs


def canonical_call(
    spelling: Spelling, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, tuple[Any, ...], dict[str, Any]]:
    """Whether the call is in place, and its arguments as the out-of-place callable takes them."""
    args, kwargs = _by_position(spelling.name, args, kwargs)
    in_place, position = spelling.in_place, spelling.inplace_position
    if position is not None:
        in_place = bool(args[position] if position < len(args) else kwargs.get("inplace", False))
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        args = tuple(False if index == position else value for index, value in enumerate(args))
    if spelling.swapped:
        args = (args[1], args[0], *args[2:]) if len(args) > 1 else (kwargs.pop("other"), args[0])
    return in_place, args, kwargs
