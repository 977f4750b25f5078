"""Methods of one host object that are replaced for a while, and put back just as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from guardrails import AttachError


class Overlay:
    """Functions that stand in an object's instance dictionary, before those of its class, while installed.

    They are the only trace of it: the class and other objects are left alone.

    Args:
        owner: the object.
        methods: name to what is called in its place.
    """

    def __init__(self, owner: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
        self.owner, self.methods = owner, dict(methods)
        self._before = {name: vars(owner)[name] for name in methods if name in vars(owner)}

    def install(self) -> None:
        """Put the methods in."""
        vars(self.owner).update(self.methods)

    def check(self) -> None:
        """Raise AttachError if something else has replaced one of the methods since."""
        for name, method in self.methods.items():
            if vars(self.owner).get(name) is not method:
                raise AttachError(
                    f"{type(self.owner).__name__}.{name} was replaced after the model was wrapped, so it cannot be "
                    "put back. Undo that replacement first, then call unwrap(model)."
                )

    def remove(self) -> None:
        """Put back what was there; all of it or, if something else has replaced a method, nothing.

        Raises:
            AttachError: see `check`.
        """
        self.check()
        for name in self.methods:
            del vars(self.owner)[name]
        vars(self.owner).update(self._before)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Take the methods out for a block, such as while the object is pickled."""
        self.remove()
        try:
            yield
        finally:
            self.install()
