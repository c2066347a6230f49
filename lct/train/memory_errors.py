"""Memory that ran out in a training step, as one exception that says where."""

import contextlib
from collections.abc import Callable, Iterator

import jax

SIGNS = ('RESOURCE_EXHAUSTED', 'Out of memory', 'bad_alloc', 'CUDA_ERROR_OUT_OF_MEMORY')


class OutOfMemory(ValueError):
    """A device or the host had no memory left for a step. stage: index into Run.stages. step: the last one
    that may have been running. reason: the allocator's own line."""

    def __init__(self, stage: int, name: str, step: int, reason: str):
        super().__init__(f'stage {name}: out of memory by step {step} ({reason})')
        self.stage, self.name, self.step, self.reason = stage, name, step, reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, while compiling, placing or computing."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in SIGNS)


def reason_of(error: BaseException) -> str:
    """The allocator's own line, at most 160 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextlib.contextmanager
def located(stage: int, name: str, step: Callable[[], int]) -> Iterator[None]:
    """Around the work of a stage: memory that runs out raises OutOfMemory, which names stage and step."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(stage, name, step(), reason_of(error)) from error
