"""The coordinator: membership, leases, versions, evaluation rounds. Control only; no trajectory and no weight.

::

    servicer ──► Coordinator ──┬── Members      who is there, and which version each serves
    (protobuf)   (domain)      ├── Run          STARTING → RUNNING → FINISHING → FINISHED | FAILED
                               ├── PublishDriver  ANNOUNCE, PREPARE, TRANSFER, VERIFY, COMMIT of one version
                               │                at a time
                               ├── Dispatcher   frees slots, opens groups, hands out leases against credits
                               ├── Evaluator    held-out rounds, which pin a version
                               └── Watch        the clock: expired leases, silent members, failed groups, stalls

The coordinator's state is in the ledger in Redis, or members tell it again when they register anew. The prompt cursor
follows from the ledger. The coordinator imports neither torch nor transformers.
"""
