"""Doctor: what of this environment is in the way of a guarded run, and the cure of each."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from guardrails import plugins
from guardrails.errors import GuardrailsError, told

NAME = "training-guardrails"
"""This distribution; what it supports is read from its metadata."""

_FOR_DEVELOPERS = "dev"

_GPU_SECONDS = 120.0
_GPU = """
import json, sys, torch
cuda = torch.cuda.is_available()
print("\\n" + sys.argv[1] + json.dumps({
    "torch": torch.__version__,
    "built_for": torch.version.cuda or torch.version.hip or "",
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "mps": torch.backends.mps.is_available(),
}))
"""
_ANSWER = "guardrails doctor: "
"""Begins the line with the answer: what is imported may print lines of its own."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Args:
        check: ``"python"``, ``"package"``, ``"install"``, ``"plugin"`` or ``"gpu"``.
        status: ``"ok"``; ``"note"``, good to know; ``"problem"``, something will not work.
        subject: of what it speaks.
        text: what was found.
        cure: what to do about a problem; a note may have one too.
    """

    check: Literal["python", "package", "install", "plugin", "gpu"]
    status: Literal["ok", "note", "problem"]
    subject: str
    text: str
    cure: str = ""


def examine() -> list[Finding]:
    """Return everything that was looked at, problems and the rest; nothing is changed, and no host imported.

    Raises:
        GuardrailsError: if this package is not installed.
    """
    return [*python(), *packages(), *install(), *plugged(), *gpu()]


def python() -> Iterator[Finding]:
    """Whether this Python is supported."""
    wanted = _own().metadata["Requires-Python"] or ""
    version = platform.python_version()
    released = version.removesuffix("+")  # of a build from a later commit
    if SpecifierSet(wanted).contains(released, prereleases=True):
        yield Finding("python", "ok", "Python", version)
    else:
        yield Finding("python", "problem", "Python", f"{version}, but {wanted} is needed", f"Use Python {wanted}.")


def packages() -> Iterator[Finding]:
    """Whether the packages here are of versions that the metadata's requirements and extras allow."""
    needed: dict[str, tuple[SpecifierSet, list[str]]] = {}
    for extra, requirements in _requirements().items():
        for requirement in requirements:
            specifier, extras = needed.get(requirement.name, (SpecifierSet(), []))
            needed[requirement.name] = (specifier & requirement.specifier, [*extras, extra])
    gathering = _gathering()
    for name, (specifier, extras) in needed.items():
        extras = [extra for extra in extras if extra not in gathering] or extras[:1]
        reason = "needed" if "" in extras else f"needed by extra {', '.join(extras)}"
        wanted = f"{name}{specifier}"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if "" in extras:
                yield Finding("package", "problem", name, "not installed, but needed", f"pip install '{wanted}'")
            else:
                cure = f"pip install '{NAME}[{extras[0]}]'"
                yield Finding("package", "note", name, f"not installed; {reason}", cure)
            continue
        except (OSError, ValueError) as error:
            text = f"its metadata cannot be read: {told(error)}; {reason}"
            yield Finding("package", "problem", name, text, f"pip install --force-reinstall '{wanted}'")
            continue
        if specifier.contains(version, prereleases=True):
            yield Finding("package", "ok", name, f"{version} ({specifier or 'any'})")
        else:
            text = f"{version}, but {specifier} is supported; {reason}"
            yield Finding("package", "problem", name, text, f"pip install '{wanted}'")


def install() -> Iterator[Finding]:
    """Whether another distribution lays its files over this one's, as ``guardrails-ai`` does."""
    others = []
    for distribution in metadata.distributions():
        try:
            name = distribution.metadata["Name"] or ""
            record = distribution.read_text("RECORD") or ""
        except (OSError, ValueError) as error:
            folder = str(getattr(distribution, "_path", "?"))
            text = f"the metadata of this distribution cannot be read: {told(error)}"
            yield Finding("install", "note", folder, text, "Install it again, or remove what is left of it.")
            continue
        if canonicalize_name(name) != NAME and "\nguardrails/__init__.py," in f"\n{record}":
            others.append(name)
    for name in sorted(set(others)):
        text = f"it installs a package 'guardrails' too: the files of both lie in one folder, and {NAME} breaks"
        cure = f"pip uninstall {name}; pip install --force-reinstall --no-deps {NAME}. Give {name} its own environment."
        yield Finding("install", "problem", name, text, cure)
    changed = list(_changed())
    if changed:
        text = f"{len(changed)} of its files are not as they were installed, the first {changed[0]}"
        yield Finding("install", "problem", NAME, text, f"pip install --force-reinstall --no-deps {NAME}")
    elif not others:
        yield Finding("install", "ok", NAME, _own().version)


