"""Who works how much at every hop of a ring: counts, not times."""

import numpy as np

from lct.data.layout import permutation


def pairs_by_hop(layout, seq_len, ring_size):
    """Query-key pairs that one causal document lets every device see at every hop, int [devices, hops].

    At hop h device i holds the block of device (i - h) % ring_size. Everybody waits for the busiest at every hop, so a
    ring takes pairs.max(0).sum(), against pairs.sum() / ring_size if the work were shared evenly.
    """
    tokens = np.sort(permutation(layout, seq_len, ring_size).reshape(ring_size, -1))
    seen = lambda i, j: np.searchsorted(tokens[j], tokens[i], 'right').sum()
    return np.array([[seen(i, (i - h) % ring_size) for h in range(ring_size)] for i in range(ring_size)])
