"""The refiner benchmark's two language tasks, made from scratch: a dialogue and small programs that are executed."""

from refiner_tasks.code import Code
from refiner_tasks.dialogue import Dialogue
from refiner_tasks.task import Task, Verdict

TASKS: dict[str, type[Task]] = {"dialogue": Dialogue, "code": Code}

__all__ = ["TASKS", "Code", "Dialogue", "Task", "Verdict"]
