"""One seed from several parts."""

import hashlib


def seed_for(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part: `seed_for(seed, "order", epoch)`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
