"""Memory that ran out in a training step, as one exception that says where."""

import contextlib
from collections.abc import Callable, Iterator

from lct.out_of_memory import is_out_of_memory, reason_of


class OutOfMemory(ValueError):
    """A device or the host had no memory left for a step. stage: index into Run.stages. step: the last one
    that may have been running. reason: the allocator's own line."""

    def __init__(self, stage: int, name: str, step: int, reason: str):
        super().__init__(f'stage {name}: out of memory by step {step} ({reason})')
        self.stage, self.name, self.step, self.reason = stage, name, step, reason


@contextlib.contextmanager
def located(stage: int, name: str, step: Callable[[], int]) -> Iterator[None]:
    """Around the work of a stage: memory that runs out raises OutOfMemory, which names stage and step."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(stage, name, step(), reason_of(error)) from error
