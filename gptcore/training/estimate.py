"""What a run takes before it is started: FLOPs, bytes by kind, time, and the loss that a scaling law predicts.

Sources: Chowdhery et al. 2022 (PaLM), appendix B, for FLOPs; Korthikanti et al. 2022, section 4, for activations,
counted here for gptcore's kernels; Hoffmann et al. 2022 (Chinchilla), approach 3, with the constants of Besiroglu et
al. 2024 (arXiv:2404.10102), since the printed ones do not reproduce the paper's own table.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.precision import fastest

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer

E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658  # L(N, D) = E + A / N^ALPHA + B / D^BETA
LOSS_ROWS = 512  # tokens whose logits linear_cross_entropy holds at a time
USABLE = 0.92  # part of a device's memory that a run may fill: the rest is the context and fragmentation
MFU = 0.4  # of GPUs: published runs have 0.29 (nanoGPT) to 0.60 (llm.c) for 124M parameters on A100s
CPU_MFU = 0.5  # of the measured rate of matrix products


class Device(NamedTuple):
    """A device: dense FLOP/s in 16 bits without sparsity, and bytes of memory, from the data sheets."""

    flops: float
    memory: float


DEVICES = {
    "b200": Device(2250e12, 180e9), "gb200": Device(2500e12, 186e9), "h200": Device(989e12, 141e9),
    "h100": Device(989e12, 80e9), "h100-pcie": Device(756e12, 80e9), "h100-nvl": Device(835e12, 94e9),
    "a100": Device(312e12, 80e9), "a100-40gb": Device(312e12, 40e9), "a40": Device(149.7e12, 48e9),
    "a30": Device(165e12, 24e9), "l40s": Device(362e12, 48e9), "l4": Device(121e12, 24e9),
    "mi300x": Device(1307e12, 192e9), "mi250x": Device(383e12, 128e9), "rtx5090": Device(209.5e12, 32e9),
    "rtx4090": Device(165.2e12, 24e9), "rtx3090": Device(71e12, 24e9), "v100": Device(125e12, 32e9),
    "t4": Device(65e12, 16e9),
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind, of a step with one micro-batch or more."""

    weights: int
    gradients: int
    moments: int
    activations: int  # kept for the backward pass
    logits: int  # and the buffers of the loss
    communication: int
    kept: int = 0  # sums of gradients that are kept while other micro-batches run

    @property
    def total(self) -> int:
        """Return the peak: activations are freed as gradients appear, layer by layer."""
        begin, end = self.activations + self.logits, self.gradients + self.communication
        return self.weights + self.moments + self.kept + max(begin, end)


