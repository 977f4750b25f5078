"""The command line ``guardrails``: a module per command. Its help documents the exit codes."""

# Each adds its command to the program.
from guardrails.cli import demo, doctor, layout, plugins, report, verify, watch  # noqa: F401
from guardrails.cli.app import app, main

__all__ = ["app", "main"]
