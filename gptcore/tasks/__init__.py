"""Tasks: examples from files, fine-tuning, metrics and predictions.

A task is a class in a file of its own, listed in table.py; what tasks share is in task.py, the recipe in recipe.py.
"""

from gptcore.tasks.answer import Answer
from gptcore.tasks.choice import Choose
from gptcore.tasks.classify import Classify
from gptcore.tasks.entities import Entities
from gptcore.tasks.pipelines import pipeline
from gptcore.tasks.recipe import FinetuneOptions, finetune
from gptcore.tasks.table import TASKS, TEXT_TASKS
from gptcore.tasks.task import Task
from gptcore.tasks.writing import Chat, Write

__all__ = [
    "TASKS",
    "TEXT_TASKS",
    "Answer",
    "Chat",
    "Choose",
    "Classify",
    "Entities",
    "FinetuneOptions",
    "Task",
    "Write",
    "finetune",
    "pipeline",
]