def plugged() -> Iterator[Finding]:
    """Which plug-ins load; this imports them."""
    for found in plugins.found():
        subject = f"{found.plugin} ({found.origin})"
        if found.error:
            package = found.distribution or "it"
            cure = f"Update or uninstall {package}, or leave it out: GUARDRAILS_DISABLE_PLUGINS={found.plugin}"
            yield Finding("plugin", "problem", subject, found.error, cure)
        elif found.disabled:
            yield Finding("plugin", "note", subject, "switched off by GUARDRAILS_DISABLE_PLUGINS")
        else:
            yield Finding("plugin", "ok", subject, f"{found.kind}: {', '.join(found.names)}")


def gpu() -> Iterator[Finding]:
    """Whether torch sees an accelerator; asked in a process of its own, and not at all without torch."""
    if find_spec("torch") is None:
        yield Finding("gpu", "note", "GPU", "not looked for: torch is not installed")
        return
    said = []
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GPU, _ANSWER],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GPU_SECONDS,
            check=False,
        )
        said = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
        text = [f"the process that tried ended with code {done.returncode}", *done.stderr.strip().splitlines()][-1]
    except subprocess.TimeoutExpired:
        text = f"no answer within {_GPU_SECONDS:g} s"
    seen = json.loads(said[0].removeprefix(_ANSWER)) if said else None
    if seen is None:
        yield Finding(
            "gpu", "problem", "torch", f"it cannot be imported: {text}", "pip install --force-reinstall torch"
        )
    elif seen["devices"]:
        yield Finding("gpu", "ok", "GPU", ", ".join(seen["devices"]))
    elif seen["mps"]:
        yield Finding("gpu", "ok", "GPU", "Apple MPS")
    elif shutil.which("nvidia-smi") and not seen["built_for"]:
        text = f"there is an NVIDIA driver, but torch {seen['torch']} is built for the CPU alone"
        yield Finding("gpu", "note", "GPU", text, "Install a CUDA build of torch: https://pytorch.org/get-started")
    else:
        yield Finding("gpu", "note", "GPU", "none visible to torch; training runs on the CPU")


def _own() -> metadata.Distribution:
    try:
        return metadata.distribution(NAME)
    except metadata.PackageNotFoundError as error:
        raise GuardrailsError(
            f"{NAME} is imported from a folder and not installed, so what it supports is not known. Install it with: "
            f"pip install {NAME}, or pip install --editable of that folder."
        ) from error


def _requirements() -> dict[str, list[Requirement]]:
    """Return what each extra requires, the smallest extra first; under the empty name what is needed always."""
    own = _own()
    required = []
    for text in own.requires or ():
        with contextlib.suppress(InvalidRequirement):  # of a newer standard than the packaging that is installed
            required.append(Requirement(text))
    always = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    found = {}
    for extra in own.metadata.get_all("Provides-Extra") or ():
        if extra != _FOR_DEVELOPERS:
            found[extra] = [
                each
                for each in required
                if each not in always and each.marker is not None and each.marker.evaluate({"extra": extra})
            ]
    return {"": always} | dict(sorted(found.items(), key=lambda item: len(item[1])))


def _gathering() -> set[str]:
    """Return the extras that hold all of another, such as ``all``: which one a package is for, the other says."""
    names = {extra: {each.name for each in found} for extra, found in _requirements().items() if extra}
    return {extra for extra, held in names.items() for other, part in names.items() if other != extra and part < held}


def _changed() -> Iterator[str]:
    """Yield the files of this package that differ from the record of its installation."""
    for file in _own().files or ():
        if file.parts[0] == "guardrails" and file.hash is not None and file.hash.mode == "sha256":
            try:
                content = file.locate().read_bytes()  # type: ignore[attr-defined]
            except OSError:
                yield str(file)
                continue
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            if digest != file.hash.value:
                yield str(file)
