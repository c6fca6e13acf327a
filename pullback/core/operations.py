"""What operations are: which are linear in what carries signal, and what an autograd node is called."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["ALIASES", "GATES", "LINEAR", "NONLINEAR", "PRODUCTS", "is_nonlinear", "node_operation"]


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
    # table and weights as torch.nn.functional and as torch itself order them; the rest are indices and settings
    "embedding_bag": (0, 1, 6, 8),
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
    affine_grid_generator dropout dropout1d dropout2d dropout3d native_dropout as_strided
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

ALIASES: dict[str, str] = {
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
    return ALIASES.get(snake, snake)
