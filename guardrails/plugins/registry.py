"""The registry: plug-ins found once, on the first question for one, and looked up by name."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Mapping

from guardrails.errors import PluginError
from guardrails.plugins.discovery import DISABLE, installed
from guardrails.plugins.found import Found, Offer, Source
from guardrails.plugins.hookspecs import Kind
from guardrails.plugins.loading import load


class Registry:
    """What plug-ins list, by kind and name.

    A name that two plug-ins claim is served by neither: which was installed first must not decide
    what measures competence.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._discovering = False
        self._ready = False
        self._installed: list[Offer] = []
        self._problems: list[Found] = []
        self._registered: dict[str, list[Offer]] = {}

    def find(self, kind: Kind, name: str) -> object:
        """Return the object of this kind and name.

        Raises:
            PluginError: if it is unknown or refused; the message names what is known, close matches
                and the plug-ins that failed to load.
        """
        if not isinstance(name, str):
            raise PluginError(f"The name of a {kind} must be a string, not {name!r}.")
        own = builtin(kind)
        if name in own:
            return own[name]
        with self._lock:
            self._discover()
            served, _ = self._resolve()
            if (kind, name) in served:
                return served[kind, name].value
            raise PluginError(self._unknown(kind, name, [*own, *(known for k, known in served if k == kind)]))

    def found(self) -> tuple[Found, ...]:
        """Return a record per plug-in and kind, and one per failure; see `Found`."""
        with self._lock:
            self._discover()
            served, clashes = self._resolve()
            names: dict[tuple[Source, Kind], list[str]] = {}
            for offer in served.values():
                names.setdefault((offer.source, offer.kind), []).append(offer.name)
            listed = [source.found(kind, *sorted(each)) for (source, kind), each in names.items()]
            return tuple([*listed, *clashes, *self._problems])

    def register(self, plugin: object, name: str) -> None:
        """Add a plug-in by code; all of it or, if anything is wrong with it, nothing.

        Raises:
            PluginError: if the name is taken, the plug-in lists nothing sound, or something it lists
                is already claimed by another plug-in.
        """
        with self._lock:
            self._discover()
            if name in self._registered or any(offer.source.plugin == name for offer in self._installed):
                raise PluginError(
                    f"A plug-in named '{name}' is already here. Pass another name=, or unregister it first."
                )
            offers, failures = load(Source(name), lambda: plugin)
            self._registered[name] = offers
            failures += [clash for clash in self._resolve()[1] if clash.plugin == name]
            if failures:
                del self._registered[name]
                reasons = "; ".join(" ".join([*failure.names, failure.error]) for failure in failures)
                raise PluginError(f"Plug-in '{name}' was not registered: {reasons}")

    def unregister(self, name: str) -> None:
        """Remove a plug-in that `register` added.

        Raises:
            PluginError: if there is none of that name.
        """
        with self._lock:
            if self._registered.pop(name, None) is None:
                known = ", ".join(sorted(self._registered)) or "none"
                raise PluginError(
                    f"No plug-in named '{name}' was registered by code; registered: {known}. An installed one is "
                    f"switched off with the environment variable {DISABLE}."
                )

    def refresh(self) -> None:
        """Look for installed plug-ins anew at the next question; those registered by code stay."""
        with self._lock:
            self._ready = False

    def _discover(self) -> None:
        if self._ready:
            return
        if self._discovering:
            raise PluginError(
                "A plug-in looks up plug-ins while it is being loaded. Look names up when they are needed."
            )
        self._discovering = True
        try:
            plugins, problems = installed()
            offers: list[Offer] = []
            for source, get in plugins:
                listed, failures = load(source, get)
                offers += listed
                problems += failures
            self._installed, self._problems, self._ready = offers, problems, True
        finally:
            self._discovering = False

    def _resolve(self) -> tuple[dict[tuple[Kind, str], Offer], list[Found]]:
        """Return the offers that are served, and a record of each claim to a name that is contested."""
        claims: dict[tuple[Kind, str], list[Offer]] = {}
        for offer in [*self._installed, *(offer for offers in self._registered.values() for offer in offers)]:
            rivals = claims.setdefault((offer.kind, offer.name), [])
            if not any(offer.value is rival.value for rival in rivals):
                rivals.append(offer)
        served = {key: rivals[0] for key, rivals in claims.items() if len(rivals) == 1}
        clashes = [
            offer.source.failed(_clash(offer, rivals), offer.kind, offer.name)
            for rivals in claims.values()
            if len(rivals) > 1
            for offer in rivals
        ]
        return served, clashes

    def _unknown(self, kind: Kind, name: str, known: list[str]) -> str:
        failures = [record for record in (*self._resolve()[1], *self._problems) if record.error]
        refused = [f"{each.plugin} ({each.origin}): {each.error}" for each in failures if name in each.names]
        if refused:
            return f"The {kind} '{name}' is refused: {'; '.join(refused)}"
        lines = [f"There is no {kind} '{name}'."]
        close = difflib.get_close_matches(name, known, n=3)
        if close:
            lines.append(f"Did you mean {' or '.join(repr(each) for each in close)}?")
        lines.append(f"Known {kind}s: {', '.join(sorted(known)) or 'none'}.")
        if failures:
            texts = [f"{each.plugin} ({each.origin}): {each.error}" for each in failures]
            lines.append(f"Plug-ins that failed: {'; '.join(texts)}.")
        off = [record.plugin for record in self._problems if record.disabled]
        if off:
            lines.append(f"Switched off by {DISABLE}: {', '.join(off)}.")
        lines.append("Install the package that brings it; `guardrails plugins` lists what was found.")
        return " ".join(lines)


def _clash(offer: Offer, rivals: list[Offer]) -> str:
    others = ", ".join(str(rival.source) for rival in rivals if rival.source != offer.source)
    if not others:
        return "it is listed twice, for different objects; give each its own name"
    return f"it is also claimed by {others}, so neither is used; uninstall one or name it in {DISABLE}"


def builtin(kind: Kind) -> Mapping[str, Callable[..., object]]:
    """Return what guardrails itself brings of this kind, by name."""
    if kind == "metric":
        from guardrails.competence import BUILTIN as METRICS

        return METRICS
    if kind == "scheduler":
        from guardrails.schedulers import BUILTIN as SCHEDULERS

        return SCHEDULERS
    from guardrails.refine import DETECTORS, REFINERS

    return REFINERS if kind == "refiner" else DETECTORS
