"""gptcore plan: what a run takes, before it is started."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

import torch

from gptcore.config import PRESETS, GPTConfig
from gptcore.memory import total_memory
from gptcore.training import estimate
from gptcore.training.estimate import CPU_MFU, DEVICES, MFU, Device, clock, sizes

SUMMARY = "Print memory, time, cost and expected loss of a training run, and the command that starts it."

STEP_TOKENS = 2**19  # of GPT-2 and GPT-3 125M
WEBTEXT = 10e9  # tokens that GPT-2's checkpoints have seen, about: 40 GB of text
EPOCHS = 4  # repeated data are nearly as good as new up to here (Muennighoff et al. 2023)
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
HOURS = {"s": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=sorted(PRESETS), help="model (default: the best for --budget or --time)")
    parser.add_argument("--tokens", type=number, help="tokens to train on, as 10B (default: compute-optimal)")
    parser.add_argument("--budget", type=money, help="answer for this much money, as 100usd; needs --price")
    parser.add_argument("--time", type=duration, help="answer for this much time, as 24h, 90min or 7d")
    parser.add_argument("--device", default="cpu", help=f"cpu (measured), or {', '.join(DEVICES)} (default: cpu)")
    parser.add_argument("--count", type=int, default=1, help="devices (default: 1)")
    parser.add_argument("--price", type=float, help="price of a device for an hour, in dollars")
    parser.add_argument("--mfu", type=float, help=f"part of the peak that is used (default: {MFU}, cpu {CPU_MFU})")
    parser.add_argument("--length", type=int, help="tokens in an example (default: the model's n_positions)")
    parser.add_argument("--micro-batch", type=int, help="examples in a pass (default: the most that fit)")
    parser.add_argument(
        "--step-tokens", type=number, default=STEP_TOKENS, help=f"tokens in a step (default: {STEP_TOKENS:,})"
    )
    parser.add_argument("--dtype", choices=("bf16", "float32"), help="of activations (default: bf16, on a CPU float32)")
    parser.add_argument("--data-tokens", type=number, help="tokens of different text at hand (default: --tokens)")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    print("\n".join(f"{name:<15} {text}" for name, text in plan(args)))
    return 0


def plan(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the lines of the plan, each with its name. Raises ValueError for what does not fit together."""
    check(args)
    narrow = args.dtype != "float32" if args.dtype or args.device != "cpu" else False
    dtype = torch.bfloat16 if narrow else torch.float32
    device = device_of(args.device, dtype)
    mfu = args.mfu if args.mfu is not None else CPU_MFU if args.device == "cpu" else MFU
    rate = device.flops * mfu * args.count
    hours = args.time if args.time is not None else None
    if args.budget is not None:
        hours = min(hours or math.inf, args.budget / (args.price * args.count))
    lines: list[tuple[str, str]] = []
    if hours is not None:
        lines += [answer(args, rate, hours)]
    config = config_of(args.preset)
    length = args.length or config.n_positions
    N, per_token = config.num_parameters, estimate.flops_per_token(config, length)
    tokens = args.tokens or estimate.optimal_tokens(N)
    flops = per_token * tokens
    settings: dict[str, Any] = {"dtype": dtype, "processes": args.count}
    seconds = flops / rate
    cost = "" if args.price is None else f", {seconds / 3600 * args.price * args.count:,.0f} dollars"
    priced = "give --price" if args.price is None else f"price {args.price:g} dollars a device and hour"
    lines += [
        ("model", f"{args.preset}: {N:,} parameters, {config.n_layer} layers, width {config.n_embd}"),
        ("compute", f"{per_token / 1e6:,.1f} MFLOP a token, {flops:.3g} FLOPs for {short(tokens)} tokens"),
        ("time", f"{clock(seconds)}{cost} on {args.count} x {args.device} at {device.flops / 1e12:,.4g} TFLOP/s "
                 f"(assumed: MFU {mfu:g}; {priced})"),
        ("law", f"compute-optimal with {short(estimate.optimal_tokens(N))} tokens; predicted loss "
                f"{estimate.predicted_loss(N, tokens):.2f} nats a token of Chinchilla's data"),
        ("start from", start_from(args, tokens, device)),
    ]  # fmt: skip

    def largest(**sharding: Any) -> dict[bool, int]:
        """Return the most examples that fit, by whether blocks are recomputed."""
        options = {**settings, **sharding}
        return {
            recompute: estimate.largest_batch(config, length, device.memory, recompute=recompute, **options)
            for recompute in (False, True)
        }

    batches = largest()
    fsdp = args.count > 1 and batches[True] == 0
    if fsdp:
        batches = largest(fsdp=True, micro_batches=2)  # several passes, so with the whole gradient
    if args.micro_batch is not None and args.micro_batch > batches[True]:
        raise ValueError(f"--micro-batch is {args.micro_batch}, but {batches[True]} fit on {args.device}, recomputing")
    recompute = (args.micro_batch or 1) > batches[False]
    batch = args.micro_batch or min(batches[recompute], max(1, int(args.step_tokens) // length // args.count))
    shown = max(1, batch)
    options: dict[str, dict[str, Any]] = {"data parallel": {}, "  recomputing": {"recompute": True}}
    options |= {"FSDP": {"fsdp": True}} if args.count > 1 else {}
    for name, option in options.items():
        found = estimate.memory(config, shown, length, **settings, **option)
        note = ", with --parallel fsdp" if name == "FSDP" else ""
        lines += [(name, f"{sizes(found)} with {shown} x {length} tokens in a pass{note}")]
    fits = f"{batches[False]} examples of {length} tokens in a pass, {batches[True]} when recomputing"
    fits += ", with --parallel fsdp" if fsdp else ""
    lines += [("fits", f"{fits}, into {estimate.USABLE:.0%} of {device.memory / 1e9:,.0f} GB")]
    if batch == 0:
        return [*lines, ("command", f"one example does not fit on {args.device}; take a larger device")]
    return [*lines, ("command", command(args, config, batch, recompute, length, tokens, narrow, fsdp))]


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that are out of range or do not fit together."""
    args.device = args.device.lower()
    if args.device not in (*DEVICES, "cpu"):
        raise ValueError(f"--device {args.device} is not known; expected cpu, {', '.join(DEVICES)}")
    for name, low in (("count", 1), ("length", 2), ("micro_batch", 1), ("price", 0), ("mfu", 0), ("step_tokens", 1)):
        value = getattr(args, name)
        if value is not None and (value < low or value == 0):
            wanted = f"{low} or more" if low else "more than 0"
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {wanted}")
    if args.mfu is not None and args.mfu > 1:
        raise ValueError(f"--mfu is {args.mfu}, expected a part of the peak, at most 1")
    if args.budget is not None and args.price is None:
        raise ValueError("--budget needs --price, the dollars for a device and an hour")
    if args.tokens is not None and (args.budget is not None or args.time is not None):
        raise ValueError("--tokens would have no effect, because --budget or --time decides; leave it out")
    if args.preset is None and args.budget is None and args.time is None:
        raise ValueError("expected --preset, or --budget or --time to choose one")


def config_of(preset: str) -> GPTConfig:
    """Return a preset without dropout, as `gptcore train` trains by default."""
    return GPTConfig.preset(preset, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def device_of(name: str, dtype: torch.dtype) -> Device:
    """Return the device of the table, or this CPU as measured."""
    return DEVICES[name] if name in DEVICES else Device(estimate.measured_flops(dtype), float(total_memory()))


def answer(args: argparse.Namespace, rate: float, hours: float) -> tuple[str, str]:
    """Choose --preset and --tokens for so many hours; return the line that says so."""
    flops = rate * hours * 3600
    N, D = estimate.optimal_size(flops)
    if args.preset is None:
        names = [name for name in PRESETS if name != "gpt" and config_of(name).n_positions >= 1024]
        args.preset = min(names, key=lambda name: abs(math.log(config_of(name).num_parameters / N)))
    config = config_of(args.preset)
    args.tokens = flops / estimate.flops_per_token(config, args.length or config.n_positions)
    text = f"{clock(hours * 3600)} on {args.count} x {args.device} are {flops:.3g} FLOPs: compute-optimal are "
    text += f"{short(N)} parameters and {short(D)} tokens; {args.preset} gets {short(args.tokens)} tokens"
    return "budget", text


def start_from(args: argparse.Namespace, tokens: float, device: Device) -> str:
    """Return whether to train from scratch, or from which checkpoint, by the text and the memory at hand."""
    text = args.data_tokens or tokens
    if EPOCHS * text >= WEBTEXT:
        return f"scratch: {EPOCHS} epochs of {short(text)} tokens are no fewer than the {short(WEBTEXT)} of GPT-2"
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    sizes = ["gpt2-xl", "gpt2-large", "gpt2-medium", "gpt2"]
    fit = [name for name in sizes if estimate.largest_batch(config_of(name), 1024, device.memory, dtype=dtype)]
    if not fit:
        return "scratch: no checkpoint of GPT-2 fits into the memory"
    return (
        f"the checkpoint {fit[0]}, the largest that fits: {EPOCHS} epochs of {short(text)} tokens are fewer than the "
        f"{short(WEBTEXT)} that it has seen"
    )


def command(
    args: argparse.Namespace,
    config: GPTConfig,
    batch: int,
    recompute: bool,
    length: int,
    tokens: float,
    narrow: bool,
    fsdp: bool,
) -> str:
    """Return the command that starts the run; its micro-batches are a power of two for each process."""
    passes = max(1.0, args.step_tokens / (batch * length * args.count))
    micro_batches = args.count * 2 ** round(math.log2(passes))
    steps = max(1, math.ceil(tokens / (micro_batches * batch * length)))
    model = {field: getattr(config, field) for field in ("n_layer", "n_embd", "n_head", "n_positions")}
    model["n_positions"] = max(length, config.n_positions)
    options = [f"--{name.replace('_', '-')} {value}" for name, value in model.items()]
    options += [f"--attention-window {config.attention_window}"] if config.attention_window else []
    options += [f"--block-size {length}", f"--per-device-train-batch-size {batch}"]
    options += [f"--gradient-accumulation-steps {micro_batches}", f"--max-steps {steps}"]
    options += ["--bf16"] if narrow else []
    options += ["--gradient-checkpointing"] if recompute else []
    options += ["--parallel fsdp"] if fsdp else []
    start = f"torchrun --nproc-per-node {args.count} -m gptcore" if args.count > 1 else "gptcore"
    return f"{start} train FILE... {' '.join(options)}"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """Return 10.3B for 1.03e10."""
    for unit in ("T", "B", "M", "K"):
        if value >= UNITS[unit.lower()]:
            return f"{value / UNITS[unit.lower()]:.3g}{unit}"
    return f"{value:.0f}"


def number(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmbt]?)", text.lower().replace(",", ""))
    if match is None:
        raise ValueError(text)
    return float(match[1]) * UNITS[match[2]]


def money(text: str) -> float:
    return number(text.lower().removesuffix("usd").strip(" $"))


def duration(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)(s|m|min|h|d)", text.lower())
    if match is None:
        raise ValueError(text)
    return float(match[1]) * HOURS[match[2]]


number.__name__, money.__name__, duration.__name__ = "number, as 10B", "sum, as 100usd", "time, as 24h or 90min"
