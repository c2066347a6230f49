"""Faults in the batches of drill_training.py: numbers that no guard of the data keeps out.

    nan, inf      the loss and all gradients become that
    spike         a finite gradient, hundreds of times as large
    no_target     no token is predicted
"""

import numpy as np

from lct.data.batches.loader import Loader


def parse(text):
    """{number of a batch of this process, from 1: fault} of 'nan@1,spike@12-13'."""
    faults = {}
    for item in filter(None, text.split(',')):
        name, _, place = item.partition('@')
        first, _, last = place.partition('-')
        faults |= dict.fromkeys(range(int(first), int(last or first) + 1), name)
    return faults


def break_batches(text):
    """Break the batches that loaders return from now on, as parse(text) says."""
    faults, original, count = parse(text), Loader.next, 0

    def broken(self):
        nonlocal count
        batch, state = original(self)
        count += 1
        if count in faults:
            batch = {**batch, 'loss_mask': BREAK[faults[count]](batch['loss_mask'].copy())}
        return batch, state

    Loader.next = broken


def constant(value):
    return lambda mask: np.where(mask > 0, np.float32(value), mask)


def cancelling(mask):
    """Weights whose sum is a 2,000th of their number, by which the gradient is divided."""
    signs = np.where(np.cumsum(mask.ravel() > 0).reshape(mask.shape) % 2, 1, -1)
    targets = mask > 0
    mask = np.where(targets, signs, 0)
    return (mask + targets * (0.0005 - mask.sum() / targets.sum())).astype(np.float32)


BREAK = {'nan': constant(np.nan), 'inf': constant(np.inf), 'no_target': constant(0), 'spike': cancelling}
