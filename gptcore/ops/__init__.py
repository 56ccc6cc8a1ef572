"""The operations of a GPT, one function each, with the same arguments and errors on every backend.

`backends()` lists the backends, and why any is unavailable. The argument `backend=` chooses one for a call, `use(name)`
for the current thread or a `with` block, `set_default_backend(name)` for the process.
"""

from gptcore.ops.attention import attention, attention_qkvpacked, attention_with_lse
from gptcore.ops.gelu import gelu
from gptcore.ops.layer_norm import layer_norm
from gptcore.ops.linear import linear
from gptcore.ops.linear_cross_entropy import linear_cross_entropy
from gptcore.ops.quantized_linear import quantized_linear
from gptcore.ops.registry import backends, chosen, in_use, set_default_backend, use

__all__ = [
    "attention",
    "attention_qkvpacked",
    "attention_with_lse",
    "backends",
    "chosen",
    "gelu",
    "in_use",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "quantized_linear",
    "set_default_backend",
    "use",
]
