"""The cost model against what others counted: published formulas and tables, compiled programs, brute
force."""

import dataclasses
import json
import pathlib

import check_plan_memory
import numpy as np
import plan as planner
import pytest

from lct.data import layout as layouts
from lct.models import flops, llama
from lct.models.llama import Memory
from lct.models.llama_sizes import LLAMA3_8B, LLAMA3_70B
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention
from lct.plan import cost, hardware, hlo, search, serving, targets, timing
from lct.plan.buffers import buffers
from lct.plan.cost import Step

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'

GiB, M = 2**30, 2**20
WHOLE = Step(LLAMA3_8B, (1, 1, 512, 1), M, dtype='bfloat16')  # Llama-3-8B, a million tokens, one ring of 512


def step(mesh=(1, 1, 64, 1), strategy='ring', node_size=1, remat='full', ffn_chunks=8, config=LLAMA3_8B,
         seq_len=M, **rest):
    return Step(config, mesh, seq_len, memory=Memory(remat, Attention(strategy, node_size, Chunks(512, 512)),
                                                     ffn_chunks, dtype='bfloat16'),
                **{'dtype': 'bfloat16', **rest})


# ---------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------


def test_matmul_parameters_of_the_published_models():
    embedding, norms = 128256 * 4096, 65 * 4096
    assert flops.matmul_params(LLAMA3_8B) == 7_504_658_432 == llama.num_params(LLAMA3_8B) - embedding - norms
    assert flops.matmul_params(LLAMA3_70B) == 69_501_714_432


# causal model FLOPs of a token: 6 P + 6 L N H T
@pytest.mark.parametrize(('config', 'seq_len', 'expected'), [
    (LLAMA3_8B, 2**16, 9.66e10), (LLAMA3_8B, 2**18, 2.51e11), (LLAMA3_8B, 2**19, 4.57e11),
    (LLAMA3_8B, 2**20, 8.70e11),
    (LLAMA3_8B, 2**22, 3.34e12), (LLAMA3_70B, 2**16, 6.75e11), (LLAMA3_70B, 2**18, 1.45e12),
    (LLAMA3_70B, 2**19, 2.48e12), (LLAMA3_70B, 2**20, 4.54e12),
])
def test_model_flops_of_a_token(config, seq_len, expected):
    one = Step(config, (1, 1, 1, 1), seq_len)
    assert cost.model_flops(one) / one.tokens == pytest.approx(expected, rel=3e-3)


def test_flops_that_a_compiled_step_counts():
    """5,181.8 TFLOP a device: Llama-3-8B, 1M tokens, 512 devices, no block skipped, counted in HLO with trip
    counts. That program ran the head's product once more in its backward."""
    again = 2 * LLAMA3_8B.vocab_size * LLAMA3_8B.embed_dim * WHOLE.local
    assert (cost.work(WHOLE, causal=False).total + again) / 1e12 == pytest.approx(5181.8, rel=1e-4)


@pytest.mark.parametrize(('remat', 'products'), [
    ('full', 18), ('offload', 18), ('attention_output', 14), ('offload_attention_output', 14)])
def test_products_of_attention_are_those_of_the_compiled_step(remat, products):
    """Of the same policies in test_llama."""
    flops = cost.work(step(remat=remat))
    assert 10 * (flops.attention_forward + flops.attention_backward) == products * flops.attention_backward


def brute_pairs(name, seq_len, ring):
    """Pairs of the busiest device at every ring step, summed over the ring."""
    mine = layouts.permutation(name, seq_len, ring).reshape(ring, -1)
    steps = [[int((mine[i][:, None] >= mine[(i - r) % ring][None]).sum()) for i in range(ring)]
             for r in range(ring)]
    return sum(map(max, steps))


@pytest.mark.parametrize('name', ['contiguous', 'zigzag', 'striped'])
def test_pairs_on_the_critical_path_of_a_ring(name):
    small = Step(LLAMA3_8B, (1, 1, 8, 1), 256, memory=Memory(attention=Attention(chunks=Chunks(1, 1))),
                 layout=name)
    expected = brute_pairs(name, 256, 8)
    exact = name == 'contiguous'
    assert cost.busiest_pairs(small) == pytest.approx(expected, rel=0 if exact else 0.04)


def test_causal_work_halves_with_a_balanced_layout():
    balanced, left = (cost.busiest_pairs(dataclasses.replace(WHOLE, layout=name))
                      for name in ('zigzag', 'contiguous'))
    # Striped Attention, section 3: at most twice as fast
    assert left / balanced == pytest.approx(2, rel=0.01)


