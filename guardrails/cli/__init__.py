"""The command line ``guardrails``: a module per command.

Exit codes: 0 all is well; 1 something checked is not (a plug-in failed, a limit was not held, a ledger was
altered); 2 the command could not be done (wrong usage, a missing package or file); 130 interrupted.
"""

# Each adds its command to the program.
from guardrails.cli import demo, doctor, layout, plugins, report, verify, watch  # noqa: F401
from guardrails.cli.app import app, main

__all__ = ["app", "main"]
