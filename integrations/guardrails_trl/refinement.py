"""The online refiner on a TRL host: what the policy wrote is corrected, and the corrections go into the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from guardrails import AttachError, Constraint, Guard, Refinement
from guardrails.refine import Corrections, Corrector, Rows
from guardrails_trl.refine_seams import LOG_PROBS, LOSS, STEP, RefineSeams
from guardrails_trl.refined_loss import RefinedLoss
from guardrails_trl.seams import Host

EXAMPLES = 3
"""Changed rows of a step that the ledger keeps."""

_LONGEST = 1000
"""Characters of each of their texts."""


@dataclass(frozen=True, eq=False)
class Written:
    """What the host has just generated and scored, on this process.

    Args:
        inputs: the data set's rows.
        prompts: as the host holds them.
        completions: as the host holds them.
        ids: token ids of each completion.
        rewards: the host's task reward of each.
    """

    inputs: list[dict[str, Any]]
    prompts: list[Any]
    completions: list[Any]
    ids: list[list[int]]
    rewards: list[float]


@dataclass(frozen=True, eq=False)
class Refined:
    """What became of it.

    Args:
        texts: the completions as text.
        found: what became of each row of this process.
        targets: token ids of each row's y⁺; None where there is no term, empty where y⁺ = y.
        edit_ratio: of the rows of all processes.
        total: sampled tokens of all processes.
        counts: rows of all processes: in all, refined, accepted, changed.
    """

    texts: list[str]
    found: Corrections
    targets: list[list[int] | None]
    edit_ratio: np.ndarray[Any, np.dtype[np.float64]]
    total: float
    counts: tuple[int, int, int, int]


class Refining:
    """A guard's refinement at work on a trainer.

    Args:
        host: the trainer.
        guard: has a refinement.

    Raises:
        AttachError: if this trainer, its version, or a part of the refinement does not allow it. Nothing is
            changed then.
    """

    def __init__(self, host: Host, guard: Guard) -> None:
        part = guard.refinement
        if part is None:
            raise ValueError("This guard has no refinement.")
        self._host, self._guard, self._part = host, guard, part
        self._seams = RefineSeams(host)
        _check_columns(part, host)
        self._corrector = Corrector(part.corrects, part.detects, part.accept)
        self._loss = RefinedLoss(self._seams)
        self._learning = self._learned = self._reported = False
        part.corrects.attach(self._seams)

    def attach(self) -> None:
        """Wrap the host's loss, and the step that it is a part of."""
        self._host.wrap(STEP, self._loss.training_step)
        self._host.wrap(LOSS, self._loss.compute_loss)
        self._host.wrap(LOG_PROBS, self._loss.log_probs)

    def detach(self) -> None:
        """Let go of the refiner."""
        self._part.corrects.detach()

    @property
    def measures(self) -> bool:
        """Whether rows are refined in order to decide; else only once a weight above 0 has been decided."""
        weight = self._part.weight
        held = isinstance(weight, Constraint) and weight.cost is None
        return held or isinstance(weight, float) or "edit_ratio" in self._guard.requires

    def correct(self, written: Written, output: dict[str, Any]) -> Refined:
        """Return the corrections of what was written; every process calls it, with rows of its own.

        Args:
            written: what the host generated and scored.
            output: the host's batch of it.
        """
        seams, requires = self._seams, self._part.detects.requires
        texts = seams.texts(written.completions, written.ids)
        rows = Rows(
            prompts=written.prompts,
            completions=texts,
            truncated=[seams.truncated(ids) for ids in written.ids],
            entropy=self._host.divergences(output)["entropy"] if "entropy" in requires else None,
            infos=written.inputs,
        )
        score = _Score(seams, written, texts, output, alone=self._host.is_alone)
        found = self._corrector.correct(rows, encode=self._encode, score=score)
        if self._part.accept.reward and not self._host.is_alone:
            score.take_part()
        found, targets = self._targets(written, texts, found)
        return self._reduced(written, texts, found, targets)

    def learn(self, refined: Refined, written: Written, output: dict[str, Any]) -> None:
        """Put the corrections into the host's batch, under the weight in force."""
        self._loss.weight = self._guard.refinement_weight
        self._learning = self._loss.weight > 0.0 and refined.counts[2] > 0
        self._learned |= self._learning
        if not self._learning or all(target is None for target in refined.targets):
            return
        changed_only = self._part.changed_only
        targets = [target or [] for target in refined.targets]
        learned = [
            _changed(before, after) if changed_only else [1] * len(after)
            for before, after in zip(written.ids, targets, strict=True)
        ]
        copied = [target == [] and not changed_only for target in refined.targets]
        self._loss.put(output, targets, learned, copied, [len(ids) for ids in written.ids], refined.total)

    def rest(self) -> None:
        """Learn nothing on the batch to come."""
        self._learning = False

    def leave(self, prefix: str, n_rows: int) -> None:
        """Keep the table of completions aligned over rows that are not refined, of all processes."""
        if self._reported:
            self._host.log_column(f"{prefix}refined", [None] * n_rows)

    def report(self, refined: Refined, written: Written, prefix: str, step: int) -> None:
        """Log what was done, into the host's scalars and table of completions and into the ledger."""
        n_rows, n_refined, n_accepted, n_changed = refined.counts
        seconds = refined.found.seconds
        scalars = {
            "edit_ratio": float(refined.edit_ratio.mean()),
            "intervention_rate": n_refined / n_rows,
            "change_rate": n_changed / n_rows,
            "acceptance_rate": n_accepted / n_refined if n_refined else float("nan"),
            "seconds": sum(seconds.values()),
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }
        self._host.log("train", {f"{prefix}{self._part.name}/{name}": value for name, value in scalars.items()})
        if self._host.is_alone or self._seams.shows_completions:
            self._reported = True
            targets: list[Any] = refined.found.targets
            self._host.log_column(
                f"{prefix}refined", targets if self._host.is_alone else self._seams.gathered_objects(targets)
            )
        ledger = self._guard.ledger
        if ledger is not None and not ledger.closed and n_refined:
            counts = {"step": step, "rows": n_rows, "refined": n_refined, "accepted": n_accepted}
            ledger.note("refinement", {**counts, "examples": _examples(refined, written)})

    def begin(self) -> None:
        """Forget what was learned and not logged; corrections still in the host's batches stay."""
        self._learned = self._learning
        self._loss.forget()

    def flush(self, prefix: str) -> None:
        """Log the term's loss of an optimizer step; every process calls it."""
        mean = self._loss.flush() if self._learned else None
        self._learned = self._learning  # the batch may be used for further steps, or be one of several in this one
        if mean is not None:
            self._host.log("train", {f"{prefix}{self._part.name}/loss": mean})

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._seams.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _targets(
        self, written: Written, texts: list[str], found: Corrections
    ) -> tuple[Corrections, list[list[int] | None]]:
        """Return the tokens of each y⁺, and the corrections without those that cannot be learned."""
        targets: list[list[int] | None] = [None] * len(texts)
        named, further = self._seams.special_tokens
        spelt_out = (named | further) - {self._seams.tokenizer.unk_token_id}  # a word the tokenizer does not know
        problems: dict[int, str] = {}
        encoded = []
        for row, text in enumerate(found.targets):
            ids = written.ids[row]
            said = ids[:-1] if self._seams.ended(ids) else ids
            if text is None:
                continue
            if not further.isdisjoint(said):
                problems[row] = "its completion holds control tokens that its text does not show"
            elif text == texts[row] and len(said) < len(ids) and named.isdisjoint(said):
                targets[row] = []
            else:
                encoded.append(row)
        limit = self._seams.max_completion_length
        tokens = self._encode([str(found.offers[row]) for row in encoded]) if encoded else []
        for row, ids in zip(encoded, tokens, strict=True):
            if not spelt_out.isdisjoint(ids):
                problems[row] = "it spells out a special token"
            elif len(ids) >= limit:
                problems[row] = f"it is longer than the {limit} tokens of a completion"
            else:
                targets[row] = [*ids, self._seams.end_token(written.ids[row])]
        accepted, refused, ratios = list(found.accepted), list(found.refused), found.edit_ratio.copy()
        for row, problem in problems.items():
            accepted[row], ratios[row], refused[row] = False, 1.0, problem
        found = replace(found, accepted=tuple(accepted), refused=tuple(refused), edit_ratio=ratios)
        return found, targets

    def _reduced(
        self, written: Written, texts: list[str], found: Corrections, targets: list[list[int] | None]
    ) -> Refined:
        n_tokens = [len(ids) for ids in written.ids]
        columns = [found.edit_ratio.tolist(), found.detected, found.accepted, map(bool, targets), n_tokens]
        rows = torch.tensor([list(row) for row in zip(*columns, strict=True)], dtype=torch.float64)
        if not self._host.is_alone:
            rows = self._seams.gathered(rows)
        n_refined, n_accepted, n_changed, total = (int(column.sum()) for column in rows.T[1:])
        counts = (len(rows), n_refined, n_accepted, n_changed)
        return Refined(texts, found, targets, rows[:, 0].numpy().copy(), float(total), counts)


