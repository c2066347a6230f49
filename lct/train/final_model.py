"""The model at the end of a run that trained adapters."""

from collections.abc import Callable

from lct import processes
from lct.models import llama, lora
from lct.train import state as states
from lct.train.metrics import log


def final_model(state: states.TrainState, adapter: lora.Adapter | None,
                original: Callable[[], llama.Params]) -> llama.Params:
    """The llama.Params of a state on the current mesh, adapters merged.

    Adapters that were trained on weights in 8 bits are merged into the original weights, which original()
    returns, or if it cannot (OSError, ValueError) into the dequantized ones. A line of the log says which.
    """
    if not (adapter and adapter.quantized):
        return states.model(state)
    problems, frozen = [], None
    try:
        frozen = lora.partition(original(), adapter)[1]
    except (OSError, ValueError) as error:
        problems.append(str(error))
    if processes.anyone(problems):
        log(f'adapters merged into the dequantized weights, because the original ones cannot be read: '
            f'{problems[0] if problems else "see the other processes"}')
        return states.model(state)
    log('adapters merged into the original weights, not into the 8-bit ones that they were trained on')
    return states.model(state.replace(frozen=frozen))
