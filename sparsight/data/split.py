"""Which pictures go where: chosen by seed and content, whole pictures at a time, exactly the asked share.

A picture's rank depends on nothing but the seed, the purpose and its content hash, so the order of rows, their
number a picture and the machine do not matter, and a larger share contains every smaller one. Called by data
preparation; it reads no samples itself.
"""

import hashlib
from collections.abc import Iterable


def choose_pictures(content_hashes: Iterable[str], fraction: float, seed: int, purpose: str) -> frozenset[str]:
    """`round(fraction * n)` of the n different hashes. Other purposes and other seeds choose independently."""
    different = set(content_hashes)
    ranked = sorted(different, key=lambda content_hash: (_rank(content_hash, seed, purpose), content_hash))
    return frozenset(ranked[: round(fraction * len(different))])


def _rank(content_hash: str, seed: int, purpose: str) -> bytes:
    return hashlib.blake2b(f"{purpose}/{seed}/{content_hash}".encode(), digest_size=16).digest()
