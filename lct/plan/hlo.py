"""What a compiled program says of itself: the text of scheduled HLO, read.

The instructions of a computation stand in the order in which they run, so whether a transfer hides behind
computation can be read off: it does if something with matmuls, of a ring the attention loop of a hop, stands
between its start and its done. Figures are per device. What lies in a loop counts as often as the loop runs; a
loop whose trips only the data know counts once, and what lies in it is marked.
"""

import dataclasses
import math
import re
from typing import NamedTuple

COLLECTIVES = ('collective-permute', 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')
# Instructions that hand on what exists already.
VIEWS = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
         'optimization-barrier')
CALLED = re.compile(r'(?:condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)')
BRANCHES = re.compile(r'(?:branch_computations|called_computations)=\{([^}]*)\}')
MATMULS = ('dot', 'convolution', 'ragged-dot', 'scaled-dot')
# Library calls and fused kernels that multiply matrices: cuBLAS, cuDNN, Triton, Mosaic.
KERNELS = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas|cudnn|triton|mosaic|tpu_custom_call)', re.I)
SHAPE = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?')
IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # dims, and the order in which they are transposed
HOST = 'S(5)'  # the memory space of pinned host memory, in a layout


class Shape(NamedTuple):
    """An array as HLO writes it: f32[8,128] and whether it lies in host memory."""

    dtype: str
    dims: tuple
    on_host: bool

    def __str__(self):
        return f'{self.dtype}[{",".join(map(str, self.dims))}]'

    @property
    def size(self):
        """Bytes; none for tokens and the like."""
        width = re.match(r'[a-z]+(\d+)', self.dtype)  # f8e4m3fn, bf16, s32, c64
        bits = 8 if self.dtype == 'pred' else int(width[1]) if width else 0
        return -(-math.prod(self.dims) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: shapes are those of the result, flattened; inside is the text between the parentheses, rest the
    text after them."""

    name: str
    opcode: str
    shapes: tuple
    inside: str
    rest: str

    @property
    def operands(self):
        """Names of the instructions that it takes."""
        return re.findall(r'%([\w.-]+)', self.inside)

    @property
    def called(self):
        """Names of the computations that it runs."""
        names = CALLED.findall(self.rest)
        for group in BRANCHES.findall(self.rest):
            names += [name.strip().lstrip('%') for name in group.split(',')]
        return names


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective.

    kind: the HLO's name of it. shapes: what a device hands in. size: the bytes of that. sent: bytes that leave
      the device if it runs as a ring, times not included. times: how often it runs in the program; exact is
      False where that is unknown to the compiler and `times` a lower bound. axes: mesh axes it runs along.
    asynchronous: it has a start and a done. behind: names of the computations with matmuls between them.
    """

    name: str
    kind: str
    shapes: tuple
    size: int
    sent: int
    times: int
    exact: bool
    axes: tuple
    asynchronous: bool
    behind: tuple

    @property
    def hidden(self):
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
    """The Instruction of a line, or None if it is something else."""
    found = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = ', line)
    if not found:
        return None
    rest = line[found.end():]
    end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
    opening = rest.index('(')
    closing = _closing(rest, opening)
    return Instruction(found[1], rest[:opening], shapes, rest[opening + 1:closing], rest[closing + 1:])


class Program:
    """A compiled program, from compiled.as_text()."""

    def __init__(self, text):
        """Raises ValueError if text is not scheduled HLO, whose order of lines would mean nothing."""
        if 'is_scheduled=true' not in text[:100_000].split('\n', 1)[0]:
            raise ValueError('not a scheduled HLO module; pass the text of a compiled program (compiled.as_text())')
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
        self._working = {}
        self.times = {}
        self._count(self.entry, 1, True)

    def _count(self, name, times, exact):
        """Add up how often each computation runs: {name: (times, exact)}."""
        before, known = self.times.get(name, (0, True))
        self.times[name] = (before + times, known and exact)
        for instruction in self.computations[name]:
            trips = self.trips(instruction) if instruction.opcode == 'while' else 1
            for inner in instruction.called:
                self._count(inner, times * (trips or 1), exact and trips is not None)

    def trips(self, loop):
        """Trip count of a while, or None where only the data know it.

        The TPU compiler does not print it: there a counter below a constant is taken for one that counts up
        from zero by ones, as those of lax.scan and lax.fori_loop do.
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

    def works(self, instruction):
        """Does it multiply matrices, itself or in what it calls?"""
        if instruction.opcode in MATMULS or KERNELS.search(instruction.rest):
            return True
        return any(self._computation_works(name) for name in instruction.called)

    def _computation_works(self, name):
        if name not in self._working:
            self._working[name] = any(self.works(i) for i in self.computations[name])
        return self._working[name]

    def transfers(self, degrees):
        """Every collective, in the order of the text.

        degrees: {axis: degree} of the mesh, slowest axis first.
        """
        out = []
        for name, lines in self.computations.items():
            if name not in self.times:
                continue
            table = {i.name: i for i in lines}
            for at, instruction in enumerate(lines):
                kind = self._collective(instruction)
                if kind:
                    out.append(self._transfer(kind, instruction, at, lines, table, self.times[name], degrees))
        return out

    def _collective(self, instruction):
        """The kind of collective that an instruction is or starts, or None."""
        opcode = instruction.opcode.removesuffix('-start')
        if opcode in COLLECTIVES:
            return opcode
        if opcode == 'async':
            inner = self.computations[instruction.called[0]]
            return next((i.opcode for i in inner if i.opcode in COLLECTIVES), None)
        return None

    def _transfer(self, kind, start, at, lines, table, times, degrees):
        shapes = tuple(shape for name in start.operands for shape in table[name].shapes)
        size = sum(shape.size for shape in shapes)
        text = start.rest
        if start.opcode == 'async-start':  # the groups stand in what it wraps
            text += ' '.join(i.rest for i in self.computations[start.called[0]] if i.opcode == kind)
        groups = device_groups(text)
        others = len(groups[0]) - 1 if groups else math.prod(degrees.values()) - 1
        asynchronous = start.opcode.endswith('-start') and '"is_sync":true' not in text
        behind = ()
        if asynchronous:
            done = next(i for i, line in enumerate(lines) if i > at and start.name in line.operands
                        and line.opcode.endswith('-done'))
            behind = tuple(i.name for i in lines[at + 1:done] if self.works(i))
        return Transfer(
            start.name, kind, shapes, size, _sent(kind, size, others), *times, axes_of(groups, degrees),
            asynchronous, behind,
        )

    def largest(self):
        """The largest tensor in device memory that is computed, not handed in: (Shape, name of the instruction)."""
        inside_fusions = {name for lines in self.computations.values() for i in lines
                          if i.opcode == 'fusion' for name in i.called}
        found = [
            (shape, i.name)
            for name, lines in self.computations.items() if name in self.times and name not in inside_fusions
            for i in lines if i.opcode not in VIEWS and not i.opcode.endswith(('-start', '-done'))
            for shape in i.shapes if not shape.on_host
        ]
        return max(found, key=lambda one: one[0].size)


def _sent(kind, size, others):
    """Bytes that leave a device when a collective over 1 + others devices runs as a ring."""
    share = others / (1 + others)
    return round(size * {'all-gather': others, 'all-reduce': 2 * share, 'reduce-scatter': share,
                         'all-to-all': share, 'collective-permute': 1}[kind])


def device_groups(text):
    """Groups of devices that a collective runs over: of a permute its (source, target) pairs, [] for all at once.

    Raises:
      ValueError: if they are written in a way not known here.
    """
    listed = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}', text)
    if listed:
        return [[int(d) for d in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', listed[1])]
    # [groups,size]<=[dims]T(order)
    tiled = re.search(r'replica_groups=\[\d+,(\d+)\]<=' + IOTA, text)
    if tiled:
        return _cut(_iota(tiled[2], tiled[3]), int(tiled[1]))
    # mesh['x'=2,'y'=4] {'y'}: along y of devices laid out over the axes, in the order of device_ids if that is there
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{((?:'\w+',?)+)\}}", text)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        dims, names, along = ','.join(sizes.values()), list(sizes), re.findall(r'\w+', mesh[4])
        devices = _iota(mesh[2] or dims, mesh[3])
        order = [name for name in names if name not in along] + along
        places = _iota(dims, ','.join(str(names.index(name)) for name in order))
        return _cut([devices[place] for place in places], math.prod(int(sizes[name]) for name in along))
    if re.search(r'replica_groups=(?!\{\})', text):
        raise ValueError(f'device groups of an unknown form in HLO: {text[text.index("replica_groups"):][:80]}')
    return []


def _iota(dims, order):
    """The numbers 0.. laid out over dims ('2,4'), transposed by order ('1,0' or None), in a row."""
    dims = [int(d) for d in dims.split(',')]
    order = [int(d) for d in order.split(',')] if order else range(len(dims))
    numbers = [0]
    for dim in order:
        stride = math.prod(dims[dim + 1:])
        numbers = [number + step * stride for number in numbers for step in range(dims[dim])]
    return numbers


def _cut(row, size):
    return [row[i:i + size] for i in range(0, len(row), size)]


def axes_of(groups, degrees):
    """Names of the mesh axes along which the members of a group differ; every axis if there are no groups."""
    if not groups:
        return tuple(name for name, degree in degrees.items() if degree > 1)
    moving = set()
    for group in groups:
        places = [_place(device, degrees) for device in group]
        moving |= {name for name in degrees if len({place[name] for place in places}) > 1}
    return tuple(name for name in degrees if name in moving)


def _place(device, degrees):
    place = {}
    for name in reversed(degrees):
        device, place[name] = divmod(device, degrees[name])
    return place


def memory_of(compiled):
    """Bytes of a device by kind, as the compiler laid them out: arguments, outputs (those that share the place of
    an argument are in aliased), temporaries, peak, and temporaries in host memory."""
    stats = compiled.memory_analysis()
    return {
        'arguments': stats.argument_size_in_bytes, 'outputs': stats.output_size_in_bytes,
        'aliased': stats.alias_size_in_bytes, 'temporaries': stats.temp_size_in_bytes,
        'peak': stats.peak_memory_in_bytes, 'host_temporaries': stats.host_temp_size_in_bytes,
        'host_arguments': stats.host_argument_size_in_bytes, 'host_outputs': stats.host_output_size_in_bytes,
    }


def device_bytes(memory):
    """What a program takes of a device: memory_of, added up. (The compilers' own peak counts host memory as well.)"""
    return memory['arguments'] + memory['outputs'] - memory['aliased'] + memory['temporaries']
