"""The reference service: log-probabilities of a frozen policy, computed in batches that are gathered across streams.

::

    servicer ──► Scheduler ──► FrozenPolicy
    (protobuf)   (the line)    (Hugging Face model, in its own thread)
"""
