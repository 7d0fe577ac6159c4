"""The training of policy and critic on one batch of groups. Nothing here speaks to the mesh.

::

    groups ─► experience ─► [π_old, values] ─► rewards ─► advantages
                                                             │
       for each pass over the batch, for each part of it:    ▼
           weights of the tokens ─► micro-batches ─► critic's step ─► policy's step          ─► statistics

Token counts, whitening and running moments are sums over all ranks; the number of passes is the maximum over the
ranks. Every other value belongs to one rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollmesh.algorithms.aggregate import token_weights
from rollmesh.algorithms.config import AlgorithmSection
from rollmesh.algorithms.corrections.m2po import second_moment_mask
from rollmesh.algorithms.kl import KLController, kl_estimate
from rollmesh.algorithms.pipeline import Advantages, estimate_advantages, shape_rewards
from rollmesh.algorithms.variants import M2poCorrection
from rollmesh.algorithms.whitening import RunningMoments
from rollmesh.errors import ReplayError
from rollmesh.models.rows import Layout
from rollmesh.types import Group
from services.learner.arrangement import choose_arrangement
from services.learner.batching import MicroBatch, TokenColumns, empty_micro_batch, pack, plan_layouts
from services.learner.checkpoint import Learnables
from services.learner.config import LearnerSection
from services.learner.experience import Experience, StepShare, build_experience
from services.learner.metrics import StepStatistics, StepSums, reduce_statistics
from services.learner.objective import NUM_SUMS, Objective
from services.learner.parity import ParityCheck
from services.learner.ranks import Ranks
from services.learner.schedule import Schedule


@dataclass(frozen=True, slots=True)
class _Work:
    """One part of a batch, on which an optimiser step trains.

    Attributes:
        layouts: the micro-batches of the part on this rank.
        num_passes: forward and backward passes that every rank makes.
        num_tokens: generated tokens of the part, over all ranks.
        columns: the columns of the batch, with the loss weights and the mask of the part.
    """

    layouts: list[Layout]
    num_passes: int
    num_tokens: float
    columns: TokenColumns


class Trainer:
    """The training of the policy, and of the critic if the run has a critic, on batches of groups.

    Args:
        algorithm: the algorithm's settings.
        section: the learner's settings.
        learnables: policy, critic and average.
        parity: the comparison of the engine's and the learner's log-probabilities.
        ranks: the process group.
        num_batches: batches of the whole run, for the learning rate.
        max_staleness: the largest staleness of a sample that the settings permit, in versions.
        max_new_tokens: the largest number of generated tokens in a sample.
    """

    def __init__(
        self,
        algorithm: AlgorithmSection,
        section: LearnerSection,
        learnables: Learnables,
        parity: ParityCheck,
        ranks: Ranks,
        *,
        num_batches: int,
        max_staleness: int,
        max_new_tokens: int,
    ) -> None:
        self._algorithm = algorithm
        self._section = section
        self._max_new_tokens = max_new_tokens
        self._policy = learnables.policy
        self._critic = learnables.critic
        self._average = learnables.average
        self._ranks = ranks
        self._objective = Objective(algorithm, max_staleness)
        kl = algorithm.kl
        self._kl = KLController(kl.coef, kl.target, kl.horizon)
        self._moments = RunningMoments()
        self._parity = parity
        self._batching = choose_arrangement(section, learnables, ranks)
        self._num_updates = section.updates_per_batch
        self._needs_old_pass = algorithm.needs_old_pass(max_staleness, self._num_updates)
        frozen = algorithm.policy_frozen_steps
        self._policy_schedule = Schedule(section.optimizer, self._num_updates, num_batches, frozen)
        self._critic_schedule = Schedule(section.critic.optimizer, self._num_updates, num_batches)

    def train(self, groups_by_step: Sequence[Sequence[Group]], step: int, learner_number: int) -> StepStatistics:
        """Make all optimiser steps on one batch. Collective: every rank passes its own share, which may be empty.

        Args:
            groups_by_step: this rank's groups of each optimiser step.
            step: number of the batch, from 1.
            learner_number: number of the version that the batch starts from.

        Raises:
            ReplayError: the groups cannot be trained on (`build_experience` says why), or no sample has a token.
            ConfigError: learner and engine do not compute the same policy; see `ParityCheck`.
            RollMeshError: a gradient is not finite.
        """
        started = time.monotonic()
        experience = build_experience(groups_by_step, self._algorithm.needs_reference)
        (num_tokens,) = self._ranks.sum([experience.num_tokens])
        if num_tokens == 0:
            raise ReplayError(f"no sample of the batch of step {step} has a generated token")
        columns, result = self._prepare(experience, learner_number)
        parity = self._parity(
            experience, learner_number, step, lambda indices: self._recompute(experience, columns, indices)
        )
        prepared = time.monotonic()
        sums = self._update(experience, columns, step)
        statistics = reduce_statistics(experience, result, sums, learner_number, self._ranks)
        metrics = {
            **statistics.metrics,
            **parity,
            "kl/coef": self._kl.coef,
            "optimizer/lr": self._policy_schedule.rate(step, 0),
            "time/prepare_s": prepared - started,
            "time/forward_backward_s": time.monotonic() - prepared,
        }
        if columns.old is None and self._num_updates > 1:  # no π_old was computed for the later steps
            metrics.pop("policy/kl_old", None)
        if sums.policy_norms and self._kl.target is not None:
            divergence = self._divergence(experience, columns, metrics["kl/reference"])
            self._kl = self._kl.updated(divergence, int(statistics.num_samples))
        return replace(statistics, metrics=metrics)

    def state(self) -> Mapping[str, float]:
        """Return the numbers that carry over from batch to batch, for a checkpoint."""
        moments = self._moments
        return {
            "kl_coef": self._kl.coef,
            "reward_count": moments.count,
            "reward_mean": moments.mean,
            "reward_squares": moments.squares,
        }

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take over the numbers that `state` returned."""
        self._kl = replace(self._kl, coef=state["kl_coef"])
        self._moments = RunningMoments(state["reward_count"], state["reward_mean"], state["reward_squares"])

    def _prepare(self, experience: Experience, learner_number: int) -> tuple[TokenColumns, Advantages]:
        """Compute once for the batch: old log-probabilities, old values, rewards and advantages. Collective."""
        nothing = torch.zeros(experience.num_tokens)
        columns = TokenColumns(
            behaviour=experience.behaviour,
            advantages=nothing,
            loss_weights=nothing.double(),
            versions_apart=learner_number - experience.version_numbers,
            reference=experience.reference,
        )
        old = values = None
        if self._needs_old_pass or self._critic is not None:
            old, values = self._evaluate(experience, columns)
        result = self._advantages(experience, old, values)
        columns = replace(
            columns,
            advantages=result.advantages,
            old=old,
            values=values,
            returns=None if values is None else result.returns,
        )
        return columns, result

    def _advantages(self, experience: Experience, old: Tensor | None, values: Tensor | None) -> Advantages:
        section, kl = self._algorithm, None
        if experience.reference is not None and section.kl.place == "reward":
            assert old is not None
            kl = self._kl.coef * kl_estimate(section.kl.estimator, old, experience.reference)
        batch = replace(experience.trajectories, kl=kl, values=values)
        if section.reward.normalize:
            self._moments = self._moments.merged(batch.rewards, self._sum_over_ranks)
        rewards = shape_rewards(batch, section.reward, self._max_new_tokens, self._moments)
        return estimate_advantages(batch, rewards, section.advantage, section.reward.clip, self._sum_over_ranks)

    def _divergence(self, experience: Experience, columns: TokenColumns, over_tokens: float) -> float:
        """Return the divergence from the reference to which the penalty's coefficient adapts. Collective.

        Args:
            experience: this rank's part of the batch.
            columns: the columns of the tokens in ``experience``.
            over_tokens: the mean estimate under π_θ over the tokens of all steps.

        Returns:
            ``over_tokens`` where the penalty is in the loss. Where the penalty is in the reward, the mean over samples
            of each sample's mean estimate under π_old, as in OpenRLHF 0.11. A sample of 2 tokens with the estimate 0.1
            and a sample of 8 tokens with 0.3 give (0.1 + 0.3) / 2 = 0.2.
        """
        kl = self._algorithm.kl
        if kl.place == "loss":
            return over_tokens
        assert columns.old is not None
        assert columns.reference is not None
        tokens = experience.trajectories.tokens
        means = tokens.means(kl_estimate(kl.estimator, columns.old, columns.reference).double())
        total, count = self._ranks.sum([float(means.sum()), int((~tokens.is_empty).sum())])
        return total / count

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self._ranks.sum_tensor(values.to(self._ranks.device)).to(values.device)

    def _evaluate(self, experience: Experience, columns: TokenColumns) -> tuple[Tensor | None, Tensor | None]:
        """Return the policy's log-probabilities and the critic's values before the first step, each float32 [N].

        Collective. A part that the objective does not need is None.
        """
        old = torch.zeros(experience.num_tokens) if self._needs_old_pass else None
        values = torch.zeros(experience.num_tokens) if self._critic is not None else None
        layouts, num_passes = self._layouts(experience, range(len(experience.sequences)))
        for batch in self._micro_batches(experience, layouts, num_passes, columns):
            if old is not None:
                old[batch.places] = self._policy.logprobs(batch).cpu()
            if values is not None and self._critic is not None:
                values[batch.places] = self._critic.values(batch).cpu()
        return old, values

    def _recompute(self, experience: Experience, columns: TokenColumns, indices: Sequence[int]) -> Tensor:
        """Return log-probabilities of sequences under the present policy, float32 [N]. Collective.

        Where π_old was computed, all log-probabilities of π_old are returned. Otherwise the tokens of sequences that
        ``indices`` leave out have the value 0.
        """
        if columns.old is not None:
            return columns.old
        logprobs = torch.zeros(experience.num_tokens)
        layouts, num_passes = self._layouts(experience, indices)
        for batch in self._micro_batches(experience, layouts, num_passes, columns):
            logprobs[batch.places] = self._policy.logprobs(batch).cpu()
        return logprobs

    def _update(self, experience: Experience, columns: TokenColumns, step: int) -> StepSums:
        """Make the optimiser steps: one on each part of the batch, in each pass over the batch. Collective."""
        sums, number = StepSums(self._ranks.device), 0
        is_frozen = step <= self._algorithm.policy_frozen_steps
        of_steps = [self._work(experience, columns, share) for share in experience.step_shares]
        works = [work for work in of_steps if work is not None]
        for _ in range(self._section.epochs_per_batch):
            for work in works:
                if self._critic is not None:
                    rate = self._critic_schedule.rate(step, number)
                    batches = self._micro_batches(experience, work.layouts, work.num_passes, work.columns)
                    sums.add_critic(self._critic.train(batches, work.num_passes, work.num_tokens, rate))
                if not is_frozen:
                    batches = self._micro_batches(experience, work.layouts, work.num_passes, work.columns)
                    lr = self._policy_schedule.rate(step, number)
                    sums.add_policy(self._train_policy(batches, work.num_passes, work.num_tokens, lr))
                number += 1
        sums.largest_ratio = self._objective.take_largest_ratio()
        return sums

    def _work(self, experience: Experience, columns: TokenColumns, share: StepShare) -> _Work | None:
        """Prepare a part of the batch for its optimiser steps; None if no rank has a token of the part. Collective."""
        (num_tokens,) = self._ranks.sum([share.tokens.size])
        if num_tokens == 0:  # the last batch of a run may have fewer groups than parts
            return None
        layouts, num_passes = self._layouts(experience, range(share.sequences.start, share.sequences.stop))
        return _Work(layouts, num_passes, num_tokens, self._weigh(columns, share))

    def _train_policy(
        self, batches: Iterator[MicroBatch], num_passes: int, num_tokens: float, lr: float
    ) -> tuple[Tensor, float]:
        def loss(outputs: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, Tensor]:
            return self._objective(outputs, batch, num_tokens, self._kl.coef)

        result = self._policy.train(batches, num_passes, loss, NUM_SUMS, lr)
        if self._average is not None:
            self._average.update()
        return result

    def _weigh(self, columns: TokenColumns, share: StepShare) -> TokenColumns:
        """Return the columns with the loss weights, and the mask of `m2po`, of one optimiser step. Collective."""
        section = self._algorithm
        weights = columns.loss_weights.clone()
        constant = section.loss.constant_tokens or self._max_new_tokens
        weights[share.columns] = token_weights(
            section.loss.aggregation, share.tokens, share.groups, constant, self._sum_over_ranks
        )
        kept = columns.is_kept
        if isinstance(section.correction, M2poCorrection):
            assert columns.old is not None
            kept = torch.ones(len(columns.old), dtype=torch.bool)
            kept[share.columns] = second_moment_mask(
                columns.old[share.columns],
                columns.behaviour[share.columns],
                columns.advantages[share.columns],
                section.correction.m2_limit,
                self._sum_over_ranks,
            )
        return replace(columns, loss_weights=weights, is_kept=kept)

    def _layouts(self, experience: Experience, sequences: Sequence[int]) -> tuple[list[Layout], int]:
        """Return the layouts of the micro-batches, and the number of passes that every rank makes. Collective.

        Args:
            experience: this rank's part of the batch.
            sequences: indices of the sequences to place; the layouts name the sequences by these indices.
        """
        section = self._section
        layouts = plan_layouts(
            [len(experience.sequences[index].token_ids) for index in sequences],
            section.tokens_per_micro_batch,
            self._batching,
        )
        (num_passes,) = self._ranks.max([len(layouts)])
        return [tuple(tuple(sequences[i] for i in row) for row in layout) for layout in layouts], int(num_passes)

    def _micro_batches(
        self, experience: Experience, layouts: Sequence[Layout], num_passes: int, columns: TokenColumns
    ) -> Iterator[MicroBatch]:
        """Yield ``num_passes`` micro-batches: those of ``layouts``, then empty micro-batches.

        Each micro-batch is built when it is asked for.
        """
        starts = experience.sequence_starts
        for layout in layouts:
            yield pack(experience.sequences, starts, layout, columns, self._batching)
        for _ in range(num_passes - len(layouts)):
            yield empty_micro_batch(columns)
