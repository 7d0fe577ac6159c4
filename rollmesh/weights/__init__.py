"""The data path of the weights: learner rank 0 broadcasts buckets of bytes to every engine process.

::

    learner                                         engine process
    tensors ── pack ──► bucket i ── broadcast ──►  buffer i ── views ──► model
                           └► digest   (group)        └► digest

`plan` (what is sent in which order), `digest` and `interface` (where anything may listen) are torch-free; `group`,
`buckets`, `sender` and `receiver` use torch and are imported by the learner and the engine alone.
"""
