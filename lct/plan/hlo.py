"""A parser of compiled programs, in the text form of scheduled HLO.

The instructions of a computation are in their order of execution, so the text shows whether a transfer
overlaps with compute. It does if an instruction with matmuls stands between its start and its done; in a ring
that is the attention loop of one ring step. Figures are per device. The body of a loop counts once per
iteration. If the trip count depends on the data, the body counts once, and its transfers are marked inexact.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import jax

COLLECTIVES = ('collective-permute', 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')
# Instructions that produce no new array.
VIEWS = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
         'optimization-barrier')
CALLED = re.compile(r'(?:condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)')
BRANCHES = re.compile(r'(?:branch_computations|called_computations)=\{([^}]*)\}')
MATMULS = ('dot', 'convolution', 'ragged-dot', 'scaled-dot')
# Library calls and fused kernels that multiply matrices: cuBLAS, cuDNN, Triton, Mosaic.
KERNELS = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas|cudnn|triton|mosaic|tpu_custom_call)',
                     re.I)
SHAPE = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?')
IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # dims, and the order in which they are transposed
HOST = 'S(5)'  # the memory space of pinned host memory, in a layout


class Shape(NamedTuple):
    """An array in HLO's notation, such as f32[8,128], and whether it is in host memory."""

    dtype: str
    dims: tuple[int, ...]
    on_host: bool

    def __str__(self) -> str:
        return f'{self.dtype}[{",".join(map(str, self.dims))}]'

    @property
    def size(self) -> int:
        """Bytes; 0 for tokens and other types without data."""
        width = re.match(r'[a-z]+(\d+)', self.dtype)  # f8e4m3fn, bf16, s32, c64
        bits = 8 if self.dtype == 'pred' else int(width[1]) if width else 0
        return -(-math.prod(self.dims) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. shapes: of the result, flattened. inside: text in the parentheses. rest: text after them."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results are its arguments."""
        return re.findall(r'%([\w.-]+)', self.inside)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        names = CALLED.findall(self.rest)
        for group in BRANCHES.findall(self.rest):
            names += [name.strip().lstrip('%') for name in group.split(',')]
        return names


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective.

    kind: its name in HLO. shapes: of the arguments of a device. size: their bytes.
    sent: bytes that leave the device if the collective runs as a ring, once.
    times: executions in the program. exact: False if the compiler does not know them and times is a lower
    bound.
    axes: mesh axes along which it runs.
    asynchronous: whether it has a start and a done.
    behind: names of the computations with matmuls between start and done.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    size: int
    sent: int
    times: int
    exact: bool
    axes: tuple[str, ...]
    asynchronous: bool
    behind: tuple[str, ...]

    @property
    def hidden(self) -> bool:
        """Whether the transfer overlaps with matmuls."""
        return bool(self.behind)


def _shapes(text):
    return tuple(
        Shape(dtype, tuple(int(d.lstrip('<=')) for d in dims.split(',') if d), HOST in layout)
        for dtype, dims, layout in SHAPE.findall(text)
    )


def _closing(text, start):
    """Index of the parenthesis that closes the one at start."""
    depth = 0
    for i in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f'unbalanced parentheses in HLO line: {text[:120]}')


def _instruction(line):
    """The Instruction of a line, or None if there is none."""
    match = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = ', line)
    if not match:
        return None
    rest = line[match.end():]
    end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
    opening = rest.index('(')
    closing = _closing(rest, opening)
    return Instruction(match[1], rest[:opening], shapes, rest[opening + 1:closing], rest[closing + 1:])


