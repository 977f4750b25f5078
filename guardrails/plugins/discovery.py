"""Which plug-ins are installed: the entry points of the group ``guardrails``, without importing any.

Distributions are read one by one, so that damaged metadata of one leaves the others in use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata

from guardrails.plugins.found import Found, Source, describe
from guardrails.plugins.hookspecs import PROJECT

DISABLE = "GUARDRAILS_DISABLE_PLUGINS"
"""Environment variable: comma-separated names of plug-ins or distributions to leave out, or ``*``."""


def installed() -> tuple[list[tuple[Source, Callable[[], object]]], list[Found]]:
    """Return the plug-ins to import, by distribution and name, and a record of those left out.

    The second part lists the plug-ins that `DISABLE` names and the distributions whose entry points
    cannot be read.
    """
    active: dict[str, metadata.Distribution] = {}
    plugins: list[tuple[Source, Callable[[], object]]] = []
    left_out: list[Found] = []
    for distribution in metadata.distributions():
        try:
            if not _has_group(distribution):
                continue
            name = _name(distribution)
            if name:  # the copy that Python imports is the first on its path, whichever we met here
                distribution = metadata.distribution(name)
            active.setdefault(_normal(name) or str(id(distribution)), distribution)
        except Exception as error:
            left_out.append(Source("?", str(getattr(distribution, "_path", "?"))).failed(describe(error)))
    for distribution in active.values():
        try:
            for source, entry_point in _entry_points(distribution):
                if _disabled(source):
                    left_out.append(Found(*source, disabled=True))
                else:
                    plugins.append((source, entry_point.load))
        except Exception as error:
            text = f"its entry points cannot be read: {describe(error)}"
            left_out.append(Source("?", _name(distribution)).failed(text))
    return sorted(plugins, key=lambda plugin: (_normal(plugin[0].distribution), plugin[0])), left_out


def _has_group(distribution: metadata.Distribution) -> bool:
    return f"[{PROJECT}]" in (distribution.read_text("entry_points.txt") or "")


def _entry_points(distribution: metadata.Distribution) -> Iterator[tuple[Source, metadata.EntryPoint]]:
    if _has_group(distribution):
        name, version = _name(distribution) or "unknown distribution", distribution.metadata["Version"] or ""
        for entry_point in distribution.entry_points.select(group=PROJECT):
            yield Source(entry_point.name, name, version), entry_point


def _name(distribution: metadata.Distribution) -> str:
    """Return the distribution's name, empty where its metadata has none."""
    return distribution.metadata["Name"] or ""


def _normal(name: str) -> str:
    """Return ``name`` as packages compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _disabled(source: Source) -> bool:
    off = {_normal(name.strip()) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    return "*" in off or not off.isdisjoint((_normal(source.plugin), _normal(source.distribution)))
