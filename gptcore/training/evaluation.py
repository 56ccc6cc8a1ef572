"""The loss on the evaluation dataset, shared by the processes and added up in the order of one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gptcore.modes import module_mode
from gptcore.training.distributed import ProcessGroupError
from gptcore.training.random_state import keyed, own_randomness, seed_everything

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Return what Trainer.evaluate does, before callbacks get it."""
    if trainer.eval_dataset is None:
        raise ValueError("evaluate() needs an eval_dataset")
    lengths = [length for (length,) in trainer.processes.gather([len(trainer.eval_dataset)])]
    if wrong := [rank for rank, length in enumerate(lengths) if length != lengths[0]]:
        found = f"{lengths[wrong[0]]} examples on rank {wrong[0]}, but {lengths[0]} on rank 0"
        raise ProcessGroupError(f"processes of one run must not differ, but eval_dataset has {found}")
    size = trainer.args.per_device_eval_batch_size
    starts = range(0, len(trainer.eval_dataset), size)
    sharded = trainer.args.parallel == "fsdp"
    sums = torch.zeros(2, len(starts), dtype=torch.float64, device=trainer.device)  # losses and targets of the batches
    with own_randomness(trainer.args.seed), module_mode(trainer.model, training=False), torch.no_grad():
        for first in range(0, len(starts), trainer.processes.count):
            number = min(first + trainer.processes.rank, len(starts) - 1)
            seed_everything(keyed(trainer.args.seed, number, 0, 3))
            indices = range(starts[number], min(starts[number] + size, len(trainer.eval_dataset)))
            batch = trainer.data_collator([trainer.eval_dataset[index] for index in indices])
            count = trainer.count_targets(batch) if number == first + trainer.processes.rank else 0
            loss = trainer.loss_of(batch) if count or sharded else None  # FSDP communicates in each pass
            if loss is not None and count:
                sums[0, number], sums[1, number] = loss.double() * count, count
    if sharded:
        trainer.own_model.reshard()  # type: ignore[operator]  # a backward pass does it otherwise
    if trainer.processes.count > 1:
        trainer.processes.add(sums)  # each number comes from one process, the others add zeros
    losses, counts = sums.tolist()
    if not (targets := sum(counts)):
        raise ValueError("eval_dataset has not one label that counts")
    loss = sum(losses) / targets
    metrics = {"eval_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    return metrics
