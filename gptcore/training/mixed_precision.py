"""16-bit computation with float32 weights: autocast, and the loss scaling that float16 needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from gptcore import precision
from gptcore.training.arguments import TrainingArguments

MIN_SCALE = 1.0  # below it, gradients overflow float16 though they are not scaled up: training has diverged


class MixedPrecision:
    """What bf16, fp16, tf32 and matmul_precision mean on a device.

    scaler: PyTorch's GradScaler (Micikevicius et al. 2018, section 3.2), which does nothing unless fp16 is True.
    Raises ValueError for a device that does not have what was asked for.
    """

    def __init__(self, args: TrainingArguments, device: torch.device) -> None:
        self.args, self.device = args, device
        self.dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        if args.fp16 and device.type not in ("cpu", "cuda"):
            raise ValueError(f"fp16=True needs a device with float16, cuda or cpu, but the model is on {device}")
        for name, on in (("tf32", args.tf32), ("matmul_precision", args.matmul_precision != "default")):
            if on and device.type != "cuda":
                raise ValueError(f"{name} is {getattr(args, name)}, but it sets how GPUs multiply; {device} is none")
        self.scaler = torch.amp.GradScaler(device.type if args.fp16 else "cpu", enabled=args.fp16)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError for a model whose weights are not float32, as bf16 and fp16 need; warn of a slow dtype."""
        wrong = {str(parameter.dtype) for parameter in model.parameters() if parameter.dtype != torch.float32}
        if self.dtype is not None and wrong:
            name = "bf16" if self.args.bf16 else "fp16"
            raise ValueError(
                f"{name}=True computes in {precision.name(self.dtype)} with float32 weights, but the model has "
                f"{', '.join(sorted(wrong))}; use model.float(), or {name}=False, which trains it in its own dtype "
                "while AdamW keeps the weights in float32 beside it"
            )

    def autocast(self) -> torch.autocast:
        enabled = self.dtype is not None and self.args.parallel != "fsdp"  # FSDP casts by its own policy
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=enabled)

    @contextlib.contextmanager
    def kept_casts(self) -> Iterator[None]:
        """Keep autocast's 16-bit copies of the weights from one micro-batch in this block to the next.

        Not with CUDA graphs, which would repeat the copies of the step that was recorded.
        """
        if self.args.cuda_graph:
            yield
            return
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    @contextlib.contextmanager
    def matmuls(self) -> Iterator[None]:
        """Set the precision of float32 matrix products, and restore it."""
        before = torch.get_float32_matmul_precision()
        if self.args.tf32 or self.args.matmul_precision != "default":
            torch.set_float32_matmul_precision("high" if self.args.tf32 else self.args.matmul_precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
