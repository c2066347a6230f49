"""Training state in host memory: its bytes on either side, and those that move. Predictions.

models/offload.py has the program: 'moments' and 'all' of models.memory.Memory.offload_state.
"""

from lct.plan.buffers import BACKWARD, Buffers, share_of
from lct.plan.cost import FLOAT32, Step, num_params

# Fitted to programs compiled for CUDA: copies of a layer's arrays that exist at one time.
FETCHED = 2


def offloaded(needed: Buffers, step: Step) -> Buffers:
    """The Buffers of a Step as its policy offloads the state, from those with all of it on the device."""
    policy = step.memory.offload_state
    if policy == 'none':
        return needed
    stays, host = dict(needed.stays), dict(needed.host)
    phases = {name: dict(sizes) for name, sizes in needed.phases.items()}
    host['moments of AdamW'] = sum(stays.pop(name) for name in tuple(stays) if 'moment' in name)
    share = host['moments of AdamW'] / (2 * FLOAT32)
    layer, rest = _layer_and_rest(step, share)
    update = phases['update']
    update['moments of a layer, fetched'] = FETCHED * 2 * layer * FLOAT32
    update['moments of embedding and head, fetched'] = 2 * rest * FLOAT32
    gradients = share * step.stored_width
    if policy == 'moments':
        phases[BACKWARD]['gradients'] = gradients
        return needed._replace(stays=stays, phases=phases, host=host)
    host['weights'] = share * step.stored_width
    stays['weights'] -= host['weights']  # what is left is frozen
    host['gradients'] = gradients
    if sums := stays.pop('gradients so far, float32', 0):
        host['gradients so far, float32'] = sums
    phases[BACKWARD]['gradients'] = 0
    phases[BACKWARD]['weights of a layer, fetched'] = FETCHED * layer * step.stored_width
    phases['loss']['embedding and head, fetched'] = rest * step.stored_width
    update['gradients, float32'] = 0
    update['weights and gradients of a layer, fetched'] = FETCHED * layer * (step.stored_width + FLOAT32)
    update['weights and gradients of embedding and head, fetched'] = rest * (step.stored_width + FLOAT32)
    return needed._replace(stays=stays, phases=phases, host=host)


def moved(step: Step) -> float:
    """Bytes of the state that one device sends to its host and receives from it in one step, both added.

    The weights of a layer are fetched for its forward and again for its backward, gradients are written once,
    and read for their norm and for the update.
    """
    share = share_of(step)
    moments = 2 * 2 * share * FLOAT32
    if step.memory.offload_state == 'none':
        return 0
    if step.memory.offload_state == 'moments':
        return moments
    width, micro = step.stored_width, step.accumulation
    weights = (2 * micro + 2) * share * width
    gradients = (micro + 2) * share * (width if micro == 1 else FLOAT32)
    sums = micro * 2 * share * FLOAT32 if micro > 1 else 0
    return moments + weights + gradients + sums


def _layer_and_rest(step, share):
    """Of so many parameters on a device, those of a layer, and those of the embedding and the head."""
    config = step.config
    tables = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    rest = share * tables / num_params(config)
    return (share - rest) / config.num_layers, rest