class _Score:
    """Differences of task reward between refined and written rows; where there are several processes, all take part."""

    def __init__(
        self, seams: RefineSeams, written: Written, texts: list[str], output: dict[str, Any], *, alone: bool
    ) -> None:
        self._seams, self._written, self._texts, self._output, self._alone = seams, written, texts, output, alone
        self._asked = False

    def __call__(self, rows: Sequence[int], refined: Sequence[str]) -> list[float]:
        self._asked = True
        written, wanted = self._written, len(rows)
        if not self._alone:  # the host gathers equally many rows of each process, so the others are filled up
            most = int(self._seams.gathered(torch.tensor([len(rows)])).max())
            rows = [*rows, *[0] * (most - len(rows))]
            refined = [*refined, *[self._texts[0]] * (most - len(refined))]
        if not rows:
            return []
        ids = self._seams.tokenizer(list(refined), add_special_tokens=False)["input_ids"]
        scores = self._seams.score(
            [written.inputs[row] for row in rows],
            [written.prompts[row] for row in rows],
            refined,
            [[*tokens, self._seams.end_token(written.ids[row])] for row, tokens in zip(rows, ids, strict=True)],
            self._seams.prompt_ids(self._output, rows),
        )
        return [scores[i] - written.rewards[rows[i]] for i in range(wanted)]

    def take_part(self) -> None:
        """Take part in what other processes score, where this one has nothing."""
        if not self._asked:
            self([], [])


