"""Tasks: examples from files, fine-tuning, metrics and predictions.

A task is a class in a file of its own (TASKS); what they share is in task.py, the recipe in finetune.py.
"""

from gptcore.tasks.answer import Answer
from gptcore.tasks.choice import Choose
from gptcore.tasks.classify import Classify
from gptcore.tasks.entities import Entities
from gptcore.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Entities, Answer, Choose)}

__all__ = ["TASKS", "Answer", "Choose", "Classify", "Entities", "Task"]
