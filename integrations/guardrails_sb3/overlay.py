"""Methods of one host object that are replaced for a while, and put back just as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from guardrails import AttachError


class Overlaid:
    """A function that stands in one object, and in no copy of it: there it would go on acting on the first.

    Args:
        method: what is called.
        owner: the name of the object's class.
    """

    def __init__(self, method: Callable[..., Any], owner: str) -> None:
        functools.update_wrapper(self, method)
        self.method, self._owner = method, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise AttachError(
            f"This {self._owner} is guarded, and a copy would act through the guard of the original. Call "
            "unwrap(model), copy it, and wrap both with guards of their own; or save it and load that."
        )


class Overlay:
    """Functions that stand in an object's instance dictionary, before those of its class, while installed.

    They are the only trace of it: the class and other objects are left alone.

    Args:
        owner: the object.
        methods: name to what is called in its place.
    """

    def __init__(self, owner: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
        self.owner = owner
        self.methods = {name: Overlaid(method, type(owner).__name__) for name, method in methods.items()}
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
