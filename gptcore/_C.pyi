"""The native kernels of gptcore. Use gptcore.ops, which checks, differentiates and chooses among backends.

Outputs are allocated by the caller, filled in place, and must not share memory with inputs. Every function raises
ValueError for tensors and numbers that do not fit, with what was expected, and TypeError for arguments of wrong types.
"""

import collections.abc

from torch import Tensor

# On the CPU the number of threads. On a GPU (stream, allocate, allow_tf32): the handle of a stream, a function that
# allocates a workspace of a number of bytes, and whether float32 products may use TF32. None checks the arguments as
# for a GPU and runs nothing.
Execution = int | tuple[int, collections.abc.Callable[[int], Tensor], bool] | None

# The fields of gptcore.ops.attention.Settings.
AttentionSettings = tuple[Tensor | None, Tensor | None, Tensor | None, float, bool, int, int, float]

def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    settings: AttentionSettings,
    execution: Execution,
) -> None:
    """Fill out, with the shape of query, and lse, float32 (batch, query_heads, query_len)."""

def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    settings: AttentionSettings,
    execution: Execution,
) -> None:
    """Fill grad_query, grad_key and grad_value, except for keys of a document without queries."""

def attention_takes(query: object, key: object, value: object) -> bool:
    """Return whether these are tensors that attention's kernels can read, with shapes that fit. Never raises."""

def check_storage(objects: object) -> None:
    """Raise ValueError for a tensor among these, or in lists and tuples of them, that exceeds its storage."""

def check_segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, batch: int, query_len: int, kv_len: int) -> None:
    """Raise ValueError for cu_seqlens that do not fit such a batch."""

def segments(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, batch: int, query_len: int, kv_len: int
) -> list[tuple[int, int, int, int, int]]:
    """Return the segments (batch, query_begin, query_len, key_begin, key_len) of cu_seqlens."""

def layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    residual_out: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    execution: Execution,
) -> None:
    """Fill out, residual_out = x + residual, and float32 mean and rstd of each row; x is (..., width)."""

def layer_norm_backward(
    grad_out: Tensor,
    grad_residual_out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    grad_narrow: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    execution: Execution,
) -> None:
    """Fill the gradients; x is the normalised tensor: residual_out if there was a residual.

    grad_narrow is grad_x in the dtype of a 16-bit grad_out of float32 x.
    """

def gelu_forward(x: Tensor, bias: Tensor | None, out: Tensor, tanh_form: bool, execution: Execution) -> None:
    """Fill out with GELU(x + bias); x is (..., width)."""

def gelu_backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    grad_x: Tensor,
    grad_bias: Tensor | None,
    tanh_form: bool,
    execution: Execution,
) -> None:
    """Fill grad_x and, with a bias, grad_bias."""

def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_threads: int) -> None:
    """Fill out, (rows, out_features), with x @ weight.T + bias; inputs have its dtype or float32."""

def linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    scale: float | None,
    num_threads: int,
) -> None:
    """Fill the gradients that are not None: grad_x needs weight, and grad_weight needs x.

    With a scale, adds scale times the gradient to a float32 grad_weight.
    """

def decode(
    tokens: collections.abc.Sequence[int],
    embeddings: Tensor,
    positions: Tensor | None,
    weights: collections.abc.Sequence[Tensor],
    caches: collections.abc.Sequence[Tensor],
    rows: collections.abc.Sequence[int],
    places: collections.abc.Sequence[int],
    kept: collections.abc.Sequence[int],
    layers: collections.abc.Sequence[tuple[float, int, float, float, bool]],
    final_eps: float | None,
    logits: Tensor,
    num_threads: int,
) -> None:
    """Fill logits (kept, vocabulary) after more tokens in rows of the caches; write keys and values into the caches.

    tokens, embeddings: the entry of each token in (entries, width).
    positions: (positions, width), added at the index of the token's place.
    weights: weight and bias of ln_1, c_attn, c_proj, ln_2, c_fc and c_proj of each layer; with final_eps weight and
        bias of the last norm; the weight of the output projection. Weights of linear layers may be q8_0 or q4_0 blocks.
    caches: keys and values of each layer, (2, rows, heads, capacity, head_dim).
    rows, places: of each token in the caches; it attends to all places of its row up to its own.
    kept: indices of the tokens whose logits are wanted.
    layers: scale and window (-1: none) of attention, eps of both norms, and whether GELU has the tanh form.
    final_eps: None for norms after attention and MLP instead of before them.
    """

def quantized_linear_forward(
    x: Tensor, weight: Tensor, kind: str, bias: Tensor | None, out: Tensor, execution: Execution
) -> None:
    """Fill out, (rows, out_features), with x @ weight.T + bias; weight is uint8, rows of q8_0 or q4_0 blocks."""

def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool, num_threads: int) -> float:
    """Return the sum of the cross entropies of the rows; logits is (rows, vocabulary) with dense rows.

    With `gradient`, overwrites the logits with the gradient of that sum.
    """

def grad_norm(grads: collections.abc.Sequence[Tensor], num_threads: int) -> float:
    """Return the 2-norm of all gradients together; they must be contiguous."""

def adamw(
    params: collections.abc.Sequence[Tensor],
    copies: collections.abc.Sequence[Tensor],
    grads: collections.abc.Sequence[Tensor],
    exp_avgs: collections.abc.Sequence[Tensor],
    exp_avg_sqs: collections.abc.Sequence[Tensor],
    steps: collections.abc.Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    num_threads: int,
    check_only: bool = False,
) -> None:
    """Update params, exp_avgs and exp_avg_sqs with grad_scale x grads, and add 1 to steps, which are scalars.

    check_only: check the arguments and change nothing.
    copies: the model's 16-bit parameters, whose float32 master weights are params; grads have their dtype. An element
        that differs from its rounded master was changed by other code, and replaces it. Empty without master weights.
    """

def compiled_isas() -> list[str]:
    """Return the CPU instruction sets that the kernels are compiled for, lowest first."""

def supported_isas() -> list[str]:
    """Return the compiled instruction sets that this CPU supports, lowest first."""

def cpu_isa() -> str:
    """Return the instruction set in use."""

def use_cpu_isa(name: str) -> None:
    """Use this instruction set from now on. Raises ValueError."""

def cuda_archs() -> list[str]:
    """Return the architectures of the CUDA kernels, such as "sm_80"; empty if not built."""

def cuda_problem() -> str | None:
    """Return why no CUDA kernel can run on this machine, or None. Needs no driver."""

def build_info() -> dict[str, str | int]:
    """Return version, compiler, openmp (the date of its standard) and, if there are CUDA kernels, nvcc."""
