"""One thread unless a test says otherwise: two fight on a busy machine, and small tensors gain nothing from them."""

import torch

torch.set_num_threads(1)
