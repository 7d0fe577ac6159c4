"""The maths of training, as pure functions on tensors: no service, no distributed state. Light at import.

Per-token tensors are flat, ``[N]`` over the generated tokens of a batch or of a part of it; `segments` says which
tokens belong to which sequence, and which samples to which group. What is counted over a whole optimiser step is
summed by a function that the caller gives (`reduction`), so no result depends on how a batch was cut.

==================  ==========================================================
`config`, `presets`  the section of the mesh file, and the algorithms by name
`pipeline`           rewards to advantages; `advantages` has the estimators
`losses`             policy losses, the critic's loss
`corrections`        what is done about tokens of older policies
`aggregate`          tokens to one number per step
`kl`                 divergence from the reference
`statistics`         what the metrics say about importance weights and values
==================  ==========================================================
"""