class Program:
    """A compiled program, from compiled.as_text()."""

    def __init__(self, text: str):
        """Parse the text of a program.

        Raises:
          ValueError: if text is not scheduled HLO; without a schedule the order of lines has no meaning.
        """
        if 'is_scheduled=true' not in text[:100_000].split('\n', 1)[0]:
            raise ValueError('not a scheduled HLO module; pass the text of a compiled program '
                             '(compiled.as_text())')
        self.computations, self.entry = {}, None
        lines = None
        for line in text.splitlines():
            header = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$', line)
            if header:
                lines = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif lines is not None:
                instruction = _instruction(line)
                if instruction:
                    lines.append(instruction)
        self._with_matmuls = {}
        self.times = {}
        self._count(self.entry, 1, True)

    def _count(self, name, times, exact):
        """Sum the executions of each computation: {name: (times, exact)}."""
        before, known = self.times.get(name, (0, True))
        self.times[name] = (before + times, known and exact)
        for instruction in self.computations[name]:
            trips = self.trips(instruction) if instruction.opcode == 'while' else 1
            for inner in instruction.called:
                self._count(inner, times * (trips or 1), exact and trips is not None)

    def trips(self, loop: Instruction) -> int | None:
        """Trip count of a while, or None if it depends on the data.

        The TPU compiler does not print it. There a counter that is compared with a constant is assumed to
        count up from zero by ones, as the counters of lax.scan and lax.fori_loop do.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = {i.name: i for i in self.computations[re.search(r'condition=%?([\w.-]+)', loop.rest)[1]]}
        test = list(condition.values())[-1]
        if test.opcode != 'compare' or 'direction=LT' not in test.rest:
            return None
        limit = condition[test.operands[1]]
        return int(limit.inside) if limit.opcode == 'constant' else None

    def has_matmuls(self, instruction: Instruction) -> bool:
        """Whether an instruction, or a computation that it calls, multiplies matrices."""
        if instruction.opcode in MATMULS or KERNELS.search(instruction.rest):
            return True
        return any(self._computation_has_matmuls(name) for name in instruction.called)

    def _computation_has_matmuls(self, name):
        if name not in self._with_matmuls:
            self._with_matmuls[name] = any(self.has_matmuls(i) for i in self.computations[name])
        return self._with_matmuls[name]

    def transfers(self, degrees: dict[str, int]) -> list[Transfer]:
        """Every collective, in the order of the text.

        degrees: {axis: degree} of the mesh, slowest axis first.
        """
        return [self._transfer(kind, name, at, degrees)
                for name, lines in self.computations.items() if name in self.times
                for at, instruction in enumerate(lines) if (kind := self._collective(instruction))]

    def _collective(self, instruction):
        """The kind of collective that an instruction is or starts, or None."""
        opcode = instruction.opcode.removesuffix('-start')
        if opcode in COLLECTIVES:
            return opcode
        if opcode == 'async':
            inner = self.computations[instruction.called[0]]
            return next((i.opcode for i in inner if i.opcode in COLLECTIVES), None)
        return None

    def _transfer(self, kind, computation, at, degrees):
        """The Transfer that starts at line `at` of a computation."""
        lines = self.computations[computation]
        start = lines[at]
        results = {i.name: i.shapes for i in lines}
        shapes = tuple(shape for name in start.operands for shape in results[name])
        size = sum(shape.size for shape in shapes)
        text = start.rest
        if start.opcode == 'async-start':  # the groups stand in the instruction that it wraps
            text += ' '.join(i.rest for i in self.computations[start.called[0]] if i.opcode == kind)
        groups = device_groups(text)
        others = len(groups[0]) - 1 if groups else math.prod(degrees.values()) - 1
        asynchronous = start.opcode.endswith('-start') and '"is_sync":true' not in text
        return Transfer(
            start.name, kind, shapes, size, _sent(kind, size, others), *self.times[computation],
            axes_of(groups, degrees), asynchronous, self.behind(lines, at) if asynchronous else ())

    def behind(self, lines: list[Instruction], at: int) -> tuple[str, ...]:
        """Names of the instructions with matmuls between the start in lines[at] and its done."""
        done = next(i for i, line in enumerate(lines) if i > at and lines[at].name in line.operands
                    and line.opcode.endswith('-done'))
        return tuple(i.name for i in lines[at + 1:done] if self.has_matmuls(i))

    def executed(self) -> dict[str, list[Instruction]]:
        """{name: instructions} of the computations that run, without those that are fused into one."""
        fused = {name for lines in self.computations.values() for i in lines
                 if i.opcode.startswith('fusion') for name in i.called}
        return {name: lines for name, lines in self.computations.items()
                if name in self.times and name not in fused}

    def largest(self) -> tuple[Shape, str]:
        """(Shape, instruction name) of the largest computed array in device memory, arguments excluded."""
        arrays = [
            (shape, i.name) for lines in self.executed().values()
            for i in lines if i.opcode not in VIEWS and not i.opcode.endswith(('-start', '-done'))
            for shape in i.shapes if not shape.on_host
        ]
        return max(arrays, key=lambda one: one[0].size)


def _sent(kind, size, others):
    """Bytes that leave a device when a collective over 1 + others devices runs as a ring."""
    share = others / (1 + others)
    return round(size * {'all-gather': others, 'all-reduce': 2 * share, 'reduce-scatter': share,
                         'all-to-all': share, 'collective-permute': 1}[kind])


def device_groups(text: str) -> list[list[int]]:
    """Groups of devices of a collective; the (source, target) pairs of a permute; [] for all devices at once.

    Raises:
      ValueError: if they are written in an unknown form.
    """
    listed = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}', text)
    if listed:
        return [[int(d) for d in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', listed[1])]
    # [groups,size]<=[dims]T(order)
    if tiled := re.search(r'replica_groups=\[\d+,(\d+)\]<=' + IOTA, text):
        return _cut(_iota(tiled[2], tiled[3]), int(tiled[1]))
    # mesh['x'=2,'y'=4] {'y'}: along y of devices laid out over the axes, in the order of device_ids if given
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{((?:'\w+',?)+)\}}",
                     text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    if re.search(r'replica_groups=(?!\{\})', text):
        raise ValueError('device groups of an unknown form in HLO: '
                         f'{text[text.index("replica_groups"):][:80]}')
    return []


def _mesh_groups(sizes, dims, order, axes):
    """Groups along some axes of a mesh of sizes "'x'=2,'y'=4"; dims and order of its device_ids, or None."""
    sizes, axes = dict(re.findall(r"'(\w+)'=(\d+)", sizes)), re.findall(r'\w+', axes)
    shape, names = ','.join(sizes.values()), list(sizes)
    devices = _iota(dims or shape, order)
    axes_last = [name for name in names if name not in axes] + axes
    places = _iota(shape, ','.join(str(names.index(name)) for name in axes_last))
    return _cut([devices[place] for place in places], math.prod(int(sizes[name]) for name in axes))


def _iota(dims, order):
    """The numbers from 0 laid out over dims ('2,4'), transposed by order ('1,0' or None), as a flat list."""
    dims = [int(d) for d in dims.split(',')]
    order = [int(d) for d in order.split(',')] if order else range(len(dims))
    numbers = [0]
    for dim in order:
        stride = math.prod(dims[dim + 1:])
        numbers = [number + step * stride for number in numbers for step in range(dims[dim])]
    return numbers


def _cut(row, size):
    return [row[i:i + size] for i in range(0, len(row), size)]


def axes_of(groups: list[list[int]], degrees: dict[str, int]) -> tuple[str, ...]:
    """Names of the mesh axes along which the members of a group differ; every axis if there are no groups."""
    if not groups:
        return tuple(name for name, degree in degrees.items() if degree > 1)
    differing = set()
    for group in groups:
        places = [_place(device, degrees) for device in group]
        differing |= {name for name in degrees if len({place[name] for place in places}) > 1}
    return tuple(name for name in degrees if name in differing)


def _place(device, degrees):
    place = {}
    for name in reversed(degrees):
        device, place[name] = divmod(device, degrees[name])
    return place


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes per device by kind, from the compiler. Outputs that reuse an argument count in 'aliased' too."""
    stats = compiled.memory_analysis()
    return {
        'arguments': stats.argument_size_in_bytes, 'outputs': stats.output_size_in_bytes,
        'aliased': stats.alias_size_in_bytes, 'temporaries': stats.temp_size_in_bytes,
        'peak': stats.peak_memory_in_bytes, 'host_temporaries': stats.host_temp_size_in_bytes,
        'host_arguments': stats.host_argument_size_in_bytes, 'host_outputs': stats.host_output_size_in_bytes,
    }


def device_bytes(memory: dict[str, int]) -> int:
    """Bytes of a program on one device: memory_of, summed. (The compilers' own peak includes host memory.)"""
    return memory['arguments'] + memory['outputs'] - memory['aliased'] + memory['temporaries']