def memory(
    config: GPTConfig,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    processes: int = 1,
    fsdp: bool = False,
    micro_batches: int = 1,
) -> Memory:
    """Return the bytes that a process of a run takes; float32 weights, activations of `dtype` by autocast.

    micro_batches: of one process in a step; their gradients are added in a tree, whose open nodes are kept.
    """
    N, C, tokens = config.num_parameters, config.n_embd, batch * length
    inner = config.n_inner if config.n_inner is not None else 4 * C
    narrow = dtype.itemsize == 2
    shards = processes if fsdp else 1
    # A block keeps the residual stream twice, two norms' outputs, q, k and v, the attention output and its LSE, and the
    # MLP before and after GELU. Dropout keeps a mask and what it scales
    size = dtype.itemsize
    kept = 8 * C * size + 2 * inner * size + config.n_head * 4 + 16
    kept += (config.resid_pdrop > 0) * 2 * C
    block = tokens * kept
    stream = tokens * C * size
    layers = config.n_layer * (2 * stream if recompute else block) + (block if recompute else 0)
    # Ids, positions and targets; gradients of the residual stream and, in the first block of the backward pass, of GELU
    ends = tokens * 8 * 4 + (stream if recompute else 2 * stream + tokens * inner * size)
    cast = 2 * (N - config.n_positions * C) if narrow and not fsdp else 0  # autocast's copies of the weights
    head = config.vocab_size * C * 4
    rows = min(LOSS_ROWS, tokens)
    logits = rows * config.vocab_size * (4 + (2 if narrow else 0)) + stream
    working = 2 * (N - head // 4) // max(1, config.n_layer) * size if fsdp else 0  # two blocks, gathered
    open_nodes = 0 if fsdp else (micro_batches - 1).bit_length()
    return Memory(
        weights=4 * N // shards + working,
        gradients=4 * N // (1 if micro_batches > 1 else shards),  # FSDP shards them in the last pass
        moments=8 * N // shards,
        activations=layers + ends + cast,
        logits=logits,
        communication=0 if processes == 1 else 2 * max(head, 1 << 25) // shards,
        kept=open_nodes * 4 * N // shards,
    )


def largest_batch(config: GPTConfig, length: int, available: float, **settings: object) -> int:
    """Return the most rows of `length` tokens in a micro-batch that fit into `available` bytes; 0 if none does."""

    def fits(batch: int) -> bool:
        return memory(config, batch, length, **settings).total <= USABLE * available  # type: ignore[arg-type]

    low, high = 0, 1
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@functools.lru_cache(maxsize=8)
def flops_per_token(config: GPTConfig, length: int) -> float:
    """Return the FLOPs of forward and backward for a token in a sequence of `length`, counted from the modules."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config, n_positions=max(length, config.n_positions)))
    return model.estimate_flops(length, backward=True) / length


def predicted_loss(parameters: float, tokens: float) -> float:
    """Return the loss, in nats a token of Chinchilla's data, that the law predicts."""
    return float(E + A / parameters**ALPHA + B / tokens**BETA)


def optimal_tokens(parameters: float) -> float:
    """Return the number of tokens with which a model of this size is compute-optimal."""
    scale = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return float((parameters / scale) ** ((ALPHA + BETA) / BETA) / parameters)


def optimal_size(flops: float) -> tuple[float, float]:
    """Return the parameters and the tokens of the lowest predicted loss for these FLOPs, as 6 N D."""
    scale = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    parameters = scale * (flops / 6) ** (BETA / (ALPHA + BETA))
    return float(parameters), float(flops / 6 / parameters)


def peak_flops(trainer: Trainer) -> float | None:
    """Return the FLOP/s of a trainer's device: as given, of a table, or as measured on a CPU that prints progress."""
    if trainer.args.peak_flops is not None or (trainer.device.type == "cpu" and trainer.args.disable_tqdm):
        return trainer.args.peak_flops
    if trainer.device.type == "cpu":
        return measured_flops(trainer.precision.dtype or next(trainer.model.parameters()).dtype)
    return known_flops(trainer.device)


@functools.cache
def measured_flops(dtype: torch.dtype) -> float:
    """Return the FLOP/s of matrix products on this CPU; takes 0.2 seconds."""
    n = 768
    a = torch.zeros(n, n, dtype=dtype, device="cpu")
    (seconds,) = fastest([lambda: a @ a], seconds=0.2)
    return 2 * n**3 / seconds


def known_flops(device: torch.device) -> float | None:
    """Return the peak of a GPU by its name, in FLOP/s of 16 bits; None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    special = {"h100pcie": "h100-pcie", "h100nvl": "h100-nvl", "a100-pcie-40gb": "a100-40gb", "a100-sxm4-40gb": "a100"}
    names = {**{key: key for key in DEVICES}, **special}
    found = [names[key] for key in sorted(names, key=len, reverse=True) if key in name]
    return DEVICES[found[0]].flops if found else None


def sizes(memory: Memory) -> str:
    """Return the peak in GB, and its parts."""
    fields = ("weights", "gradients", "moments", "activations", "logits", "communication")
    parts = ", ".join(f"{name} {getattr(memory, name) / 1e9:,.2f}" for name in fields)
    return f"{memory.total / 1e9:,.2f} GB at the peak ({parts})"


def clock(seconds: float) -> str:
    """Return a duration in the unit that fits it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
