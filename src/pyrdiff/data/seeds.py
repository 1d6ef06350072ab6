"""One way to make a seed out of several numbers."""

import hashlib


def seed_of(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order.

    Sums and products of (seed, step, ...) collide and neighbouring seeds start related streams; a SHA-256 does neither.

    Raises:
        ValueError: without any part, or when a part is not an int.
    """
    if not parts or any(isinstance(part, bool) or not isinstance(part, int) for part in parts):
        raise ValueError(f"parts={parts!r}: expected at least one int, and ints only")
    digest = hashlib.sha256(",".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
