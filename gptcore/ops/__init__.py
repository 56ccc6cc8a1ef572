"""The operations that GPT is made of, one function each, the same whatever runs them.

`backends()` says what can run them here, and of what cannot, why; `use(name)` chooses for all calls to come or for a
`with` block; the argument `backend=` chooses for one call.
"""

from gptcore.ops.attention import attention, attention_qkvpacked
from gptcore.ops.gelu import gelu
from gptcore.ops.layer_norm import layer_norm
from gptcore.ops.linear import linear
from gptcore.ops.linear_cross_entropy import linear_cross_entropy
from gptcore.ops.registry import backends, chosen, in_use, use

__all__ = [
    "attention",
    "attention_qkvpacked",
    "backends",
    "chosen",
    "gelu",
    "in_use",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "use",
]
