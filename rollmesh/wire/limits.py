"""The limits of everything on the wire. A reader refuses a larger value before it allocates memory for the value.

The limits are far above the needs of a run, and far below the sizes that would harm a service: they stop hostile and
broken peers and not users. Channels and servers use the same `MAX_MESSAGE_BYTES` in both directions, because a message
above the reader's limit breaks the reader's whole stream.
"""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Bytes of one encoded protobuf message."""

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
"""Bytes of a name, an id or an address."""

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Bytes of a prompt, a query or a label."""

MAX_TENSORS = 2**18
"""Tensors of a weight plan."""

MAX_DIMENSIONS = 16
"""Dimensions of one tensor."""

MAX_LEASES = 2**16
"""Leases of one member."""

MAX_MEMBERS = 2**16
"""Members of a run; processes of a weight epoch."""

DIGEST_BYTES = 32
"""Bytes of a SHA-256 digest."""

MAX_PORT = 2**16 - 1
"""The highest TCP port."""
