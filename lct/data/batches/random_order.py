"""Random orders and coins that are computed where they are needed: item 10,000,000 costs what item 0 does.

An epoch's order over all documents would take a second and 80 MB for ten million of them, before the first
batch and on every host. Here a part of the order is computed from the key alone.
"""

import math

import numpy as np

ROUNDS = 6


def shuffled(n, places, key):
    """-> int64 [m]: what stands at places (int [m]) of a random permutation of 0..n - 1.

    key: a tuple of integers >= 0. A number below side * side >= n is written as (high, low) in base side; the
    rounds add to one half a hash of the other, so each is a bijection (a Feistel network over Z_side x Z_side).
    What falls outside 0..n - 1 goes through again until it falls inside, which keeps it a bijection (cycle
    walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
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
                high = (high + _mixed(low, round_key)) % side
            else:
                low = (low + _mixed(high, round_key)) % side
        x[outside] = high * side + low
        outside = x >= n
    return x.astype(np.int64)


def uniform(items, key):
    """-> float64 [n] in [0, 1): one number for each of items (int [n]), the same whenever it is asked for."""
    (round_key,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return (_mixed(np.asarray(items).astype(np.uint64), round_key) >> np.uint64(11)) * 2.0**-53


def _mixed(x, key):
    """uint64 -> uint64, every bit of the result depending on every bit of x and key (splitmix64: Steele, Lea and
    Flood 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
