"""Training curves in TensorBoard and Weights & Biases: `report_to`. Both are imported only if asked for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from gptcore.training.arguments import TrainingArguments, report_names
from gptcore.training.callbacks import TrainerCallback

if TYPE_CHECKING:
    from gptcore.training.trainer import Trainer


def make_reports(args: TrainingArguments) -> list[TrainerCallback]:
    """Return a callback for each name in report_to. Raises ImportError for a missing package."""
    kinds: dict[str, type[TrainerCallback]] = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[name]() for name in report_names(args)]


class TensorBoard(TrainerCallback):
    """Writes the numbers of log.jsonl into output_dir/tensorboard. A resumed run hides what it repeats."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f'report_to tensorboard: {error}; pip install "gptcore[tensorboard]"') from error
        self._open = SummaryWriter

    def on_train_begin(self, trainer: Trainer) -> None:
        folder, step = trainer.folder / "tensorboard", trainer.state.global_step
        self.writer = self._open(str(folder), purge_step=step + 1 if step else None)

    def on_log(self, trainer: Trainer, logs: dict[str, Any]) -> None:
        for name, value in logs.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, logs["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        self.writer.close()


class WandB(TrainerCallback):
    """Sends the numbers of log.jsonl to Weights & Biases; with WANDB_MODE=offline into output_dir/wandb."""

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f'report_to wandb: {error}; pip install "gptcore[wandb]"') from error
        self._wandb = wandb

    def on_train_begin(self, trainer: Trainer) -> None:
        config = dataclasses.asdict(trainer.args)
        self.run = self._wandb.init(dir=str(trainer.folder), name=trainer.folder.name, config=config, resume="allow")

    def on_log(self, trainer: Trainer, logs: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in logs.items() if name != "step"}, step=logs["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        self.run.finish()