def test_a_window_makes_work_linear():
    assert flops.visible_pairs(10, 3) == 1 + 2 + 8 * 3 == int(np.tril(np.ones((10, 10))).sum()) - 28
    narrow = dataclasses.replace(WHOLE, config=dataclasses.replace(LLAMA3_8B, window=4096))
    pairs = flops.visible_pairs(M) - flops.visible_pairs(M, 4096)
    assert cost.model_flops(WHOLE) - cost.model_flops(narrow) == 12 * 32 * 32 * 128 * pairs
    assert cost.busiest_pairs(narrow) == flops.visible_pairs(M, 4096) / 512


# ---------------------------------------------------------------------------------------------------
# Bytes: GiB a device and step, in the compiled text of the same program (experiments/compile_report.py)
# ---------------------------------------------------------------------------------------------------


def gib(one, axis, flow):
    return sum(t.bytes for t in cost.transfers(one) if (t.axis, t.flow) == (axis, flow)) / GiB


@pytest.mark.parametrize(('one', 'axis', 'flow', 'compiled'), [
    (WHOLE, 'sequence', 'ring', 639.75),
    (step(), 'sequence', 'ring', 632.74),
    (step(remat='attention', mesh=(1, 8, 64, 1), batch_size=8), 'sequence', 'ring', 506.49),
    (step(strategy='double_ring', node_size=8), 'sequence', 'ring', 656.76),
    (step(strategy='all_to_all_ring', node_size=8), 'sequence', 'ring', 73.67),
    (step(strategy='all_to_all_ring', node_size=8), 'sequence', 'collective', 26.42),
    (step(strategy='all_gather_ring', node_size=8), 'sequence', 'ring', 72.08),
    # less the weights
    (step(strategy='all_gather_ring', node_size=8), 'sequence', 'collective', 616.7 - 56.0),
    (step(strategy='all_gather'), 'sequence', 'collective', 560.3 - 56.0),
    (step((1, 8, 64, 1), batch_size=8), 'fsdp+sequence', 'collective', 56.78),
    (step((2, 1, 2, 2), seq_len=2**16, batch_size=2), 'data+fsdp+sequence', 'collective', 21.95),
    (step((1, 1, 64, 8), config=LLAMA3_70B), 'tensor', 'collective', 560.9),
    (step((1, 1, 512, 1), config=LLAMA3_70B), 'sequence', 'ring', 1599.06),
], ids=str)
def test_bytes_are_those_of_the_compiled_program(one, axis, flow, compiled):
    assert gib(one, axis, flow) == pytest.approx(compiled, rel=0.025)


def test_a_single_device_sends_nothing():
    assert cost.transfers(Step(LLAMA3_8B, (1, 1, 1, 1), 8192)) == []


# ---------------------------------------------------------------------------------------------------
# Seconds
# ---------------------------------------------------------------------------------------------------


# Ring Attention, table 2: (FLOP/s, link, thousands of tokens of the smallest block); printed to two digits
@pytest.mark.parametrize(('flops', 'link', 'thousands'), [
    (312e12, 300e9, 1.0), (312e12, 12.5e9, 24.5), (123e12, 112e9, 1.1), (275e12, 268e9, 1.0),
    (196e12, 186e9, 1.1),
])
def test_least_block_of_ring_attention(flops, link, thousands):
    assert timing.least_block(flops, link) / 1000 == pytest.approx(thousands, abs=0.06, rel=0.03)
    assert timing.least_block(flops, link, 4, causal=True) == timing.least_block(flops, link) / 2


@pytest.mark.parametrize(('share', 'hidden'), [(0.9, False), (1.1, True)])
def test_a_ring_hides_above_the_least_block(share, hidden):
    """The forward of a long ring inside a node on perfect hardware, against the closed form."""
    perfect, kind = timing.Efficiency(*7 * (1.0,)), hardware.find('v5p')
    block = round(share * timing.least_block(kind.flops, kind.inside, 4, causal=True))
    one = step((1, 1, 1024, 1), seq_len=1024 * block, ffn_chunks=1, remat='attention')
    (ring,) = (t for t in cost.transfers(one) if t.name == 'ring forward')
    moving = max(timing.seconds_on_links(ring, kind, perfect))
    assert (moving < cost.work(one).attention_forward / kind.flops) == hidden


def test_overlap_of_two_activities():
    assert [timing.overlapped(3, 2, share) for share in (1.0, 0.0, 0.5)] == [3, 5, 4]


