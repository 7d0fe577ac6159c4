"""The learner: takes batches of groups from the replay queue, optimises the policy with DeepSpeed, publishes versions.

`loop` is the step, read top to bottom. `intake`, `experience`, `batching`, `objective`, `policy` and `engine` are its
parts in order; `publisher`, `checkpoint`, `metrics` and `recording` are what leaves the learner; `control` is its side
of the mesh's protocol, on a thread of its own in rank 0. One door to DeepSpeed: `engine`.
"""
