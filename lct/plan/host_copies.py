"""Copies between a device and the memory of its host in a compiled program, and whether they overlap.

They are those of a remat policy that keeps activations on the host: the forward of a layer writes them, its
backward reads them.
"""

from typing import NamedTuple

from lct.plan.hlo import VIEWS, Program


class HostCopy(NamedTuple):
    """size: bytes of one copy. times: executions, exact or at least. behind: as in hlo.Transfer."""

    name: str
    to_host: bool
    size: int
    times: int
    exact: bool
    behind: tuple[str, ...]

    @property
    def hidden(self) -> bool:
        """Whether the copy overlaps with matmuls."""
        return bool(self.behind)


def host_copies(program: Program) -> list[HostCopy]:
    """Every copy of an array to or from the host, in the order of the text."""
    found = []
    for name, lines in program.executed().items():
        results = {i.name: i.shapes for i in lines}
        for at, instruction in enumerate(lines):
            if instruction.opcode in VIEWS or instruction.opcode.endswith('-done'):
                continue
            shapes = [*instruction.shapes, *(s for operand in instruction.operands for s in results[operand])]
            arrays = [shape for shape in shapes if shape.dims]  # no indices, no tokens
            if {shape.on_host for shape in arrays} != {True, False}:
                continue
            size = max(shape.size for shape in arrays if not shape.on_host)
            behind = program.behind(lines, at) if instruction.opcode.endswith('-start') else ()
            # what a start returns begins with its arguments
            to_host = [shape for shape in instruction.shapes if shape.dims][-1].on_host
            found.append(HostCopy(instruction.name, to_host, size, *program.times[name], behind))
    return found
