"""The time of a trace by named scope: attention, ffn, optimizer, ... as a table.

XProf shows scopes for GPUs and TPUs alone. The programs in a trace (.xplane.pb, tensorflow/tsl's xplane.proto
and XLA's hlo.proto) tell the scope of every operation on any device.
"""

import collections
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lct.text import table

SCOPES = ('embedding', 'attention', 'ffn', 'lm_head', 'cross_entropy', 'optimizer')
OTHER = 'other'
_PLANES, _PLANE_NAME, _EVENT_METADATA, _VALUE, _STATS, _BYTES = 1, 2, 4, 2, 5, 6  # numbers of fields
_MODULE, _COMPUTATIONS, _INSTRUCTIONS, _NAME, _METADATA, _OP_NAME = 1, 3, 2, 1, 7, 2  # likewise


def scope_times(path: Path) -> dict[str, float]:
    """{scope: seconds}, summed over devices and steps, of the trace in an .xplane.pb file.

    An operation within another, as in the body of a loop, counts for itself.
    """
    names = _op_names(path.read_bytes())
    seconds = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for place, duration_ns in _own_times(line.events):
                seconds[scope_of(names.get(place, ''))] += duration_ns / 1e9
    return {scope: seconds[scope] for scope in (*SCOPES, OTHER) if seconds[scope]}


def scope_of(op_name: str) -> str:
    """The innermost of SCOPES in a name such as 'jit(train_step)/jvp(lm_head)/cross_entropy/exp'."""
    found = [part for part in re.split(r'[/()]', op_name) if part in SCOPES]
    return found[-1] if found else OTHER


def describe(path: Path) -> str:
    """scope_times as a table, the largest share first; '' for a trace without operations."""
    times = scope_times(path)
    total = sum(times.values())
    rows = [(scope, f'{seconds:.3f}', f'{seconds / total:.1%}')
            for scope, seconds in sorted(times.items(), key=lambda item: -item[1])]
    return table(('scope', 'seconds on all devices', 'share'), rows) if rows else ''


def _own_times(events):
    """((program, operation), duration in ns without that of the operations within it) of one line."""
    stack, out = [], []  # [end, operation, own duration]
    found = [(event.start_ns, -event.duration_ns, (stats.get('hlo_module', ''), stats['hlo_op']))
             for event in events if 'hlo_op' in (stats := dict(event.stats))]
    for start, negative, operation in sorted(found):
        while stack and stack[-1][0] <= start:
            out.append(stack.pop()[1:])
        if stack:
            stack[-1][2] += negative
        stack.append([start - negative, operation, -negative])
    return out + [entry[1:] for entry in stack]


def _op_names(data):
    """{(program, operation): its name with scopes} of all programs in a trace."""
    names = {}
    for plane in _all(data, _PLANES):
        if b'/host:metadata' not in [bytes(name) for name in _all(plane, _PLANE_NAME)]:
            continue
        for entry in _all(plane, _EVENT_METADATA):
            for module in _path(entry, _VALUE, _STATS, _BYTES, _MODULE):
                for operation in _path(module, _COMPUTATIONS, _INSTRUCTIONS):
                    place = _text(module, _NAME), _text(operation, _NAME)
                    names[place] = _text(operation, _METADATA, _OP_NAME)
    return names


def _text(message, *numbers):
    return bytes(next(_path(message, *numbers), b'')).decode()


def _path(message, *numbers):
    """The messages at the end of a path of field numbers."""
    found = [message]
    for number in numbers:
        found = [inner for outer in found for inner in _all(outer, number)]
    return iter(found)


def _all(message: Any, number: int) -> Iterator[memoryview]:
    """The fields of a protocol buffer with a number, among those that have bytes."""
    view, place = memoryview(message), 0
    while place < len(view):
        key, place = _varint(view, place)
        kind = key & 7
        if kind == 2:
            size, place = _varint(view, place)
            if key >> 3 == number:
                yield view[place:place + size]
            place += size
        elif kind == 0:
            place = _varint(view, place)[1]
        else:
            place += 8 if kind == 1 else 4


def _varint(view, place):
    value = shift = 0
    while True:
        byte = view[place]
        place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, place
