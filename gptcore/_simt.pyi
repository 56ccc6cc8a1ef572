"""The CUDA kernels in a model of a GPU. Use gptcore.ops with backend="simt"; see docs/simt.md.

The operations are those of gptcore._C, on tensors on the CPU, with the `execution` of a GPU.
"""

from torch import Tensor

from gptcore._C import attention_backward as attention_backward
from gptcore._C import attention_forward as attention_forward
from gptcore._C import attention_takes as attention_takes
from gptcore._C import check_memory as check_memory
from gptcore._C import check_segments as check_segments
from gptcore._C import gelu_backward as gelu_backward
from gptcore._C import gelu_forward as gelu_forward
from gptcore._C import layer_norm_backward as layer_norm_backward
from gptcore._C import layer_norm_forward as layer_norm_forward
from gptcore._C import segments as segments

class SimtError(RuntimeError):
    """A kernel broke a rule of the GPU: which, where, by which block and thread, at which element of which tensor."""

def configure(*, order: str = "forward", seed: int = 0, threads: int = 0, count: bool = False) -> None:
    """How launches run from now on.

    order: of blocks, warps and lanes: forward, reverse, or random with this seed.
    threads: of the CPU, 0 for as many as OpenMP takes.
    count: whether memory traffic and bank conflicts are counted, which takes a third more time.
    """

def counters() -> dict[str, dict[str, int]]:
    """By kernel, the sums over its launches since the last reset.

    bank_conflicts are passes through the 32 banks of shared memory beyond the least for each warp's request; sectors
    are the different 32-byte pieces of global memory that each request touches.
    """

def waste() -> dict[str, list[tuple[str, int, int]]]:
    """By kernel, the source lines with bank conflicts or more sectors than their bytes need, and how many of each."""

def reset_counters() -> None:
    """Set all of them to zero."""

def tiles(head_dim: int, element_size: int) -> dict[str, int | tuple[int, int]]:
    """Of kernels/cuda/policy.h: the width that head_dim is padded to, and the rows and columns of a tile of scores."""

def examples() -> dict[str, str]:
    """Small kernels that can break a rule, and the rule; see csrc/simt/examples.cu."""

def run_example(name: str, broken: bool, x: Tensor, out: Tensor) -> None:
    """Run one on x, (64, 4) with strides (8, 1), and out, (128, 4), both float32."""

def run_fragments(op: str, words: Tensor, out: Tensor) -> None:
    """Run mma_bfloat16, mma_float16, mma_tf32, load_matrix or load_matrix_trans on each lane's words, int32 (32, 10).

    They are a (4), b (2) and d (4), of which a is the rows to load. Fills out, int32 (32, 4).
    """
