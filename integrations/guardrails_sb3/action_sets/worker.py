"""A thread that is given a job and so much time for it; who waits is never held up for longer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

Job = Callable[[], None]


@dataclass(eq=False)
class _Order:
    job: Job
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Worker:
    """Runs jobs one after the other in a daemon thread, which is started by the first of them.

    A copy, pickled or not, has no thread until it is given a job.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[_Order] | None = None
        self._last: _Order | None = None

    def __reduce__(self) -> tuple[type[Worker], tuple[()]]:
        return Worker, ()

    def run(self, job: Job, seconds: float) -> bool:
        """Run ``job`` and return whether it was done within ``seconds``; what it raised in that time is raised here.

        While a job of an earlier call is still running nothing is begun, so that a slow one delays none after it.
        """
        if self._last is not None and not self._last.done.is_set():
            return False
        if self._orders is None:
            self._orders = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._orders,), name="guardrails-shield", daemon=True).start()
        order = self._last = _Order(job)
        self._orders.put(order)
        done = order.done.wait(seconds)
        if done and order.error is not None:
            raise order.error
        return done


def _work(orders: queue.SimpleQueue[_Order]) -> None:
    while True:
        order = orders.get()
        try:
            order.job()
        except BaseException as error:
            order.error = error
        finally:
            order.done.set()
