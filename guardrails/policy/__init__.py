"""A guard's configuration as a file that is reviewed and versioned like code; see `Guard.from_toml`."""

from guardrails.policy.build import Builder
from guardrails.policy.checks import PolicyError
from guardrails.policy.describe import SCHEMA, describe, foreign_parts

__all__ = ["SCHEMA", "Builder", "PolicyError", "describe", "foreign_parts"]