def test_a_ring_between_nodes_goes_at_the_speed_of_one_flow():
    h100, perfect = hardware.find('h100'), timing.Efficiency(*7 * (1.0,))
    ring = lambda stride, group: cost.Transfer('', 'sequence', 'ring', stride, group, 1e9, '')
    assert timing.seconds_on_links(ring(1, 8), h100, perfect) == (1e9 / 450e9, 0.0)
    assert timing.seconds_on_links(ring(1, 16), h100, perfect) == (1e9 / 450e9, 1e9 / 50e9)
    assert timing.seconds_on_links(ring(8, 2), h100, perfect) == (0.0, 1e9 / 50e9)
    l40s = hardware.find('l40s')  # eight rings leave a node through its one network
    assert timing.seconds_on_links(ring(8, 2), l40s, perfect)[1] == pytest.approx(8e9 / l40s.network)


def test_a_collective_brings_a_byte_into_a_node_once():
    h100, perfect = hardware.find('h100'), timing.Efficiency(*7 * (1.0,))
    gather = lambda stride, group: cost.Transfer('', '', 'collective', stride, group, 1e9, '')
    assert timing.seconds_on_links(gather(1, 64), h100, perfect)[1] == 1e9 / 400e9
    assert timing.seconds_on_links(gather(8, 8), h100, perfect)[1] == 1e9 / 50e9


def test_float32_has_no_predicted_time():
    with pytest.raises(ValueError, match='computing in bfloat16'):
        timing.seconds(dataclasses.replace(WHOLE, memory=Memory(dtype='float32')), hardware.find('h100'))


# tokens/s of Llama-2-7B on eight A100, EasyContext's README; no constant was chosen on them
@pytest.mark.parametrize(('mesh', 'seq_len', 'rows', 'published'), [
    ((1, 8, 1, 1), 2**16, 8, 10_240), ((1, 1, 8, 1), 2**16, 1, 7_816), ((1, 1, 8, 1), 2**17, 1, 4_266),
    ((1, 1, 8, 1), 2**19, 1, 2_133), ((1, 1, 8, 1), 700 * 1024, 1, 1_603),
])
def test_speed_of_a_run_that_was_held_out(mesh, seq_len, rows, published):
    one = step(mesh, config=planner.MODELS['llama2-7b'], seq_len=seq_len, batch_size=rows, ffn_chunks=1)
    speed = one.tokens / sum(timing.seconds(one, hardware.find('a100')).values())
    assert 0.9 < speed / published < 1.6


def test_prefill_is_a_forward():
    one, h100 = step((1, 1, 8, 1), seq_len=2**17), hardware.find('h100')
    reading, training = serving.prefill_seconds(one, h100), timing.seconds(dataclasses.replace(
        one, memory=dataclasses.replace(one.memory, remat='none')), h100)
    assert reading['attention'] == pytest.approx(training['attention'] * 4 / 14)
    assert serving.cache_bytes(one) == 2**14 * 131_072
    writing = serving.decode_seconds(one, h100)
    assert writing['weights read'] == pytest.approx(
        flops.matmul_params(one.config) * 2 / 8 / (3.35e12 * 0.8))
    assert writing['cache read'] == pytest.approx(2**17 * 131_072 / 8 / (3.35e12 * 0.8))
    in_8_bits = dataclasses.replace(one, memory=dataclasses.replace(one.memory, cache_dtype='int8'))
    assert serving.cache_bytes(in_8_bits) == 2**14 * 66_560  # 130 of 256 bytes for each key and value


# ---------------------------------------------------------------------------------------------------
# Memory, hardware
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('remat', 'size'), [  # host_temporaries of the compiled program
    ('offload', 32 * GiB), ('offload_attention_output', 64.5 * GiB)])
def test_what_is_kept_on_the_host_is_exact(remat, size):
    assert sum(buffers(step((1, 1, 8, 1), remat=remat)).host.values()) == size


@pytest.mark.parametrize(('more', 'less'), [
    ('none', 'dots'), ('dots', 'attention'), ('attention', 'attention_output'), ('attention_output', 'full'),
    ('full', 'offload_attention_output'), ('full', 'offload')])
def test_each_policy_keeps_less(more, less):
    needed = [buffers(step((1, 8, 64, 1), batch_size=8, remat=remat, ffn_chunks=1)).peak
              for remat in (more, less)]
    assert needed[0] > needed[1]


COMPILED = json.loads(check_plan_memory.RESULTS.read_text())
POINTS = [p for p in check_plan_memory.POINTS if check_plan_memory.key(p) in COMPILED]


@pytest.mark.parametrize('point', POINTS, ids=check_plan_memory.key)
def test_weights_moments_and_batch_are_the_arguments_of_the_program(point):
    needed = search.needed_by(check_plan_memory.step_of(point), hardware.find(point[0].split(':')[0]),
                              check_plan_memory.adapter_of(point))
    compiled = COMPILED[check_plan_memory.key(point)]
    for place, size in ((needed.stays, compiled['arguments']), (needed.host, compiled['host_arguments'])):
        state = sum(place.get(name, 0) for name in ('weights', 'moments of AdamW', 'batch'))
        assert state == pytest.approx(size, rel=0.04, abs=2e7)  # beside them RoPE tables and counters


