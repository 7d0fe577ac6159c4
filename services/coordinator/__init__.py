"""The coordinator: membership, leases, versions, evaluation rounds. Control only; no trajectory and no weight.

::

    servicer ──► Coordinator ──┬── Members      who is there, and which version each serves
    (protobuf)   (domain)      ├── Run          STARTING → RUNNING → FINISHING → FINISHED | FAILED
                               ├── PublishDriver  ANNOUNCE, PREPARE, TRANSFER, VERIFY, COMMIT of one version
                               │                at a time
                               ├── Dispatcher   frees slots, opens groups, hands out leases against credits
                               ├── Evaluator    held-out rounds, which pin a version
                               └── Watch        the clock: expired leases, silent members, failed groups, stalls

Its state is in Redis (the ledger) or is told to it again by members that register anew; the prompt cursor is derived
from the ledger. It imports neither torch nor transformers.
"""
