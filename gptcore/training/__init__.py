"""The trainer, its arguments, checkpoints, callbacks and optimizer."""

from gptcore.training.arguments import TrainingArguments
from gptcore.training.callbacks import ProgressLine, TrainerCallback, read_log
from gptcore.training.checkpoint import CheckpointError
from gptcore.training.optim import AdamW
from gptcore.training.sharding import sharded_model
from gptcore.training.signals import TrainingInterrupted
from gptcore.training.state import NonFiniteError, TrainerState, TrainOutput
from gptcore.training.trainer import Trainer

__all__ = [
    "AdamW",
    "CheckpointError",
    "NonFiniteError",
    "ProgressLine",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerState",
    "TrainingArguments",
    "TrainingInterrupted",
    "read_log",
    "sharded_model",
]
