"""PyTorch's .pth files of tensors, read and written without PyTorch and without running a pickle.

Format: a zip archive of stored members. <name>/data.pkl is a pickle of {tensor name: call of
torch._utils._rebuild_tensor_v2}, and <name>/data/<key> are the bytes of one storage, which the pickle names by
a persistent id. Here the pickle is no program: a small machine knows the few opcodes that such a table takes,
and the only things that it can make are strings, numbers, tuples, dicts and descriptions of tensors.
"""

import contextlib
import math
import os
import pathlib
import pickletools
import struct
from typing import NamedTuple

import numpy as np

from lct.weights import zip_files
from lct.weights.json_files import shown
from lct.weights.tensors import FLOATS, Tensor, row_by_row

STORAGES = {'torch FloatStorage': 'F32', 'torch HalfStorage': 'F16', 'torch BFloat16Storage': 'BF16'}
REBUILD, ORDERED = 'torch._utils _rebuild_tensor_v2', 'collections OrderedDict'
ALLOWED = {*STORAGES, REBUILD, ORDERED}
MAX_RANK = 8
MAX_OPCODES = 200_000  # a 405B model takes a third


class _Name(str):
    """A global of the pickle: one of ALLOWED."""


class _Storage(NamedTuple):
    dtype: str
    numel: int
    offset: int


class _Mark:
    """Where a tuple or the items of a dict begin on the stack."""


def read_header(path):
    """{name: Tensor} of one file.

    Raises:
      ValueError: if the file is anything but a table of float32, float16 or bfloat16 tensors that lie within
        their storages; whatever else the pickle asks for is named, and never run.
    """
    path = os.fspath(path)
    members = zip_files.read_directory(path)
    tables = [name for name in members if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(tables) != 1:
        raise ValueError(f'{path} is a zip archive without the data.pkl of torch.save; copy it again')
    root = tables[0].removesuffix('data.pkl')
    if root + 'byteorder' in members and zip_files.read(path, members[root + 'byteorder']) != b'little':
        raise ValueError(f'{path} is not in little-endian byte order; save it again on such a machine')
    table = _interpret(zip_files.read(path, members[tables[0]]), path, members, root)
    if not isinstance(table, dict) or not table:
        raise ValueError(f'{path} holds a {type(table).__name__}; it must be a dict of tensors by name')
    for name, value in table.items():
        if not isinstance(value, Tensor):
            raise ValueError(f'{path} holds under {shown(name)} a {type(value).__name__}; only tensors are read')
    return table


# ---------------------------------------------------------------------------------------------------
# The pickle
# ---------------------------------------------------------------------------------------------------

CONSTANTS = {'NEWTRUE': True, 'NEWFALSE': False, 'NONE': None}
LITERALS = {'BINUNICODE', 'SHORT_BINUNICODE', 'BININT', 'BININT1', 'BININT2', 'LONG1'}
TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def _interpret(data, path, members, root):
    """What a pickle describes."""
    stack, memo = [], {}

    def since_mark():
        at = next(i for i in reversed(range(len(stack))) if isinstance(stack[i], _Mark))
        items = stack[at + 1:]
        del stack[at:]
        return items

    def set_items(pairs):
        if not isinstance(stack[-1], dict) or not all(isinstance(key, str) for key in pairs[::2]):
            raise ValueError(f'{path} has items that are not under a name in a dict; only tensors are read')
        stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            code = opcode.name
            if count == MAX_OPCODES:
                raise ValueError(f'{path} has a data.pkl of more than {MAX_OPCODES} opcodes, too many for a model')
            if code in LITERALS:
                stack.append(argument)
            elif code in CONSTANTS:
                stack.append(CONSTANTS[code])
            elif code == 'EMPTY_DICT':
                stack.append({})
            elif code == 'MARK':
                stack.append(_Mark())
            elif code == 'TUPLE':
                stack.append(tuple(since_mark()))
            elif code in TUPLES:
                at = len(stack) - TUPLES[code]
                if at < 0:
                    raise IndexError
                stack[at:] = [tuple(stack[at:])]
            elif code in ('BINPUT', 'LONG_BINPUT'):
                memo[argument] = stack[-1]
            elif code in ('BINGET', 'LONG_BINGET'):
                stack.append(memo[argument])
            elif code == 'GLOBAL':
                if argument not in ALLOWED:
                    raise ValueError(
                        f'{path} asks for {shown(argument)}, which is no tensor; nothing was run, and the file is '
                        'not to be trusted' if not argument.startswith('torch ') else
                        f'{path} asks for {shown(argument)}; only float32, float16 and bfloat16 tensors are read')
                stack.append(_Name(argument))
            elif code == 'BINPERSID':
                stack.append(_storage(stack.pop(), path, members, root))
            elif code == 'REDUCE':
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments, path))
            elif code == 'SETITEM':
                pair = [stack.pop(), stack.pop()]
                set_items(pair[::-1])
            elif code == 'SETITEMS':
                set_items(since_mark())
            elif code == 'BUILD':  # the attributes of an OrderedDict: versions of modules
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError(f'{path} gives attributes to a {type(stack[-1]).__name__}; only tensors are read')
            elif code == 'STOP':
                (result,) = stack
                return result
            elif code != 'PROTO':
                raise ValueError(f'{path} has the pickle opcode {code}, which no table of tensors needs; nothing was run')
    except ValueError as error:
        if str(error).startswith(path):
            raise
        raise ValueError(f'{path} has a damaged data.pkl ({shown(str(error))}); copy it again') from None
    except (IndexError, KeyError, StopIteration):
        raise ValueError(f'{path} has a damaged data.pkl; copy it again') from None


