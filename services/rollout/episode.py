"""One sample: a rendered prompt, a stretch of generation, and every token with the version that made it.

Tokens go in and tokens come out; what the engine generated is never tokenised again.
"""

from __future__ import annotations

from rollmesh.types import Int32Array, Lease, Sample, Turn
from services.rollout.engine import Engine


async def run_episode(
    engine: Engine, lease: Lease, index: int, prompt_token_ids: list[int], prompt_column: Int32Array
) -> Sample:
    """Generate the sample at ``index`` of a leased group, in one turn.

    Args:
        engine: who generates.
        lease: the group.
        index: which of its samples.
        prompt_token_ids: the rendered prompt, [P].
        prompt_column: the same as an array, shared by the group's samples.
    """
    sampling = lease.sampling
    sample_id = f"{lease.group_id}/{index}/{lease.attempt}"
    # The token tells two leases of one group apart, should both be under way in one engine for a moment.
    request_id = f"{sample_id}/{lease.fencing_token}"
    seed = sampling.seed + index if sampling.seed else 0
    completion = await engine.generate(request_id, prompt_token_ids, sampling, seed)
    return Sample(
        sample_id=sample_id,
        index=index,
        prompt_id=lease.prompt_id,
        prompt_token_ids=prompt_column,
        response_token_ids=completion.token_ids,
        turns=(Turn(len(completion.token_ids), 0, completion.stop_reason),),
        behaviour_logprobs=completion.logprobs,
        version_spans=completion.version_spans,
    )
