"""The native kernels of gptcore. Use gptcore.ops, which checks, differentiates and chooses among backends.

Outputs are allocated by the caller, filled in place, and must not share memory with inputs. Every function raises
ValueError for tensors and numbers that do not fit, saying what it expected, TypeError for arguments of another kind.
"""

import collections.abc

from torch import Tensor

# The number of threads on the CPU; on a GPU the handle of a stream, the function that allocates so many bytes of
# workspace, and whether float32 products may be rounded to TF32.
Execution = int | tuple[int, collections.abc.Callable[[int], Tensor], bool]

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
    """Fills out, like query, and lse, float32 (batch, query_heads, query_len)."""

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
    """Fills grad_query, grad_key and grad_value, except for keys of a document that has no queries."""

def attention_takes(query: object, key: object, value: object) -> bool:
    """Whether these are tensors that attention's kernels can read, with shapes that fit. Never raises."""

def check_memory(tensors: collections.abc.Sequence[Tensor]) -> None:
    """Raises ValueError for a tensor that the memory of its storage does not hold, or holds negated."""

def check_segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, batch: int, query_len: int, kv_len: int) -> None:
    """Raises ValueError for boundaries that are no documents of such a batch."""

def segments(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, batch: int, query_len: int, kv_len: int
) -> list[tuple[int, int, int, int, int]]:
    """The segments (batch, query_begin, query_len, key_begin, key_len) that the boundaries mean."""

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
    """Fills out, residual_out = x + residual, and float32 mean and rstd of each row; x is (..., width)."""

def layer_norm_backward(
    grad_out: Tensor,
    grad_residual_out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    execution: Execution,
) -> None:
    """Fills the gradients; x is what was normalised, the sum where there was a residual."""

def gelu_forward(x: Tensor, bias: Tensor | None, out: Tensor, tanh_form: bool, execution: Execution) -> None:
    """Fills out with GELU(x + bias); x is (..., width)."""

def gelu_backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    grad_x: Tensor,
    grad_bias: Tensor | None,
    tanh_form: bool,
    execution: Execution,
) -> None:
    """Fills grad_x and, with a bias, grad_bias."""

def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_threads: int) -> None:
    """Fills out, (rows, out_features), with x @ weight.T + bias; inputs have its dtype or float32."""

def linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    num_threads: int,
) -> None:
    """Fills those gradients that are there: grad_x needs weight, and grad_weight x."""

def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool, num_threads: int) -> float:
    """The sum of the rows' cross entropies; logits is (rows, vocabulary), whose rows are dense.

    If `gradient`, the logits are overwritten with the gradient of that sum.
    """

def grad_norm(grads: collections.abc.Sequence[Tensor], num_threads: int) -> float:
    """The 2-norm of all gradients together; they are dense, in the sense of .is_contiguous()."""

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
    """Updates params, exp_avgs and exp_avg_sqs by grad_scale x grads, and adds 1 to steps, which are scalars.

    check_only: checks the arguments and changes nothing.

    copies: of params, rounded to the 16 bits that the model has; their gradients have that dtype, too. An element that
    is no longer its param's rounding is what the update begins with. Empty where the model has params.
    """

def compiled_isas() -> list[str]:
    """CPU instruction sets that the kernels are compiled for, lowest first."""

def supported_isas() -> list[str]:
    """Those of them that this CPU has, lowest first."""

def cpu_isa() -> str:
    """The instruction set in use."""

def use_cpu_isa(name: str) -> None:
    """Use this instruction set from now on. Raises ValueError."""

def cuda_archs() -> list[str]:
    """What the CUDA kernels are compiled for, such as "sm_80"; nothing if they are not."""

def cuda_problem() -> str | None:
    """Why no CUDA kernel can run on this machine, or None. Needs no driver."""

def build_info() -> dict[str, str | int]:
    """version, compiler, openmp, the date of its standard, and nvcc where there are CUDA kernels."""
