"""A training step and generation of GPT-2, ours and others': wall time beside the sum of the kernels' times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = dict[str, Any]
Run = Callable[[], object]


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    """GPT-2 as in nanoGPT, in PyTorch's own operations: what torch.compile is measured with."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(NanoBlock(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall(run: Run, device: str, rounds: int) -> float:
    """Return the median wall time of a call in milliseconds, when the device has finished it."""
    times = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def profiled(run: Run, device: str) -> Row:
    """Return the sum of the kernels' times in a call, the launches, and the calls that wait for the device."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if device == "cuda" else [])]) as profile:
        run()
        synchronise(device)
    events = profile.events() or []
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in events]
    return {
        "kernels_ms": sum(event.device_time for event in kernels) / 1e3,
        "launches": sum(name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx") for name in names),
        "waits": sum("Synchronize" in name for name in names) - (device == "cuda"),
        "copies": sum(name.startswith("cudaMemcpy") for name in names),
        "longest": [
            [event.key[:60], round(event.self_device_time_total / 1e3, 4), event.count]
            for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:15]
        ],
    }


def captured(run: Run) -> Run:
    """Return a replay of a call as a CUDA graph. Raises RuntimeError where something in it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def steps(device: str, dry: bool, graphs: bool = False) -> Iterator[Row]:
    """Yield a row for each contestant: forward, backward, clipping and update in bfloat16, 8 x 1024 tokens.

    graphs: forward and backward alone instead, called and replayed as a CUDA graph.
    """
    from benchmarks.models import NO_DROPOUT
    from gptcore import GPT, GPTConfig, ops
    from gptcore.training.optim import AdamW, clip_factor

    small: Any = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 128} if dry else {}
    config = GPTConfig(**small, **NO_DROPOUT)
    ids = torch.randint(config.vocab_size, (2, 64) if dry else (8, 1024), device=device)

    def ours(name: str | None) -> tuple[nn.Module, Callable[[], Tensor]]:
        model = GPT(config).to(device, torch.bfloat16)

        def loss() -> Tensor:
            with ops.use(name):
                return model(ids, labels=ids, return_logits=False).loss

        return model, loss

    def nano() -> tuple[nn.Module, Callable[[], Tensor]]:
        model: Any = NanoGPT(config).to(device, torch.bfloat16)
        return model, lambda: model(ids)

    def compiled(made: tuple[nn.Module, Callable[[], Tensor]]) -> tuple[nn.Module, Callable[[], Tensor]]:
        return made[0], torch.compile(made[1], backend="eager" if dry else "inductor")

    def theirs() -> tuple[nn.Module, Callable[[], Tensor]]:
        from benchmarks.models import transformers_gpt2

        model = transformers_gpt2(GPT(config)).to(device, torch.bfloat16)
        return model, lambda: model(input_ids=ids, labels=ids).loss

    contestants: dict[str, tuple[Callable[[], Any], bool]] = {
        "gptcore": (lambda: ours(None), True),
        "transformers": (theirs, False),
        "nanoGPT-style, torch.compile": (lambda: compiled(nano()), False),
        "gptcore triton": (lambda: ours("torch" if dry else "triton"), True),
        "gptcore, torch.compile": (lambda: compiled(ours(None)), True),
        "nanoGPT-style": (nano, False),
        "gptcore torch": (lambda: ours("torch"), True),
    }
    for name, (make, own) in contestants.items():
        try:
            model, loss = make()
            parameters = list(model.parameters())
            optimizer: Any = AdamW(parameters) if own else torch.optim.AdamW(parameters, fused=not dry)

            def gradients(model: nn.Module = model, loss: Callable[[], Tensor] = loss) -> None:
                model.zero_grad()
                loss().backward()

            def step(run: Run = gradients, optimizer: Any = optimizer, parameters: Any = parameters) -> None:
                run()
                if isinstance(optimizer, AdamW):
                    norm = optimizer.global_norm()
                    optimizer.step(grad_scale=clip_factor(norm, 1.0), found_inf=1.0 - torch.isfinite(norm).float())
                else:
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()

            for _ in range(1 if dry else 5):
                step()
            if graphs:
                if "compile" not in name:
                    ms = wall(gradients, device, 1 if dry else 21)
                    replay = gradients if dry else captured(gradients)
                    yield {"name": name, "ms": ms, "graph_ms": wall(replay, device, 1 if dry else 21)}
                continue
            row = {"name": name, "ms": wall(step, device, 1 if dry else 21)} | profiled(step, device)
            row["gradients_ms"] = wall(gradients, device, 1 if dry else 11)
            if device == "cuda":
                row["memory"] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            yield row
        except Exception as error:
            yield {"name": name, "failure": f"{type(error).__name__}: {error}"[:300]}


def generation(device: str, dry: bool) -> Iterator[Row]:
    """Yield tokens per second of greedy generation, with random weights."""
    from benchmarks.models import transformers_gpt2
    from gptcore import GPT, GPTConfig

    small: Any = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 128} if dry else {}
    model = GPT(GPTConfig(**small)).to(device, torch.bfloat16).eval()
    new = 4 if dry else 128
    for batch in (1, 8):
        prompts = torch.randint(model.config.vocab_size, (batch, 8 if dry else 64), device=device)
        makers: dict[str, Callable[[], Run]] = {
            "gptcore": lambda: lambda: model.generate(prompts, new, eos_token_id=-1),  # noqa: B023
            "transformers": lambda: generated(transformers_gpt2(model).to(device, torch.bfloat16), prompts, new),  # noqa: B023
        }
        for name, make in makers.items():
            try:
                run = make()
                run()
                ms = wall(run, device, 1 if dry else 5)
                yield {"name": name, "batch": batch, "ms": ms, "tokens_per_second": 1e3 * batch * new / ms}
                if name == "gptcore":
                    yield {"name": "gptcore, a profile", "batch": batch} | profiled(run, device)
            except Exception as error:
                yield {"name": name, "batch": batch, "failure": f"{type(error).__name__}: {error}"[:300]}


def generated(model: Any, prompts: Tensor, new: int) -> Run:
    return lambda: model.generate(
        prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        attention_mask=torch.ones_like(prompts),
    )  # fmt: skip
