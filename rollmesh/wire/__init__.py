"""Converts types to protobuf and back: the only place that copies fields.

::

    limits ── checks ── enums ── trajectory ─┬─ outcome ── logprobs      reward, reference
                                             └─ control ─┬─ weights      publishing, transfers
                                                         └─ evaluation ── status

Each ``x_to_proto`` writes a message. Each ``x_from_proto`` validates a message, and raises `InvalidArgumentError` with
the dotted path of the first bad field. Where a method takes more than one noun of `rollmesh.types`, the module has a
``*Call`` dataclass for the method's arguments.
"""
