"""How large anything on the wire may be. Readers refuse more before they allocate anything for it.

The limits are far above what a run needs and far below what would hurt: they stop hostile and broken peers, not
users. Channels and servers take the same `MAX_MESSAGE_BYTES` in both directions, because a message over the
reader's limit breaks its whole stream.
"""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""One protobuf message, encoded."""

MAX_TOKENS = 2**20
"""Prompt tokens, or response tokens, of one sample."""

MAX_TURNS = 2**14
"""Turns of one sample."""

MAX_VERSION_SPANS = 2**16
"""Version spans of one sample."""

MAX_SAMPLES = 2**14
"""Samples of one group."""

MAX_NAMED_NUMBERS = 2**12
"""Entries of a map of metrics or extra logs."""

MAX_NAME_BYTES = 1024
"""A name, an id, an address."""

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""A prompt, a query, a label."""

MAX_TENSORS = 2**18
"""Tensors of a weight plan."""

MAX_DIMENSIONS = 16
"""Dimensions of one tensor."""

MAX_LEASES = 2**16
"""Leases of one member."""

MAX_MEMBERS = 2**16
"""Members of a run; processes of a weight epoch."""

DIGEST_BYTES = 32
"""A SHA-256."""

MAX_PORT = 2**16 - 1
"""A TCP port."""
