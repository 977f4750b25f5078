"""``python -m guardrails`` is the command ``guardrails``."""

from guardrails.cli import main

main()
