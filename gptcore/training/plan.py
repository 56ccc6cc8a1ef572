"""The plan of a run: what is printed before it spends compute."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptcore import ops
from gptcore.config import GPTConfig
from gptcore.training import estimate
from gptcore.training.arguments import warmup_steps

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer


def plan(trainer: Trainer) -> str:
    """Return what trainer.train() is about to do, in numbers, a line each."""
    args, model = trainer.args, trainer.own_model
    decayed, undecayed = (sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups)
    first = trainer.batches.first().get("input_ids")
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
            total = flops * examples * length * todo
            lines += [("compute", f"{flops:,} FLOPs per token, {total:.2e} to do")]
            if (peak := estimate.peak_flops(trainer)) is not None:
                mfu, count = estimate.CPU_MFU if trainer.device.type == "cpu" else estimate.MFU, trainer.processes.count
                assumed = f"(assumed: MFU {mfu:g} of {count} x {peak / 1e12:.3g} TFLOP/s)"
                lines += [("time", f"{estimate.clock(total / (peak * mfu * count))} {assumed}")]
        if isinstance(config := getattr(model, "config", None), GPTConfig):
            each = args.gradient_accumulation_steps // trainer.processes.count
            dtype = trainer.precision.dtype or next(model.parameters()).dtype
            found = estimate.memory(
                config, args.per_device_train_batch_size, length, dtype=dtype, recompute=args.gradient_checkpointing,
                processes=trainer.processes.count, micro_batches=max(1, each), fsdp=args.parallel == "fsdp",
            )  # fmt: skip
            if hasattr(model, "adapters"):
                trained = (decayed + undecayed) / config.num_parameters
                kinds = {name: int(getattr(found, name) * trained) for name in ("gradients", "moments", "kept")}
                found = dataclasses.replace(found, **kinds)
            lines += [("memory", estimate.sizes(found))]
    clipped = f"gradient norm clipped to {args.max_grad_norm:g}" if args.max_grad_norm > 0 else "no clipping"
    lines += [
        ("optimizer", f"AdamW, learning rate {args.learning_rate:g}, {args.lr_scheduler_type}, "
                      f"{warmup_steps(args, trainer.total_steps)} steps of warmup, {clipped}"),
        ("dtype", _describe_dtype(next(model.parameters()).dtype, trainer)),
        ("device", f"{trainer.device}, {torch.get_num_threads()} threads{_describe_processes(trainer)}"),
    ]  # fmt: skip
    if any(type(module).__module__.startswith("gptcore.") for module in model.modules()):
        lines += [("kernels", ": ".join(ops.chosen("attention", next(model.parameters()))))]
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def correction(trainer: Trainer, first_step: int) -> str:
    """Return what the steps since first_step say about the rest of the run."""
    done, left = trainer.state.global_step - first_step, trainer.total_steps - trainer.state.global_step
    total = trainer.state.total
    tokens, seconds = (total.tokens - trainer.begun.tokens), (total.seconds - trainer.begun.seconds)
    text = f"after {done} steps: {tokens / seconds:,.0f} tokens/s, so {estimate.clock(seconds / done * left)} left"
    if trainer.flops is not None and (peak := estimate.peak_flops(trainer)) is not None:
        text += f", MFU {trainer.flops * tokens / seconds / (peak * trainer.processes.count):.2f}"
    if trainer.device.type == "cuda":
        text += f"; {torch.cuda.max_memory_allocated(trainer.device) / 1e9:,.2f} GB at the peak"
    return text


def flops_of(trainer: Trainer) -> int | None:
    """Return the FLOPs of a token of the first example; None for a model or data that do not tell."""
    first = trainer.batches.first().get("input_ids")
    if first is None or first.dim() < 2 or not hasattr(trainer.own_model, "estimate_flops"):
        return None
    return flops_per_token(trainer.own_model, first.shape[1])


def flops_per_token(model: Any, length: int) -> int:
    """Return the FLOPs of forward and backward for one token in a sequence of `length`, by model.estimate_flops."""
    return int(model.estimate_flops(length, backward=True)) // length


def _describe_model(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    sizes = [getattr(config, name, None) for name in ("n_layer", "n_head", "n_embd", "vocab_size")]
    if not all(isinstance(size, int) for size in sizes):
        return type(model).__qualname__
    return "{:,} layers, {:,} heads, width {}, vocabulary {:,}".format(*sizes)


def _describe_processes(trainer: Trainer) -> str:
    if (count := trainer.processes.count) == 1:
        return ""
    if trainer.args.parallel == "fsdp":
        return f"; {count} processes, each with a part of the model (fsdp): bits depend on their number"
    exact = "the bits of one process" if trainer.args.gradient_reduction == "tree" else "bits depend on their number"
    return f"; {count} processes, gradients added by {trainer.args.gradient_reduction}: {exact}"


def _describe_dtype(own: torch.dtype, trainer: Trainer) -> str:
    by = "FSDP's policy" if trainer.args.parallel == "fsdp" else "autocast"
    if trainer.args.bf16:
        return f"bfloat16 by {by}, weights and optimizer float32 (bf16=True)"
    if trainer.args.fp16:
        scale = trainer.precision.scaler.get_scale()
        return f"float16 by {by}, loss scaled by {scale:g}, weights and optimizer float32 (fp16=True)"
    text = f"{str(own).removeprefix('torch.')}, as the model is (bf16=False)"
    return text + ("; AdamW keeps the weights in float32 beside it" if own.itemsize == 2 else "")
