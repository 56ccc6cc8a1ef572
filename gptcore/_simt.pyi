"""The CUDA kernels in a GPU simulator. Use gptcore.ops with backend="simt"; see docs/simt.md.

The functions are those of gptcore._C, on CPU tensors, with the `execution` of a GPU.
"""

from collections.abc import Sequence

from torch import Tensor

from gptcore._C import attention_backward as attention_backward
from gptcore._C import attention_forward as attention_forward
from gptcore._C import attention_takes as attention_takes
from gptcore._C import check_segments as check_segments
from gptcore._C import gelu_backward as gelu_backward
from gptcore._C import gelu_forward as gelu_forward
from gptcore._C import layer_norm_backward as layer_norm_backward
from gptcore._C import layer_norm_forward as layer_norm_forward
from gptcore._C import segments as segments

class SimtError(RuntimeError):
    """A kernel error, such as a data race: its kind, source line, block, thread, and element of a tensor."""

def configure(
    *, order: str = "forward", seed: int = 0, threads: int = 0, count: bool = False, compute_capability: int = 80
) -> None:
    """Set how later launches run.

    order: of blocks, warps and lanes: forward, reverse, or random with this seed.
    threads: number of CPU threads, 0 for OpenMP's default.
    count: count memory traffic and bank conflicts, which takes a third more time.
    compute_capability: 90 takes the kernels for sm_90a where there are any, 80 those for all GPUs.
    """

def counters() -> dict[str, dict[str, int]]:
    """Return for each kernel the counters summed over its launches since the last reset.

    bank_conflicts: passes through the 32 banks of shared memory beyond the minimum of each warp's request.
    sectors: distinct 32-byte sectors of global memory that each request touches.
    """

def waste() -> dict[str, list[tuple[str, int, int]]]:
    """Return for each kernel the source lines with bank conflicts or excess sectors, and how many of each."""

def reset_counters() -> None:
    """Set all counters to zero."""

def tiles(head_dim: int, element_size: int) -> dict[str, int | tuple[int, int]]:
    """Return from kernels/cuda/policy.h the padded head_dim, and the rows and columns of a tile of scores."""

def examples() -> dict[str, str]:
    """Return the example kernels with the rule that each can break; see csrc/simt/examples.cu."""

def run_example(name: str, broken: bool, x: Tensor, out: Tensor) -> None:
    """Run an example on x, (64, 4) with strides (8, 1), and out, (128, 4), both float32."""

def hopper_examples() -> dict[str, str]:
    """Return the Hopper kernels, as "kernel: mistake", with the rules that may be reported, none if it is correct."""

def run_hopper_example(name: str, x: Tensor, y: Tensor, out: Tensor) -> None:
    """Run an example on x, (250, 64), y, (256, 64), both bfloat16, and out, float32 (128, 32)."""

def run_product(
    image: Tensor,
    a: Tensor,
    out: Tensor,
    a_descriptor: int,
    b_descriptor: int,
    a_transposed: bool = False,
    b_transposed: bool = False,
    from_registers: bool = False,
) -> None:
    """Run one wgmma on operands in `image`, which becomes shared memory: out = 1 + A B.

    out is float32 (128, n / 2), the accumulators of each thread; a, int32 (128, 4), the registers of A.
    """

def run_copy(
    x: Tensor,
    out: Tensor,
    *,
    box: Sequence[int],
    swizzle_bytes: int,
    at: Sequence[int],
    at_out: Sequence[int] | None = None,
) -> None:
    """Copy a box of x, bfloat16 with four dimensions, to shared memory, and that to out, or to its box at at_out.

    box, at and at_out are innermost dimension first, as in a tensor map.
    """

def run_fragments(op: str, words: Tensor, out: Tensor) -> None:
    """Run mma_bfloat16, mma_float16, mma_tf32, load_matrix or load_matrix_trans on each lane's words, int32 (32, 10).

    The words of a lane are a (4), b (2) and d (4); load_matrix reads the rows in a. Fills out, int32 (32, 4).
    """
