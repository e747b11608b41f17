"""The key of a named initial draw, so that parts which two models share are equal whatever else they hold."""

import hashlib


def named_seed(seed: int, name: str) -> int:
    """One 63-bit seed from a run's seed and a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1
