"""Runs untrusted straight-line programs in a process of its own, hundreds in a few milliseconds.

Three walls. A program is parsed and refused unless it consists of assignments to ``x``, ``print`` of integers and
their sums, differences and products: no names but ``x``, no attributes, no calls, no loops, so it ends. It is executed
without builtins. And that happens in a worker process with no files to open, no room to write and bounded memory and
time, which is killed and replaced when it does not answer.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS = 500
MAX_BITS = 256
MAX_PRODUCTS = 12
_ALLOWED = (
    *(ast.Module, ast.Assign, ast.AugAssign, ast.Expr, ast.Name, ast.Load, ast.Store, ast.Constant),
    *(ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.USub, ast.UAdd),
)


@dataclass(frozen=True)
class Outcome:
    """What came of one program.

    Args:
        ok: whether it ran on every input.
        printed: what it printed on each input, in order; empty unless ``ok``.
    """

    ok: bool
    printed: tuple[tuple[int, ...], ...] = ()


class Sandbox:
    """A worker process that executes programs, started when first needed.

    Args:
        timeout: seconds for one call of `run`, after which the worker is killed and all its programs have failed.
        memory: bytes that the worker may map.
    """

    def __init__(self, *, timeout: float = 5.0, memory: int = 256 * 2**20) -> None:
        self.timeout, self.memory = timeout, memory
        self._worker: subprocess.Popen[str] | None = None
        self._known: dict[tuple[str, tuple[int, ...]], Outcome] = {}

    def run(self, programs: Sequence[tuple[str, tuple[int, ...]]]) -> list[Outcome]:
        """Return the outcome of each program on each of its inputs, which it finds in ``x``."""
        new = [each for each in dict.fromkeys(programs) if each not in self._known]
        if new:
            if len(self._known) > 100_000:
                self._known = {each: self._known[each] for each in programs if each in self._known}
            self._known |= dict(zip(new, self._ask(new), strict=False))
        return [self._known.get(each, Outcome(False)) for each in programs]

    def close(self) -> None:
        """End the worker; the next `run` starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _ask(self, programs: list[tuple[str, tuple[int, ...]]]) -> list[Outcome]:
        """Return the worker's answers; none if it died."""
        if self._worker is None:
            command = [sys.executable, "-I", "-S", __file__, str(self.memory)]
            self._worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={}
            )
        worker = self._worker
        alarm = threading.Timer(self.timeout, worker.kill)
        alarm.start()
        try:
            worker.stdin.write(json.dumps(programs) + "\n")
            worker.stdin.flush()
            answers = json.loads(worker.stdout.readline())
        except (OSError, ValueError):  # it was killed, or died
            self.close()
            return []
        finally:
            alarm.cancel()
        return [
            Outcome(False) if answer is None else Outcome(True, tuple(tuple(values) for values in answer))
            for answer in answers
        ]

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def execute(program: str, inputs: Sequence[int]) -> list[list[int]] | None:
    """Return what ``program`` prints on each input, or None if it is refused or fails."""
    try:
        code = _checked(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    outputs = []
    for x in inputs:
        printed: list[int] = []
        try:
            exec(code, {"__builtins__": {}, "print": lambda *values, to=printed: to.extend(values), "x": x})
        except Exception:
            return None
        if any(type(value) is not int or value.bit_length() > MAX_BITS for value in printed):
            return None
        outputs.append(printed)
    return outputs


def _checked(program: str) -> Any:
    if len(program) > MAX_CHARACTERS:
        raise ValueError("too long")
    tree = ast.parse(program.strip())
    calls = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            call = node.value
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"):
                raise ValueError("only print may be called, as a statement")
            calls |= {call, call.func}
        elif node in calls:
            continue
        elif not isinstance(node, _ALLOWED):
            raise ValueError(f"{type(node).__name__} is not allowed")
        elif isinstance(node, ast.Name) and node.id != "x":
            raise ValueError("x is the only name")
        elif isinstance(node, ast.Constant) and (type(node.value) is not int or node.value.bit_length() > MAX_BITS):
            raise ValueError("only integers of moderate size")
    if sum(isinstance(node, ast.Mult) for node in ast.walk(tree)) > MAX_PRODUCTS:
        raise ValueError("too many products")  # x *= x doubles the digits each time
    return compile(tree, "<program>", "exec")


def _serve() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    for line in sys.stdin:
        answers = [execute(program, inputs) for program, inputs in json.loads(line)]
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
