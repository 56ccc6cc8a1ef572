"""The plan of a run: what is printed before it spends compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptcore import ops

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer


def plan(trainer: Trainer) -> str:
    """Return what trainer.train() is about to do, in numbers, a line each."""
    args, model = trainer.args, trainer.own_model
    decayed, undecayed = (sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups)
    first = trainer.first_batch().get("input_ids")
    length = first.shape[1] if first is not None and first.dim() > 1 else None
    steps, todo = trainer.total_steps, trainer.total_steps - trainer.state.global_step
    done = f", of which {trainer.state.global_step:,} are done" if trainer.state.global_step else ""
    examples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    sizes = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}"
    lines = [
        ("model", _describe_model(model)),
        ("parameters", f"{decayed + undecayed:,}: {decayed:,} in matrices (weight decay {args.weight_decay:g}), "
                       f"{undecayed:,} in biases and norms (no decay)"),
        ("data", f"{len(trainer.train_dataset):,} examples"),
        ("steps", f"{steps:,}{done}; {trainer.steps_per_epoch:,} an epoch; {examples:,} examples each ({sizes})"),
    ]  # fmt: skip
    if length is not None:
        lines[-2:] = [
            ("data", f"{len(trainer.train_dataset):,} examples of {length:,} tokens, if all are like the first"),
            ("steps", f"{steps:,}{done}; {trainer.steps_per_epoch:,} an epoch; {examples * length:,} tokens each "
                      f"({sizes} x {length})"),
        ]  # fmt: skip
        if hasattr(model, "estimate_flops"):
            flops = flops_per_token(model, length)
            lines += [("compute", f"{flops:,} FLOPs per token, {flops * examples * length * todo:.2e} to do")]
    clipped = f"gradient norm clipped to {args.max_grad_norm:g}" if args.max_grad_norm > 0 else "no clipping"
    lines += [
        ("optimizer", f"AdamW, learning rate {args.learning_rate:g}, {args.lr_scheduler_type}, "
                      f"{args.warmup_steps} steps of warmup, {clipped}"),
        ("dtype", _describe_dtype(next(model.parameters()).dtype, args.bf16)),
        ("device", f"{trainer.device}, {torch.get_num_threads()} threads"),
    ]  # fmt: skip
    if any(type(module).__module__.startswith("gptcore.") for module in model.modules()):
        lines += [("kernels", ": ".join(ops.chosen("attention", next(model.parameters()))))]
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def flops_per_token(model: Any, length: int) -> int:
    """Return the FLOPs of forward and backward for one token in a sequence of `length`, by model.estimate_flops."""
    return int(model.estimate_flops(length, backward=True)) // length


def _describe_model(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    sizes = [getattr(config, name, None) for name in ("n_layer", "n_head", "n_embd", "vocab_size")]
    if not all(isinstance(size, int) for size in sizes):
        return type(model).__qualname__
    return "{:,} layers, {:,} heads, width {}, vocabulary {:,}".format(*sizes)


def _describe_dtype(own: torch.dtype, bf16: bool) -> str:
    if bf16:
        return "bfloat16 by autocast, weights and optimizer float32 (bf16=True)"
    text = f"{str(own).removeprefix('torch.')}, as the model is (bf16=False)"
    return text + ("; AdamW keeps the weights in float32 beside it" if own.itemsize == 2 else "")