# Missed on the safe side, by 1.20 and 1.16: what a loop over micro-batches of 70B keeps of the embedding
# with offload, and the working set of the XLA block at 128K tokens a device where memory is plentiful.
MISSED = [p for p in POINTS if p[0] == 'l40s:128' or p[:2] == ('h100:8', 'llama3.2-1b')]


def test_the_missed_programs_were_overestimated():
    assert len(MISSED) == 2
    for point in MISSED:
        compiled = hlo.device_bytes(COMPILED[check_plan_memory.key(point)])
        assert 1.15 < check_plan_memory.predict(point) / compiled < 1.25


@pytest.mark.parametrize('point', [p for p in POINTS if p not in MISSED], ids=check_plan_memory.key)
def test_memory_is_within_15_percent_of_the_compilers(point):
    predicted = check_plan_memory.predict(point)
    assert predicted == pytest.approx(hlo.device_bytes(COMPILED[check_plan_memory.key(point)]), rel=0.15)


@pytest.mark.parametrize('name, head_dim, fused', [
    ('h200', 128, True), ('mi300x', 128, False), ('h200', 96, False)])
def test_auto_needs_what_its_block_needs(name, head_dim, fused):
    config = dataclasses.replace(LLAMA3_8B, head_dim=head_dim)
    needed = {kernel: search.needed_by(
        Step(config, (1, 1, 8, 1), 2**17, 1, 1, Memory('full', Attention(kernel=kernel)), 'bfloat16'),
        hardware.find(name)).peak for kernel in ('auto', 'xla')}
    assert (needed['auto'] < needed['xla']) == fused and needed['auto'] <= needed['xla']


def test_most_and_all_long_shards_are_within_10_percent():
    close = {p: check_plan_memory.predict(p) == pytest.approx(
        hlo.device_bytes(COMPILED[check_plan_memory.key(p)]), rel=0.1) for p in POINTS}
    assert sum(close.values()) >= 0.95 * len(POINTS)
    long = [p for p in POINTS if check_plan_memory.step_of(p).local >= 2**17]
    assert len(long) >= 14 and all(close[p] for p in long if p not in MISSED)
    assert max(check_plan_memory.step_of(p).local for p in long) == 3 * 2**20


@pytest.mark.parametrize('point', check_plan_memory.REFUSED, ids=check_plan_memory.key)
def test_what_the_planner_refuses_the_compiler_cannot_fit(point):
    usable = search.USABLE * hardware.find(point[0].split(':')[0]).memory
    assert check_plan_memory.predict(point) > usable
    assert hlo.device_bytes(COMPILED[check_plan_memory.key(point)]) > usable


def test_a_gpu_whose_memory_is_short_is_scheduled_for_memory():
    """The working set of a layer shrinks to its least, never below, in many chunks of the FFN and in few."""
    h100 = hardware.find('h100')

    def arrays(seq_len, ffn_chunks):
        one = step((1, 1, 8, 1), seq_len=seq_len, ffn_chunks=ffn_chunks, remat='offload')
        backward = search.needed_by(one, h100).phases['backward of a layer']
        return (backward['work on a layer'] + backward['work on a chunk of the FFN']) / (one.local * 4096 * 4)

    chunk = 14 * 14336 / (4 * 4096)
    assert arrays(2**18, 16) == pytest.approx(6.2 + chunk / 16)
    assert arrays(2**22, 16) == pytest.approx(4.4)
    assert arrays(2**22, 2) == pytest.approx(1 + chunk / 2)


def test_enough_programs_were_compiled():
    assert len(POINTS) >= 20 and {'cuda', 'tpu'} == {targets.parse(p[0]).platform for p in POINTS}


ACCELERATORS = [kind for kind in hardware.TABLE.values() if kind.platform != 'cpu']
CARDS = ('rtx3090', 'rtx4090', 'rtx5090', 'a6000', 'rtx6000ada', 'a40', 'l40', 'l4', 'a10', 'a10g')


@pytest.mark.parametrize('kind', ACCELERATORS, ids=lambda kind: kind.name)
def test_hardware_is_plausible(kind):
    flops, bandwidth = (7e13, 0.3e12) if kind.name in CARDS else (1e14, 0.8e12)
    assert flops <= kind.flops < 3e15 and 15e9 < kind.memory < 210e9 and bandwidth <= kind.bandwidth < 9e12
    assert kind.between <= kind.network and kind.inside <= kind.inside_all and kind.between < kind.inside
    if kind.name in targets.GPUS:
        assert kind.bandwidth == pytest.approx(targets.GPUS[kind.name].bandwidth, rel=0.01)
