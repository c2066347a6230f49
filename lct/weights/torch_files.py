"""PyTorch's .pth files of tensors, read and written without PyTorch and without running a pickle.

Format: a zip archive of stored members. <name>/data.pkl is a pickle of {tensor name: call of
torch._utils._rebuild_tensor_v2}, and <name>/data/<key> holds the bytes of one storage, which the pickle names
by a persistent id. The pickle is not executed: a small interpreter knows the few opcodes that such a table
needs, and can make only strings, numbers, tuples, dicts and descriptions of tensors.
"""

import contextlib
import math
import os
import pathlib
import pickletools
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lct import files
from lct.json_files import short_repr
from lct.weights import zip_files
from lct.weights.tensors import FLOATS, Tensor, contiguous_strides

STORAGES = {'torch FloatStorage': 'F32', 'torch HalfStorage': 'F16', 'torch BFloat16Storage': 'BF16'}
REBUILD, ORDERED = 'torch._utils _rebuild_tensor_v2', 'collections OrderedDict'
ALLOWED = {*STORAGES, REBUILD, ORDERED}
MAX_RANK = 8
MAX_OPCODES = 200_000  # a 405B model needs a third


def read_header(path: str | os.PathLike) -> dict[str, Tensor]:
    """{name: Tensor} of one file.

    Raises:
      ValueError: unless the file is a table of float32, float16 or bfloat16 tensors that lie within their
        storages; anything else that the pickle calls is named, and never run.
    """
    path = os.fspath(path)
    files.refuse_lfs_pointer(path)
    members = zip_files.read_directory(path)
    tables = [name for name in members if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(tables) != 1:
        raise ValueError(f'{path} is a zip archive without the data.pkl of torch.save; copy it again')
    root = tables[0].removesuffix('data.pkl')
    if root + 'byteorder' in members and zip_files.read(path, members[root + 'byteorder']) != b'little':
        raise ValueError(f'{path} is not in little-endian byte order; save it again on such a machine')
    table = _Interpreter(path, members, root).run(zip_files.read(path, members[tables[0]]))
    if not isinstance(table, dict) or not table:
        raise ValueError(f'{path} holds a {type(table).__name__}; it must be a dict of tensors by name')
    for name, value in table.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f'{path} holds a {type(value).__name__} under {short_repr(name)}; only tensors are read')
    return table


# ---------------------------------------------------------------------------------------------------
# The pickle
# ---------------------------------------------------------------------------------------------------

CONSTANTS = {'NEWTRUE': True, 'NEWFALSE': False, 'NONE': None}
LITERALS = {'BINUNICODE', 'SHORT_BINUNICODE', 'BININT', 'BININT1', 'BININT2', 'LONG1'}
TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Global(str):
    """A global name in the pickle: one of ALLOWED."""


class _Storage(NamedTuple):
    dtype: str
    numel: int
    offset: int


class _Mark:
    """The beginning of a tuple or of the items of a dict on the stack."""


