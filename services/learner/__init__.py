"""The learner: takes batches of groups from the replay queue, trains the policy with DeepSpeed, publishes versions.

Begin with `loop`, which has the parts of a step in their order. A batch passes through `intake`, `experience`,
`batching`, `policy`, `objective` and `engine`. The results of a step leave through `publisher`, `checkpoint`, `metrics`
and `recorder`. `control` speaks to the coordinator, on a thread of rank 0. `repeat` trains on recorded batches again,
without a mesh. Only `engine` imports DeepSpeed.
"""