def _call(function, arguments, path):
    """The two calls that there are: a dict, or a tensor in a storage."""
    if function == ORDERED and isinstance(function, _Name) and arguments == ():
        return {}
    if function != REBUILD or not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError(f'{path} calls something that is no tensor; nothing was run')
    if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], _Storage):
        raise ValueError(f'{path} describes a tensor without its storage; copy it again')
    storage, offset, shape, strides = arguments[:4]
    counts = [shape, strides]
    if not all(isinstance(x, tuple) and len(x) <= MAX_RANK and all(map(_is_count, x)) for x in counts) or (
            len(shape) != len(strides) or 0 in shape or not _is_count(offset)):
        raise ValueError(
            f'{path} describes a tensor whose offset, sizes and strides are not integers >= 0 of one number of dims')
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if last >= storage.numel:
        raise ValueError(
            f'{path} describes a tensor that reaches element {shown(last)} of a storage of {storage.numel}; '
            'copy it again')
    start = storage.offset + offset * FLOATS[storage.dtype].itemsize
    return Tensor(path, storage.dtype, shape, start, None if strides == row_by_row(shape) else strides)


def _storage(identity, path, members, root):
    """The storage of a persistent id ('storage', type, key, device, number of elements)."""
    match identity:
        case ('storage', _Name() as kind, str() as key, str(), int() as numel) if kind in STORAGES:
            member = members.get(f'{root}data/{key}')
        case _:
            raise ValueError(f'{path} names something that is no storage of floats; only tensors are read')
    if member is None:
        raise ValueError(f'{path} lacks the storage {shown(key)}; it is incomplete, copy it again')
    offset, size = member
    if numel < 1 or numel * FLOATS[STORAGES[kind]].itemsize != size:
        raise ValueError(
            f'{path} has {size} bytes in the storage {shown(key)}, which says that it holds {shown(numel)} numbers of '
            f'{STORAGES[kind]}')
    return _Storage(STORAGES[kind], numel, offset)


def _is_count(x):
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def create(path, shapes, dtype):
    """Create a file for {name: shape}, all of one dtype, and yield {name: writable memory map}; the file is
    whole when the context ends."""
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
    """The pickle, protocol 2, of {name: tensor in the storage of its number}."""
    kind = next(name for name, ours in STORAGES.items() if ours == dtype)

    def glob(name):
        return f'c{name.replace(" ", chr(10), 1)}\n'.encode()

    def text(x):
        return b'X' + struct.pack('<L', len(x.encode())) + x.encode()

    def number(x):
        return b'J' + struct.pack('<l', x) if x < 2**31 else b'\x8a\x08' + struct.pack('<q', x)

    def numbers(xs):
        return b'(' + b''.join(map(number, xs)) + b't'

    def tensor(i, shape):
        storage = b'(' + text('storage') + glob(kind) + text(str(i)) + text('cpu') + number(math.prod(shape)) + b'tQ'
        view = number(0) + numbers(shape) + numbers(row_by_row(shape)) + b'\x89'
        return glob(REBUILD) + b'(' + storage + view + glob(ORDERED) + b')RtR'

    items = b''.join(text(name) + tensor(i, shape) for i, (name, shape) in enumerate(shapes.items()))
    return b'\x80\x02}(' + items + b'u.'
