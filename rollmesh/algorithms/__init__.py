"""The maths of training, as pure functions on tensors: no service, no configuration, no distributed state.

Per-token tensors are one-dimensional, ``[N]`` over the generated tokens of a batch or of a part of it; a function
that can be given padding takes a boolean mask of the same shape. Sums over tokens are divided by a denominator that
the caller counts over the whole optimiser step, so no result depends on how a batch was cut.

`registry` names the algorithms; `advantages`, `loss`, `importance`, `kl`, `aggregate` and `logprobs` are their parts.
"""
