"""How the page of results states what the files in experiments/results hold: (content of a file) -> text."""

import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import check_plan_memory

from lct.models import kv_cache
from lct.models.llama_sizes import SIZES
from lct.plan import hlo
from lct.text import short_length

RESULTS = pathlib.Path(__file__).parents[1] / 'results'


def read(name: str) -> Any:
    text = (RESULTS / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith('l') else json.loads(text)


def percent(fraction: float, digits: int = 1) -> str:
    return f'{100 * fraction:.{digits}f}%'


def count(pair: list) -> str:
    return '{} of {}'.format(*pair)


def mean_of(tasks: dict, length: str) -> float:
    return statistics.mean(records[length]['mean'] for records in tasks.values())


# ---------------------------------------------------------------------------------------------------
# Speed and memory
# ---------------------------------------------------------------------------------------------------


def against_bair(clock: str, devices: int) -> Callable[[list], str]:
    """Speedups over BAIR's attention by length, of one clock and number of devices."""
    def figure(rows):
        found = {}
        for row in rows:
            if row['contestant'] == 'bair:128' and row['devices'] == devices and row['direction'] == 'both':
                key = row['dtype'], row['kv_heads'] < row['heads']
                found.setdefault(key, {})[row['length']] = 1 / row[f'{clock}_ratio']
        order = sorted(found, key=lambda key: (key[0] != 'float32', key[1]))
        return '; '.join(f'{dtype}{", grouped heads" * grouped}: ' + speedups(found[dtype, grouped])
                         for dtype, grouped in order)
    return figure


def speedups(of_length: dict) -> str:
    return ', '.join(f'{short_length(length)} {of_length[length]:.2f}x' for length in sorted(of_length))


def bair_memory(rows: list) -> str:
    """Temporaries relative to the leaner of BAIR's chunk sizes."""
    found = {}
    for row in rows:
        names = 'kv_heads', 'length', 'direction', 'devices', 'dtype', 'documents'
        case = tuple(row[name] for name in names)
        found.setdefault(case, {})[row['contestant']] = row['temp_mib']
    plain, grouped = [], []
    for case, sides in found.items():
        theirs = [value for name, value in sides.items() if name.startswith('bair')]
        if theirs and 'lct:ring' in sides:
            (grouped if case[0] < 8 else plain).append(sides['lct:ring'] / min(theirs))
    return (f'{min(plain):.2f} to {max(plain):.2f}x, with grouped heads {min(grouped):.2f} to '
            f'{max(grouped):.2f}x')


def serve_medians(d: dict) -> str:
    sides = {}
    for row in d['rows']:
        sides.setdefault((row['side'], row['question']), []).append(row)
    median = lambda rows, name: statistics.median(row[name] for row in rows)
    return '; '.join(
        f'{side}, question {number}: {median(rows, "first token, s"):.2f} s, '
        f'{median(rows, "tokens a second"):.1f} tokens/s' for (side, number), rows in sides.items())


def layouts(d: dict) -> str:
    rows = [row for row in d['table'] if row['direction'] == 'both']
    return '; '.join(f'{row["case"]} {row["ratio"]:.2f}x' for row in rows)


def plan_memory(d: dict) -> str:
    found = [(point, d.get(check_plan_memory.key(point))) for point in check_plan_memory.POINTS]
    ratios = [check_plan_memory.row_of('', point, memory)[1] for point, memory in found if memory]
    within = [sum(abs(ratio - 1) <= bound for ratio in ratios) for bound in (0.1, 0.15)]
    return (f'of {len(ratios)} points {within[0]} within 10% and {within[1]} within 15%; ratios '
            f'{min(ratios):.2f} to {max(ratios):.2f}')


def passes(d: dict) -> str:
    """Compiled GiB of 8B on 8 H100 at 5M tokens, in passes over the queries and without."""
    sizes = [hlo.device_bytes(d[check_plan_memory.key(point)]) / 2**30 for point in check_plan_memory.POINTS
             if point[:2] == ('h100:8', 'llama3-8b') and point[5] == 5 * 2**20]
    return ' and '.join(f'{size:.0f}' for size in sorted(sizes)) + ' GiB a device'


def cache_sizes(_: None) -> str:
    """GiB of a cache of 1M tokens of Llama-3 8B."""
    sizes = {dtype: kv_cache.bytes_of(SIZES['llama3-8b'], dtype) for dtype in ('float32', 'bfloat16', 'int8')}
    return '; '.join(
        f'{dtype} {size / 2**10:.1f} GiB ({size / sizes["bfloat16"]:.3f}x of bfloat16), on 8 devices '
        f'{size / 2**13:.1f} each' for dtype, size in sizes.items())


def growing_ring(d: dict) -> str:
    one = d['speed']
    return f'{one["per_device"]:.2f}x; against 8 devices with 4K each {one["to_eight_apart"]:.2f}x'


def loading(d: dict) -> str:
    one, quarters = d['1b'], max(one['peak'] / one['bytes'] for one in d['8b in quarters'])
    return (f'{one["peak"] / one["bytes"]:.2f}x (1B), {quarters:.2f}x (a quarter of 8B); time beside copying '
            f'the files with one thread {1 / one["load_over"]["copy, 1 thread"]:.2f}x')


def tokenizing(d: dict) -> str:
    peak = d['memory']['found'][-1]['peak_writer'] / 1e6
    return f'{d["speed"]["found"]["ratio"]:.2f}x the speed; peak of the writer at 1 GB {peak:.0f} MB'


def speed_of_evaluations(d: dict) -> str:
    each = '; '.join(f'{suite} {time:.2f}x, {cpu:.2f}x' for suite, (time, cpu) in d['ratios'].items())
    return f'{d["model"]}: {each}; {count(d["equal"])} RULER answers equal'


def prefixes(d: dict) -> str:
    found = {(row['suite'], row['call']): row for row in d['rows']}
    parts = []
    for suite, name in (('needle', 'needles at 4K'), ('own', 'ten questions about each of two texts')):
        second = found[suite, 'second']
        times = ', '.join(f'{found[suite, call]["CPU s"]}' for call in ('without', 'first', 'second'))
        parts.append(f'{name}: {second["tokens reused"]:,} of {second["of tokens"]:,}; {times} CPU s; '
                     f'{second["equal answers"]} of {second["samples"]} answers equal')
    return '; '.join(parts)


def bench_row(part: str, contestant: str) -> Callable[[dict], str]:
    def figure(d):
        rows = {row['contestant']: row for row in d[part]['table']}
        whole, chunked = rows[next(iter(rows))], rows[contestant]
        memory = chunked['temp_mib_at_memory_tokens'] / whole['temp_mib_at_memory_tokens']
        return f'{percent(memory)} of the memory, {chunked["cpu_ratio"]["median"]:.2f}x the CPU time'
    return figure


def int8_speed(d: dict) -> str:
    return '; '.join(
        f'{short_length(int(length))}: {ratio(one, "ms_a_token"):.2f}x the time, '
        f'{ratio(one, "cpu_ms_a_token"):.2f}x the CPU time'
        for length, one in d['caches'].items() if length.isdigit())


def ratio(one: dict, name: str) -> float:
    return statistics.median(one[name]['int8']) / statistics.median(one[name]['float32'])


def sessions(d: dict) -> str:
    return '; '.join(_sessions(d))


def _sessions(d):
    for model, one in d.items():
        first, later, changed = one['rows'][0], one['rows'][1], one['rows'][-1]
        yield (f'{model}, {later["tokens"]} tokens: {first["s"]} s, then {later["s"]} s ({first["cpu_s"]} '
               f'and {later["cpu_s"]} CPU-s); one file of 20 changed: {changed["reused"]} tokens reused')


# ---------------------------------------------------------------------------------------------------
# Correctness
# ---------------------------------------------------------------------------------------------------


def drills(d: dict) -> str:
    passed = sum(one['result'] == 'pass' for one in d['drills'])
    return f'{passed} of {len(d["drills"])} as they should'


def evaluations(d: dict) -> str:
    counts = d['counts']
    return (f'{len(d["different"])} of {d["evaluations"]} differ ({counts["calls"]} calls, '
            f'{counts["signal"]} stopped by signals, {counts["torn line"]} in a line, '
            f'{counts["full disk"]} by full disks, {counts["kill"]} by SIGKILL; {counts["rows"]:,} rows, '
            f'{counts["scores"]} scores)')


def tasks(d: dict) -> str:
    one = d['summary']
    over, half = one['prompts over their length'], one['intervals of the half reader that hold 50']
    return (f'{one["tasks"]} tasks, {one["prompts"]:,} prompts: {over} over their length, mean fill '
            f'{percent(one["mean fill"])}; half readers 50 within the interval in {half}')


def server(d: dict) -> str:
    memory = ', '.join(map(str, d['resident MiB, most of each quarter']))
    before, after = d['texts on disk before kill -9'], d['after']
    return (f'{d["total"]:,} requests in {d["seconds"]} s, {d["number wrong"]} wrong; resident {memory} '
            f'MiB by quarter; {before} texts on disk before and {after} after kill -9')


def cache_loss(d: dict) -> str:
    worst = max(abs(one['difference']) for one in d['bins'])
    size = d['bytes_a_slot']['int8'] / d['bytes_a_slot']['bfloat16']
    return f'{worst:.4f} nats, at {size:.3f}x the bytes of bfloat16'


def frozen(d: dict) -> str:
    return '; '.join(
        f'{name} {one["int8"]["difference"]:+.4f} ± {one["int8"]["standard_error"]:.4f} and '
        f'{one["bfloat16"]["difference"]:+.4f} ± {one["bfloat16"]["standard_error"]:.4f} nats'
        for name, one in d.items())


def cache_tasks(d: dict) -> str:
    rows, out = d['others']['int8'], []
    for suite in ('needle', 'ruler'):
        full, int8 = (100 * statistics.mean(row[side] for row in rows if row['suite'] == suite)
                      for side in ('first', 'second'))
        out.append(f'{suite} {full:.1f} with the full cache, {int8:.1f} with int8')
    return '; '.join(out)


def greedy(d: dict) -> str:
    equal = sum(one['outcome'] == 'equal' for one in d['records'])
    lengths = sorted({one['length'] for one in d['records']})
    return (f'{equal} of {len(d["records"])} answers equal, {d["tokens"]:,} tokens, prompts of '
            f'{short_length(lengths[0])} to {short_length(lengths[-1])}; transformers {d["transformers"]}')


def road(d: dict) -> str:
    return ', '.join(f'{name} {sum(one["right"] for one in d[name])} of {len(d[name])}' for name in d)


def transfers(_: None) -> str:
    """Of the programs of ring attention, of all targets."""
    programs = {path.stem.removeprefix('compile_'): program for path in sorted(RESULTS.glob('compile_*.json'))
                for name, program in read(path.name)['programs'].items() if name.startswith('ring')}
    found = [one['hidden'] for program in programs.values() for one in program['transfers']]
    return f'{sum(found)} of {len(found)} behind attention, for {", ".join(programs)}'


def gathers(d: dict) -> str:
    """Collectives of weights and gradients of the training steps."""
    out = []
    for name, program in d['programs'].items():
        found = [one['hidden'] for one in program['transfers'] if one['kind'] != 'collective-permute']
        if 'step' in name:
            out.append(f'{len(found) - sum(found)} of {len(found)} exposed ({name.split(", ")[1]})')
    return '; '.join(out)
