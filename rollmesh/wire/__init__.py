"""Types to protobuf and back: the one place that copies fields.

::

    limits ── checks ── enums ── trajectory ─┬─ outcome ── logprobs      reward, reference
                                             └─ control ─┬─ weights      publishing, transfers
                                                         └─ evaluation ── status

Each ``x_to_proto`` writes a message, each ``x_from_proto`` validates one and raises `InvalidArgumentError` with the
dotted path of the first field at fault. Where a method's arguments are more than one noun of `rollmesh.types`, they
are a ``*Call`` dataclass of the module.
"""