class _Interpreter:
    """Evaluates the pickle of a table of tensors.

    path: the file, for error messages. members: those of its zip archive; root: the folder in it.
    """

    def __init__(self, path: str, members: dict[str, zip_files.Span], root: str):
        self.path, self.members, self.root = path, members, root
        self.stack, self.memo = [], {}

    def run(self, data: bytes) -> Any:
        """The value that the pickle describes."""
        path = self.path
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count == MAX_OPCODES:
                    raise ValueError(
                        f'{path} has a data.pkl of more than {MAX_OPCODES} opcodes, too many for a model; '
                        'copy it again')
                if opcode.name == 'STOP':
                    (result,) = self.stack
                    return result
                self._step(opcode.name, argument)
        except ValueError as error:
            if str(error).startswith(path):
                raise
            raise ValueError(
                f'{path} has a damaged data.pkl ({short_repr(str(error))}); copy it again') from None
        except (IndexError, KeyError, StopIteration):
            raise ValueError(f'{path} has a damaged data.pkl; copy it again') from None

    def _step(self, code, argument):
        stack = self.stack
        if code in LITERALS:
            stack.append(argument)
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in TUPLES:
            self._push_tuple(TUPLES[code])
        elif code in self.OPCODES:
            self.OPCODES[code](self, argument)
        elif code != 'PROTO':
            raise ValueError(
                f'{self.path} has the pickle opcode {code}, which no table of tensors needs; nothing was run')

    def _push_tuple(self, length):
        begin = len(self.stack) - length
        if begin < 0:
            raise IndexError
        self.stack[begin:] = [tuple(self.stack[begin:])]

    def _pop_to_mark(self):
        stack = self.stack
        mark = next(i for i in reversed(range(len(stack))) if isinstance(stack[i], _Mark))
        items = stack[mark + 1:]
        del stack[mark:]
        return items

    def _set_items(self, pairs):
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in pairs[::2]):
            raise ValueError(
                f'{self.path} has items that are not under a name in a dict; only tensors are read')
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _set_item(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _put(self, index):
        self.memo[index] = self.stack[-1]

    def _get(self, index):
        self.stack.append(self.memo[index])

    def _push_global(self, name):
        if name in ALLOWED:
            self.stack.append(_Global(name))
        elif name.startswith('torch '):
            raise ValueError(
                f'{self.path} needs {short_repr(name)}; only float32, float16 and bfloat16 tensors are read')
        else:
            raise ValueError(
                f'{self.path} calls {short_repr(name)}, which does not make a tensor; nothing was run, and '
                'the file is not to be trusted')

    def _push_storage(self, _):
        self.stack.append(_storage(self.stack.pop(), self.path, self.members, self.root))

    def _reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, arguments, self.path))

    def _build(self, _):
        """Drop the attributes of an OrderedDict, which are versions of modules."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError(
                f'{self.path} gives attributes to a {type(self.stack[-1]).__name__}; only tensors are read')

    OPCODES = {
        'EMPTY_DICT': lambda self, _: self.stack.append({}),
        'MARK': lambda self, _: self.stack.append(_Mark()),
        'TUPLE': lambda self, _: self.stack.append(tuple(self._pop_to_mark())),
        'BINPUT': _put,
        'LONG_BINPUT': _put,
        'BINGET': _get,
        'LONG_BINGET': _get,
        'GLOBAL': _push_global,
        'BINPERSID': _push_storage,
        'REDUCE': _reduce,
        'SETITEM': _set_item,
        'SETITEMS': lambda self, _: self._set_items(self._pop_to_mark()),
        'BUILD': _build,
    }


def _call(function, arguments, path):
    """The result of one of the two calls that are known: an empty dict, or a tensor in a storage."""
    if function == ORDERED and isinstance(function, _Global) and arguments == ():
        return {}
    if function != REBUILD or not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError(f'{path} calls a function that does not make a tensor; nothing was run')
    return _rebuild_tensor(arguments, path)


def _rebuild_tensor(arguments, path):
    """The tensor of the arguments (storage, offset, shape, strides, ...) of _rebuild_tensor_v2."""
    if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], _Storage):
        raise ValueError(f'{path} describes a tensor without its storage; copy it again')
    storage, offset, shape, strides = arguments[:4]
    if not _are_counts(shape) or not _are_counts(strides) or len(shape) != len(strides) or 0 in shape or (
            not _is_count(offset)):
        raise ValueError(
            f'{path} describes a tensor whose offset, sizes and strides are not integers >= 0 of one number '
            f'of dims (at most {MAX_RANK}); copy it again')
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if last >= storage.numel:
        raise ValueError(
            f'{path} describes a tensor that reaches element {short_repr(last)} of a storage of '
            f'{storage.numel}; copy it again')
    start = storage.offset + offset * FLOATS[storage.dtype].itemsize
    strides = None if strides == contiguous_strides(shape) else strides
    return Tensor(path, storage.dtype, shape, start, strides)


def _storage(identity, path, members, root):
    """The storage of a persistent id ('storage', type, key, device, number of elements)."""
    match identity:
        case ('storage', _Global() as kind, str() as key, str(), int() as numel) if kind in STORAGES:
            member = members.get(f'{root}data/{key}')
        case _:
            raise ValueError(
                f'{path} has a persistent id that is not a storage of floats; only tensors are read')
    if member is None:
        raise ValueError(f'{path} lacks the storage {short_repr(key)}; it is incomplete, copy it again')
    offset, size = member
    if numel < 1 or numel * FLOATS[STORAGES[kind]].itemsize != size:
        raise ValueError(
            f'{path} has {size} bytes in the storage {short_repr(key)}, which claims {short_repr(numel)} '
            f'numbers of {STORAGES[kind]}; copy it again')
    return _Storage(STORAGES[kind], numel, offset)


def _is_count(x):
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _are_counts(xs):
    return isinstance(xs, tuple) and len(xs) <= MAX_RANK and all(map(_is_count, xs))


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def create(
        path: str | os.PathLike, shapes: dict[str, tuple[int, ...]],
        dtype: str) -> Iterator[dict[str, np.memmap]]:
    """Create a file for {name: shape}, all of one dtype, and yield {name: writable memory map}; the file is
    complete when the context ends."""
    root = pathlib.Path(path).stem
    storages = {f'{root}/data/{i}': shape for i, shape in enumerate(shapes.values())}
    sizes = {key: math.prod(shape) * FLOATS[dtype].itemsize for key, shape in storages.items()}
    members = {f'{root}/data.pkl': _table(shapes, dtype), f'{root}/byteorder': b'little', **sizes,
               f'{root}/version': b'3\n'}
    with zip_files.create(path, members) as offsets:
        arrays = {
            name: np.memmap(path, FLOATS[dtype], 'r+', offsets[key], shape)
            for name, (key, shape) in zip(shapes, storages.items())
        }
        yield arrays
        for array in arrays.values():
            array.flush()


def _table(shapes, dtype):
    """The pickle, protocol 2, of {name: shape}: tensor i is in storage i."""
    kind = next(name for name, stored in STORAGES.items() if stored == dtype)

    def glob(name):
        return f'c{name.replace(" ", chr(10), 1)}\n'.encode()

    def text(x):
        return b'X' + struct.pack('<L', len(x.encode())) + x.encode()

    def number(x):
        return b'J' + struct.pack('<l', x) if x < 2**31 else b'\x8a\x08' + struct.pack('<q', x)

    def numbers(xs):
        return b'(' + b''.join(map(number, xs)) + b't'

    def tensor(i, shape):
        size = number(math.prod(shape))
        storage = b'(' + text('storage') + glob(kind) + text(str(i)) + text('cpu') + size + b'tQ'
        view = number(0) + numbers(shape) + numbers(contiguous_strides(shape)) + b'\x89'
        return glob(REBUILD) + b'(' + storage + view + glob(ORDERED) + b')RtR'

    items = b''.join(text(name) + tensor(i, shape) for i, (name, shape) in enumerate(shapes.items()))
    return b'\x80\x02}(' + items + b'u.'
