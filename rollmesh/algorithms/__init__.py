"""The maths of training: pure functions on tensors, without services and distributed state. Light at import.

Per-token tensors are flat, ``[N]`` over the generated tokens of a batch or of a micro-batch. `segments` says which
tokens belong to which sequence, and which samples to which group. The caller gives a function that sums over all ranks
(`reduction`), so no result depends on how a batch was cut.

==================  ==========================================================
`config`, `presets`  the section of the mesh file, and the algorithms by name
`pipeline`           rewards to advantages; `advantages` has the estimators
`ratios`             bounded ratios of two policies' probabilities
`losses`             policy losses, the critic's loss
`corrections`        anchor and weights for tokens of older policies
`aggregate`          one loss per token to one loss per step
`kl`                 divergence from the reference
`statistics`         metrics of importance weights and values
==================  ==========================================================
"""
