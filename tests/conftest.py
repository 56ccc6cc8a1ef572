"""One thread unless a test says otherwise: two fight on a busy machine, and small tensors gain nothing from them.

Without a GPU the Triton kernels run in Triton's interpreter, which must be said before anybody imports triton.
"""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
