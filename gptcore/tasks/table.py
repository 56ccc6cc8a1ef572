"""The table of tasks."""

from gptcore.tasks.answer import Answer
from gptcore.tasks.choice import Choose
from gptcore.tasks.classify import Classify
from gptcore.tasks.entities import Entities
from gptcore.tasks.task import Task
from gptcore.tasks.writing import Chat, Write

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Entities, Answer, Choose)}
TEXT_TASKS: dict[str, type[Task]] = {task.name: task for task in (Write, Chat)}  # without a head
