"""The reward service: runs a user's `reward_func` in processes of its own and answers Score streams.

::

    servicer ──► RewardPool ──► RewardProcess ──► child.py, a fresh interpreter with the user's file
    (protobuf)   (the line)     (one socket)      (no torch, no gRPC, no RollMesh)

Whatever the user's code does, a sample gets a score that the code returned, or a reason why there is none.
"""
