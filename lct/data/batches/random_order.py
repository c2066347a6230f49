"""Random orders and coin flips that are computed item by item: item 10,000,000 costs as much as item 0.

The order of an epoch over ten million documents would take a second and 80 MB before the first batch, on
every host. Here any range of the order is computed from the key alone.
"""

import math

import numpy as np

ROUNDS = 6


def shuffled(n: int, places: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """int64 [m]: the items at places (int [m]) of a random permutation of 0..n - 1.

    key: integers >= 0. A number below side * side >= n is written as (high, low) in base side; each round
    adds a hash of one half to the other, so it is a bijection (a Feistel network over Z_side x Z_side). A
    result outside 0..n - 1 goes through the rounds again until it is inside, which keeps it a bijection
    (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    x = np.array(places, np.uint64)
    if (x >= n).any():
        raise ValueError(f'place {int(x.max())} is not in an order of {n}; ask for places below that')
    if n <= 1:
        return x.astype(np.int64)
    side = np.uint64(math.isqrt(n - 1) + 1)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        high, low = np.divmod(x[outside], side)
        for i, round_key in enumerate(round_keys):
            if i % 2:
                high = (high + _mix(low, round_key)) % side
            else:
                low = (low + _mix(high, round_key)) % side
        x[outside] = high * side + low
        outside = x >= n
    return x.astype(np.int64)


def uniform(items: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """float64 [n] in [0, 1): one number for each of items (int [n]), a function of the item and the key."""
    (round_key,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return (_mix(np.asarray(items).astype(np.uint64), round_key) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """uint64 -> uint64; every bit of the result depends on every bit of x and key.

    This is splitmix64 (Steele, Lea and Flood 2014).
    """
    x = x * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
