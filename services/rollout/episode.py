"""Generates one sample: a rendered prompt goes in; tokens come out, each with the policy version that made it.

The generated tokens are never tokenised again.
"""

from __future__ import annotations

from rollmesh.types import Int32Array, Lease, Sample, Turn
from services.rollout.engine import Engine


async def run_episode(
    engine: Engine, lease: Lease, index: int, prompt_token_ids: list[int], prompt_column: Int32Array
) -> Sample:
    """Generate the sample at ``index`` of a leased group, in one turn.

    Args:
        engine: generates the tokens.
        lease: the lease of the group.
        index: the position of the sample in the group, from 0.
        prompt_token_ids: the tokens of the rendered prompt, [P].
        prompt_column: the same tokens as an array, int32 [P]; the samples of the group share the array.

    Returns:
        The sample, not yet scored.
    """
    sampling = lease.sampling
    sample_id = f"{lease.group_id}/{index}/{lease.attempt}"
    # One engine may work on two leases of a group for a moment. The fencing token tells the two apart.
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
