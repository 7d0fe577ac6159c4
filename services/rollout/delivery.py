"""Ends leases: commits, reports, gives back or leaves out the group of a lease.

::

    train     samples ──► Ledger.commit ────────────► READY        evaluate  samples ──► ReportEvaluation
              failure ──► Ledger.give_back ─────────► PENDING | FAILED       failure ──► ReportEvaluation(failure)
              left out because of its scores or prompt ──► Ledger.filter_group ──► FILTERED

Every call is safe to repeat. Delivery repeats a call while Redis or the coordinator is away, for as long as a lease
lives without a renewal. After this time nobody can take the result, and the worker ends. A lease that is over by then
belongs to another worker: delivery drops the group and logs a line.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from rollmesh.algorithms.config import FilterSection
from rollmesh.errors import InvalidArgumentError, RollMeshError, SupersededError
from rollmesh.replay.ledger import CommitOutcome, Ledger
from rollmesh.rpc.coordinator_client import CoordinatorClient
from rollmesh.rpc.retry import retry
from rollmesh.types import EvaluationSample, Group, Lease, LeaseKind, Sample
from services.rollout.filtering import filter_reason

_logger = logging.getLogger(__name__)


class Delivery:
    """Ends leases.

    Every method may raise UnavailableError or DeadlineError: Redis or the coordinator stayed away for too long.

    Args:
        ledger: the run's ledger.
        evaluations: the coordinator, which takes the results of evaluation groups.
        timeout_s: time for which each call is repeated while Redis or the coordinator is away.
        filter_section: the rules that say which groups are not trained on.
    """

    def __init__(
        self,
        ledger: Ledger,
        evaluations: CoordinatorClient,
        timeout_s: float,
        filter_section: FilterSection,
    ) -> None:
        self._ledger = ledger
        self._evaluations = evaluations
        self._timeout_s = timeout_s
        self._filter_section = filter_section

    async def deliver(self, lease: Lease, samples: Sequence[Sample]) -> bool:
        """Hand in the samples of a complete group, unless the filter leaves the group out.

        Returns:
            Whether the ledger or the coordinator has the samples, from this call or from an earlier one.
        """
        if lease.kind is LeaseKind.EVALUATE:
            return await self._report(lease, [_evaluation_sample(sample) for sample in samples], "")
        if (reason := filter_reason(samples, self._filter_section)) is not None:
            await self.leave_out(lease, reason)
            return False
        group = Group(lease.group_id, lease.prompt_id, lease.sequence, lease.attempt, tuple(samples), lease.datasource)
        try:
            outcome = await retry(lambda _: self._ledger.commit(group, lease.fencing_token), timeout_s=self._timeout_s)
        except InvalidArgumentError as error:
            await self.give_back(lease, str(error), is_final=True)
            return False
        if outcome is CommitOutcome.FENCED:
            _log_dropped(lease)
        return outcome is not CommitOutcome.FENCED

    async def give_back(self, lease: Lease, reason: str, *, is_final: bool = False) -> None:
        """Give a failed group back. ``is_final`` says that another try would fail in the same way."""
        _logger.warning(
            "group is given back%s: %s", " for good" if is_final else "", reason, extra={"group": lease.group_id}
        )
        if lease.kind is LeaseKind.EVALUATE:
            await self._report(lease, [], reason)
            return
        state = await retry(
            lambda _: self._ledger.give_back(lease.group_id, lease.fencing_token, reason, is_final=is_final),
            timeout_s=self._timeout_s,
        )
        if state is None:
            _log_dropped(lease)

    async def leave_out(self, lease: Lease, reason: str) -> None:
        """End the lease of a group that the configuration leaves out of training. This is no failure."""
        _logger.info("group is left out: %s", reason, extra={"group": lease.group_id})
        if lease.kind is LeaseKind.EVALUATE:
            await self._report(lease, [], reason)
            return
        state = await retry(
            lambda _: self._ledger.filter_group(lease.group_id, lease.fencing_token, reason), timeout_s=self._timeout_s
        )
        if state is None:
            _log_dropped(lease)

    async def hand_back(self, leases: Sequence[Lease], reason: str, timeout_s: float) -> None:
        """Return the leases that a closing worker cannot finish. The groups are not to blame, so none becomes FAILED.

        A lease that is not returned within ``timeout_s`` expires. Evaluation leases end when the worker leaves.
        """
        returned = [self._hand_back(lease, reason) for lease in leases if lease.kind is LeaseKind.TRAIN]
        try:
            async with asyncio.timeout(timeout_s):
                outcomes = await asyncio.gather(*returned, return_exceptions=True)
        except TimeoutError:
            _logger.warning("%d leases were not handed back within %g s", len(returned), timeout_s)
            return
        for outcome in outcomes:
            if isinstance(outcome, RollMeshError):
                _logger.warning("a lease was not handed back: %s", outcome)
            elif isinstance(outcome, BaseException):
                raise outcome

    async def _hand_back(self, lease: Lease, reason: str) -> None:
        await self._ledger.give_back(lease.group_id, lease.fencing_token, reason, is_excused=True)

    async def _report(self, lease: Lease, samples: Sequence[EvaluationSample], failure: str) -> bool:
        try:
            await retry(
                lambda _: self._evaluations.report_evaluation(lease.group_id, lease.fencing_token, samples, failure),
                timeout_s=self._timeout_s,
            )
        except SupersededError:
            _log_dropped(lease)
            return False
        return True


def _evaluation_sample(sample: Sample) -> EvaluationSample:
    assert sample.score is not None
    return EvaluationSample(
        reward=sample.score.reward,
        score=sample.score.score,
        num_generated_tokens=sample.num_generated_tokens,
        stop_reason=sample.stop_reason,
        oldest_version=sample.oldest_version,
        newest_version=sample.newest_version,
        extra_logs=sample.score.extra_logs,
    )


def _log_dropped(lease: Lease) -> None:
    _logger.info("the lease was over, its group is dropped", extra={"group": lease.group_id})