def _check_columns(part: Refinement, host: Host) -> None:
    for detector in (part.detects, part.accept.sound):
        if detector is not None and "entropy" in detector.requires and "entropy" not in host.rollout_columns:
            raise AttachError(
                f"Refinement '{part.name}': {detector!r} reads the policy's entropy, which this {host.name} computes "
                "only where a batch is used for more than one update, and in a single process. Set num_iterations=2, "
                "use RLOO, or leave the detector out."
            )


def _changed(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return 1 for each token of ``after`` that was put in, replaced, or follows what was taken out; else 0."""
    from rapidfuzz.distance import Levenshtein

    marks = [0] * len(after)
    for edit in Levenshtein.editops(before, after):
        if edit.dest_pos < len(marks):
            marks[edit.dest_pos] = 1
    return marks


def _examples(refined: Refined, written: Written) -> list[dict[str, Any]]:
    found = refined.found
    examples: list[dict[str, Any]] = []
    for row, (before, after) in enumerate(zip(refined.texts, found.offers, strict=True)):
        if after is not None and after != before and len(examples) < EXAMPLES:
            prompt = written.prompts[row]
            texts = {
                "prompt": prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")),
                "before": before,
                "after": after,
            }
            cut: dict[str, Any] = {name: text[:_LONGEST] for name, text in texts.items()}
            examples.append({**cut, "accepted": found.accepted[row]})
    return examples
