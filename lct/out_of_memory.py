"""How an error says that memory ran out."""

import jax

SIGNS = ('RESOURCE_EXHAUSTED', 'Out of memory', 'bad_alloc', 'CUDA_ERROR_OUT_OF_MEMORY')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, while compiling, placing or computing."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in SIGNS)


def reason_of(error: BaseException) -> str:
    """The allocator's own line, at most 160 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
