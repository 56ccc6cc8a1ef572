"""One thread unless a test says otherwise: two fight on a busy machine, and small tensors gain nothing from them.

Without a GPU the Triton kernels run in Triton's interpreter, which must be said before anybody imports triton.

A shell that starts the tests in the background has them ignore SIGINT, which some of them send.
"""

import os
import signal

import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
