"""How much of a text was changed: the normalised edit distance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from guardrails.errors import ConfigurationError


def edit_ratio(before: Sequence[Hashable], after: Sequence[Hashable]) -> float:
    """Return Levenshtein(before, after) / max(len(before), len(after)): 0 is unchanged, 1 is nothing kept.

    Args:
        before: a text, or a sequence of token ids.
        after: another of the same kind.

    Raises:
        ConfigurationError: if rapidfuzz is not installed.

    Example:
        >>> edit_ratio("good day", "good bay")
        0.125
        >>> edit_ratio([1, 2, 3, 4], [1, 2, 4])
        0.25
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ConfigurationError(
            "The online refiner measures edits with rapidfuzz, which is not installed. "
            "Run: pip install 'training-guardrails[refine]'."
        ) from error
    return float(Levenshtein.normalized_distance(before, after))
