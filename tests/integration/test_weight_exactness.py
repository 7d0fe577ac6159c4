"""A real engine that is updated in mid-generation: every log-probability and every version span is right.

All numbers are float32 on the CPU, where the engine and the Hugging Face model agree to 1e-6. A difference above 1e-4
means wrong weights, a wrong version, or an index that is off by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollmesh.config import validate
from rollmesh.errors import DeadlineError, InvalidArgumentError, UnavailableError, WeightTransferError
from rollmesh.types import PolicyVersion, SamplingSpec, StopReason, TensorSpec
from services.config import MeshConfig
from services.learner.checkpoint_names import CheckpointNames
from services.rollout.compose import engine_settings
from services.rollout.engine import Completion, Engine
from tests.fakes.waiting import until
from tests.integration.hf_forward import logprobs_across_versions, logprobs_of_one_version
from tests.integration.publisher import Publisher
from tests.integration.tiny_model import BOS_ID, EOS_ID, make_tiny_mixture, make_tiny_model

pytestmark = pytest.mark.engine

T = TypeVar("T")
TOLERANCE = 1e-4
MAX_LENGTH = 160
MAX_NUM_SEQS = 12
BLOCK_SIZE = 32
SAMPLING = SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=80)
LONG = SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MAX_LENGTH)
GREEDY = SamplingSpec(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=40)


@dataclass
class Bench:
    """One engine, its publisher, and the model of each version that was published so far."""

    run: Callable[[Awaitable[T]], T]
    engine: Engine
    publisher: Publisher
    base: PreTrainedModel
    models: dict[PolicyVersion, PreTrainedModel] = field(default_factory=dict)

    async def publish_next(self):
        """Publish weights whose log-probabilities clearly differ from those of all versions before."""
        version = PolicyVersion(0, len(self.models))
        self.models[version] = changed(self.base, seed=version.number)
        return await self.publisher.publish(version, weights_of(self.models[version]))

    @property
    def newest(self) -> PreTrainedModel:
        return self.models[max(self.models)]

    async def generate_many(self, count: int, prompts: list[list[int]]) -> list[tuple[list[int], Completion]]:
        chosen = [prompts[i % len(prompts)] for i in range(count)]
        calls = [self.engine.generate(f"r{i}", prompt, SAMPLING) for i, prompt in enumerate(chosen)]
        return list(zip(chosen, await asyncio.gather(*calls), strict=True))

    async def generate_through_updates(
        self, num_callers: int, prompts: list[list[int]], num_updates: int
    ) -> list[tuple[list[int], Completion]]:
        """Generate without a pause while ``num_updates`` versions are published.

        At least one sample ends before the first update. Every caller begins a sample after the last update.
        """
        done: list[tuple[list[int], Completion]] = []
        has_begun = asyncio.Event()
        is_over = False

        async def keep_busy(index: int) -> None:
            is_last = False
            while not is_last:
                is_last = is_over
                prompt = prompts[index % len(prompts)]
                done.append((prompt, await self.engine.generate(f"b{index}", prompt, SAMPLING)))
                has_begun.set()

        async with asyncio.timeout(240), asyncio.TaskGroup() as tasks:
            for index in range(num_callers):
                tasks.create_task(keep_busy(index))
            await has_begun.wait()
            for _ in range(num_updates):
                await asyncio.sleep(0.1)
                await self.publish_next()
            is_over = True
        return done


def changed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights as a checkpoint stores them: a tied head once, and each expert apart."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    specs = [TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in parameters.items()]
    return CheckpointNames(model, specs).convert(parameters)


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[BOS_ID, *(rng.randrange(3, 60) for _ in range(length - 1))] for length in lengths]


def mesh_config(folder: Path) -> MeshConfig:
    return validate(
        MeshConfig,
        {
            "run": {"name": "exactness"},
            "model": {"path": str(folder), "max_length": MAX_LENGTH},
            "data": {"path": "unused.jsonl"},
            "training": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
            "sampling": {"max_new_tokens": 80},
            "reward": {"address": "127.0.0.1:1"},
            "rollout": {
                "engine": {
                    "dtype": "float32",
                    "enforce_eager": True,
                    "max_num_seqs": MAX_NUM_SEQS,
                    "extra": {"block_size": BLOCK_SIZE},
                }
            },
        },
    )


@contextlib.contextmanager
def start_bench(folder: Path, base: PreTrainedModel) -> Iterator[Bench]:
    with asyncio.Runner() as runner:
        engine = runner.run(Engine.start(engine_settings(mesh_config(folder))))
        try:
            with pytest.raises(UnavailableError):
                runner.run(engine.generate("early", [BOS_ID], SAMPLING))
            bench = Bench(runner.run, engine, Publisher(engine, weights_of(base)), base)
            runner.run(bench.publish_next())
            yield bench
        finally:
            runner.run(engine.stop())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("model")
    with start_bench(folder, make_tiny_model(folder, is_tied=request.param)) as bench:
        yield bench


def assert_exact(expected: torch.Tensor, completion: Completion) -> None:
    assert np.abs(expected.numpy() - completion.logprobs).max() < TOLERANCE


def assert_well_formed(completion: Completion) -> None:
    """Check that the spans cover the tokens, that the versions rise, and that the stop reason is right."""
    assert completion.token_ids.dtype == np.int32
    assert completion.logprobs.dtype == np.float32
    assert len(completion.token_ids) == len(completion.logprobs) > 0
    position = 0
    for span in completion.version_spans:
        assert span.start == position
        assert span.length > 0
        position += span.length
    assert position == len(completion.token_ids)
    versions = [span.version for span in completion.version_spans]
    assert versions == sorted(set(versions))
    has_ended = completion.token_ids[-1] == EOS_ID
    assert completion.stop_reason is (StopReason.STOP if has_ended else StopReason.LENGTH)
    assert EOS_ID not in completion.token_ids[:-1]


def test_log_probs_are_those_of_the_senders_weights(bench: Bench) -> None:
    for prompt, completion in bench.run(bench.generate_many(20, prompts_of([5, 9, 40]))):
        assert_well_formed(completion)
        assert [span.version for span in completion.version_spans] == [bench.engine.version]
        assert_exact(logprobs_of_one_version(bench.newest, prompt, completion.token_ids.tolist()), completion)


def test_twenty_updates_in_mid_generation_leave_every_log_prob_and_stamp_exact(bench: Bench) -> None:
    # The prefix cache shares prompts that are longer than a block, and more requests wait than run. A request that
    # starts after an update may find neither old keys nor an old version.
    prompts = prompts_of([7, 40, 45], seed=1)

    done = bench.run(bench.generate_through_updates(2 * MAX_NUM_SEQS, prompts, num_updates=20))
    for prompt, completion in done:
        assert_well_formed(completion)
        tokens = completion.token_ids.tolist()
        assert_exact(logprobs_across_versions(bench.models, prompt, tokens, completion.version_spans), completion)
    num_spans = [len(completion.version_spans) for _, completion in done]
    assert max(num_spans) > 1, "no sample saw an update"
    assert num_spans.count(1) >= 20, "too few samples of one version to tell anything"
    for prompt, completion in bench.run(bench.generate_many(10, prompts)):
        assert_exact(logprobs_of_one_version(bench.newest, prompt, completion.token_ids.tolist()), completion)


def test_versions_can_be_told_apart_by_their_log_probs(bench: Bench) -> None:
    """If two versions gave the same log-probabilities, the test above could not fail."""
    bench.run(bench.publish_next())
    older = bench.models[sorted(bench.models)[-2]]
    for prompt, completion in bench.run(bench.generate_many(5, prompts_of([9]))):
        expected = logprobs_of_one_version(older, prompt, completion.token_ids.tolist())
        assert np.abs(expected.numpy() - completion.logprobs).max() > 100 * TOLERANCE


def test_recomputing_the_cache_makes_old_keys_vanish(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.engine, "_kv", "recompute")

    done = bench.run(bench.generate_through_updates(MAX_NUM_SEQS, prompts_of([9, 40], seed=2), num_updates=1))
    crossing = [item for item in done if len(item[1].version_spans) == 2]
    assert crossing, "no sample saw the update"
    for prompt, completion in crossing:
        assert_well_formed(completion)
        tokens = completion.token_ids.tolist()
        before, after = completion.version_spans
        assert after.version == bench.engine.version
        for span in (before, after):
            part = slice(span.start, span.start + span.length)
            expected = logprobs_of_one_version(bench.models[span.version], prompt, tokens)[part]
            assert np.abs(expected.numpy() - completion.logprobs[part]).max() < TOLERANCE


def test_draining_finishes_requests_with_the_version_they_began_with(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.engine, "_kv", "drain")

    done = bench.run(bench.generate_through_updates(2 * MAX_NUM_SEQS, prompts_of([9, 40], seed=3), num_updates=1))
    seen = set()
    for prompt, completion in done:
        assert_well_formed(completion)
        (span,) = completion.version_spans
        seen.add(span.version)
        expected = logprobs_of_one_version(bench.models[span.version], prompt, completion.token_ids.tolist())
        assert_exact(expected, completion)
    assert len(seen) == 2


def test_generation_goes_on_while_weights_arrive(bench: Bench) -> None:
    """Each bucket is sent only after two more samples have ended."""

    async def drive() -> None:
        finished = threading.Semaphore(0)

        async def keep_busy(index: int) -> None:
            while not is_over:
                await bench.engine.generate(f"g{index}", [BOS_ID, 5, 6], SAMPLING)
                finished.release()

        def wait_for_two_samples() -> None:
            while finished.acquire(blocking=False):
                pass
            for _ in range(2):
                assert finished.acquire(timeout=20), "generation stands still while weights arrive"

        is_over = False
        async with asyncio.TaskGroup() as tasks:
            for index in range(MAX_NUM_SEQS):
                tasks.create_task(keep_busy(index))
            version = PolicyVersion(0, len(bench.models))
            weights = weights_of(bench.newest)
            await bench.publisher.transfer(version, weights, before_bucket=wait_for_two_samples)
            bench.models[version] = bench.newest
            await bench.engine.commit(version)
            is_over = True

    bench.run(drive())


def test_a_flipped_byte_is_seen_and_the_old_version_serves_on_unchanged(bench: Bench) -> None:
    prompt = prompts_of([12])[0]

    async def drive() -> tuple[Completion, Completion]:
        before = await bench.engine.generate("before", prompt, GREEDY)
        version = bench.engine.version
        transfer = await bench.publisher.transfer(
            PolicyVersion(0, len(bench.models)), weights_of(changed(bench.base, seed=99)), flip_byte=True
        )
        assert transfer.digest not in transfer.report.digests
        await bench.engine.abort()
        bench.publisher.leave()
        assert bench.engine.version == version
        return before, await bench.engine.generate("after", prompt, GREEDY)

    before, after = bench.run(drive())
    assert before.token_ids.tolist() == after.token_ids.tolist()
    assert np.array_equal(before.logprobs, after.logprobs)
    bench.run(bench.publish_next())
    ((prompt, completion),) = bench.run(bench.generate_many(1, [prompt]))
    assert_exact(logprobs_of_one_version(bench.newest, prompt, completion.token_ids.tolist()), completion)


def test_a_sender_that_never_comes_costs_the_deadline_and_nothing_else(bench: Bench) -> None:
    bench.publisher.leave()

    async def drive() -> None:
        await bench.engine.abort()
        await bench.engine.prepare(bench.publisher.plan, bench.publisher.epoch, 1, 3.0)
        generating = asyncio.create_task(bench.engine.generate("meanwhile", [BOS_ID, 4], SAMPLING))
        with pytest.raises(DeadlineError):
            await bench.engine.receive(PolicyVersion(0, 99))
        assert len((await generating).token_ids) > 0
        with pytest.raises(WeightTransferError, match="not received"):
            await bench.engine.commit(PolicyVersion(0, 99))
        await bench.engine.abort()

    bench.run(drive())


def test_a_prompt_that_does_not_fit_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidArgumentError, match="max_length 160"):
        bench.run(bench.engine.generate("long", [5] * MAX_LENGTH, SAMPLING))
    with pytest.raises(InvalidArgumentError):
        bench.run(bench.engine.generate("alien", [5000], SAMPLING))


def test_generation_never_exceeds_the_models_length(bench: Bench) -> None:
    spec = SamplingSpec(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1000)
    completion = bench.run(bench.engine.generate("tight", [5] * (MAX_LENGTH - 3), spec))
    assert len(completion.token_ids) <= 3


def test_equal_seeds_give_equal_samples(bench: Bench) -> None:
    async def drive() -> list[list[int]]:
        seeds = [11, 11, 12]
        done = [await bench.engine.generate(f"s{i}", [BOS_ID, 8], SAMPLING, seed=s) for i, s in enumerate(seeds)]
        return [completion.token_ids.tolist() for completion in done]

    first, again, other = bench.run(drive())
    assert first == again != other


def test_a_cancelled_call_ends_its_request_in_the_engine(bench: Bench) -> None:
    async def drive() -> None:
        calls = [
            asyncio.create_task(bench.engine.generate(f"cancelled{i}", [BOS_ID, 8], LONG))
            for i in range(2 * MAX_NUM_SEQS)
        ]
        await until(bench.engine._llm.get_num_unfinished_requests)
        for call in calls:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert bench.engine._llm.get_num_unfinished_requests() == 0
        await bench.engine.generate("next", [BOS_ID, 8], SAMPLING)

    bench.run(drive())


def test_a_load_that_does_not_bring_the_whole_model_taints_the_engine_for_good(bench: Bench) -> None:
    """This has to be the last test that uses the engine."""
    weights = weights_of(bench.newest)
    # The engine holds these weights in one tensor with the weights of queries and values, which do arrive.
    del weights["model.layers.0.self_attn.k_proj.weight"]
    publisher = Publisher(bench.engine, weights)

    async def drive() -> None:
        await bench.engine.abort()

        async def generate_for_ever(index: int) -> None:
            while True:
                await bench.engine.generate(f"caught{index}", [BOS_ID, 8], LONG)

        generating = asyncio.gather(*map(generate_for_ever, range(20)), return_exceptions=True)
        await asyncio.sleep(0.05)
        with pytest.raises(WeightTransferError, match="loading version"):
            await publisher.publish(PolicyVersion(0, 500), weights)
        assert bench.engine.is_tainted
        async with asyncio.timeout(60):
            assert all(isinstance(outcome, WeightTransferError) for outcome in await generating)
        with pytest.raises(WeightTransferError, match="tainted"):
            await bench.engine.generate("later", [BOS_ID, 8], SAMPLING)
        with pytest.raises(WeightTransferError, match="tainted"):
            await bench.engine.prepare(publisher.plan, publisher.epoch, 1, 1.0)

    bench.run(drive())


def test_every_version_of_a_mixture_of_experts_arrives_whole(tmp_path: Path) -> None:
    with start_bench(tmp_path, make_tiny_mixture(tmp_path)) as bench:
        for _ in range(2):  # the second update replaces experts that the first update has loaded
            bench.run(bench.publish_next())
            for prompt, completion in bench.run(bench.generate_many(10, prompts_of([5, 40]))):
                expected = logprobs_of_one_version(bench.newest, prompt, completion.token_ids.tolist())
                assert_exact(expected, completion)
