"""PyTorch's files without PyTorch: its tensors are read bit for bit, and pickles of anything else are refused
by name and never run."""

import os
import pathlib
import pickle
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from lct.weights import torch_files, zip_files

GOLDEN = pathlib.Path(__file__).parent / 'golden'
KINDS = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}


@pytest.mark.parametrize('name', ['torch_views', 'torch_module', 'torch_ordered'])
def test_files_written_by_torch(name):
    tensors = torch_files.read_header(GOLDEN / f'{name}.pth')
    golden = np.load(GOLDEN / f'{name}.npz')
    assert list(tensors) == list(golden)
    for key, tensor in tensors.items():
        values = tensor.read()
        assert values.dtype == KINDS[tensor.dtype] and tensor.shape == golden[key].shape
        np.testing.assert_array_equal(values.astype(np.float32), golden[key])
    if name == 'torch_views':
        assert {key: tensor.dtype for key, tensor in tensors.items() if key in ('bf16', 'f16', 'f32')} == {
            'bf16': 'BF16', 'f16': 'F16', 'f32': 'F32'}
        np.testing.assert_array_equal(tensors['turned'].read(slice(1, 3), slice(2, 6)),
                                      golden['turned'][1:3, 2:6])


def test_what_is_written_is_read_back_by_two_readers(tmp_path):
    path, shapes = tmp_path / 'consolidated.00.pth', {'a.weight': (3, 5), 'b': (7,)}
    values = {name: np.random.default_rng(0).standard_normal(shape) for name, shape in shapes.items()}
    for dtype, kind in KINDS.items():
        with torch_files.create(path, shapes, dtype) as arrays:
            for name, array in arrays.items():
                array[...] = values[name]
        tensors = torch_files.read_header(path)
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None  # every checksum
            for i, (name, tensor) in enumerate(tensors.items()):
                assert tensor.offset % 64 == 0
                expected = values[name].astype(kind).tobytes()
                assert tensor.read().tobytes() == archive.read(f'consolidated.00/data/{i}') == expected


# --- what is refused --------------------------------------------------------------------------------


class Call:
    """An object that pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduction = function, arguments

    def __reduce__(self):
        return self.reduction


def tensor_code(offset=0, shape=(2, 3), strides=(3, 1), key='0', numel=6, kind=b'torch\nFloatStorage\n',
                function=b'torch._utils\n_rebuild_tensor_v2\n'):
    """The pickle of {'w': tensor}, put together by hand so that it can be wrong."""
    storage = b'(' + body('storage') + b'c' + kind + body(key) + body('cpu') + body(numel) + b'tQ'
    view = body(offset) + body(shape) + body(strides)
    return (b'\x80\x02}(' + body('w') + b'c' + function + b'(' + storage + view
            + b'\x89ccollections\nOrderedDict\n)RtRu.')


def body(value):
    return pickle.dumps(value, 2)[2:-1]


def archive(path, table, data=bytes(24), compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, 'w', compression) as file:
        for name, content in {'data.pkl': table, 'data/0': data, **members}.items():
            file.writestr(f'x/{name}', content)
    return path


def refusal(path):
    start = time.thread_time()
    with pytest.raises(ValueError) as error:
        torch_files.read_header(path)
    message = str(error.value)
    assert time.thread_time() - start < 5  # what grows with the square of the file takes minutes
    assert message.startswith(str(path)) and '\n' not in message and len(message) < 600
    return message


def test_the_file_made_by_hand_is_valid(tmp_path):
    path = archive(tmp_path / 'x.pth', tensor_code(), np.arange(6, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(torch_files.read_header(path)['w'].read(), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(('function', 'arguments', 'name'), [
    (os.system, ('touch MARK',), 'system'),
    (os.mkdir, ('MARK',), 'mkdir'),
    (eval, ("open('MARK', 'w')",), 'eval'),
    (exec, ("open('MARK', 'w')",), 'exec'),
    (getattr, (os, 'system'), 'getattr'),
    (open, ('MARK', 'w'), 'open'),
    (pathlib.Path.touch, (pathlib.Path('MARK'),), 'getattr'),
    (__import__, ('MARK',), '__import__'),
])
def test_a_pickle_that_would_run_code_is_refused_unrun(function, arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {'x.pth'}
    if arguments[0] is os:
        arguments = ('os', 'system')
    for value in (Call(function, *arguments), {'w': Call(function, *arguments)},
                  {'w': [Call(function, *arguments)]}):
        message = refusal(archive(tmp_path / 'x.pth', pickle.dumps(value, 2)))
        assert name in message or 'opcode' in message
        assert set(os.listdir(tmp_path)) == before


def test_other_calls_are_refused_by_name(tmp_path):
    for function in (b'torch._utils\n_rebuild_parameter\n', b'torch.jit\nload\n', b'posix\nsystem\n',
                     b'torch._utils\n_rebuild_tensor_v2x\n', b'builtins\neval\n'):
        message = refusal(archive(tmp_path / 'x.pth', tensor_code(function=function)))
        assert function.decode().split()[1] in message
    for kind in (b'torch\nDoubleStorage\n', b'torch\nLongStorage\n', b'torch.storage\nUntypedStorage\n'):
        assert kind.decode().split()[1] in refusal(archive(tmp_path / 'x.pth', tensor_code(kind=kind)))


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(offset=1), 'reaches element 6 of a storage of 6'),
    (dict(offset=-1), 'integers >= 0'),
    (dict(strides=(4, 1)), 'reaches element 6'),
    (dict(strides=(-3, 1)), 'integers >= 0'),
    (dict(strides=(3,)), 'number of dims'),
    (dict(shape=(2, 4)), 'reaches'),
    (dict(shape=(0, 3)), 'integers >= 0'),
    (dict(shape=(True, 3)), 'integers >= 0'),
    (dict(shape=(2**62, 2**62)), 'reaches'),
    (dict(shape=(10**600, 1)), 'reaches'),
    (dict(shape=(1,) * 9, strides=(1,) * 9), 'integers >= 0'),
    (dict(shape='23'), 'integers >= 0'),
    (dict(numel=7), 'claims 7'),
    (dict(numel=-6), 'claims -6'),
    (dict(numel=10**600), 'claims'),
    (dict(key='1'), "lacks the storage '1'"),
    (dict(key='../data.pkl'), 'lacks the storage'),
    (dict(key=0), 'not a storage'),
])
def test_tensors_outside_of_their_storage_are_refused(changes, message, tmp_path):
    assert message in refusal(archive(tmp_path / 'x.pth', tensor_code(**changes)))


@pytest.mark.parametrize('table', [
    b'', b'.', b'\x80\x02.', b'\x80\x02}', b'\x80\x02N.', b'\x80\x02}.', b'\x80\x02(', b'\x80\x02t.',
    b'\x80\x02u.', b'\x80\x02\x86.', b'\x80\x02h\x00.', b'\x80\x02R.', b'\x80\x02Q.', b'\x80\x02}}s.',
    b'\x80\x02}(K\x01K\x02u.', b'\x80\x02}(X\x01\x00\x00\x00au.', b'\x80\x02}X\x01\x00\x00\x00aK\x01s.',
    b'\x80\x02K\x01}b.', b'\x80\x02K\x01Q.', b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.',
    b'\x80\x02X\xff\xff\xff\xff.', b'\x80\x02r\xff\xff\xff\xff.', b'\x80\x02\x8b\xff\xff\xff\x7f.',
    b'\x80\x02I' + b'9' * 5000 + b'\n.', b'\xff', b'cos\nsystem\n.', b'\x80\x02}}b.',
    b'\x80\x02' + b'(' * 300_000, b'\x80\x02)' + b'\x85' * 300_000 + b'.',
])
def test_damaged_pickles_are_refused(table, tmp_path):
    refusal(archive(tmp_path / 'x.pth', table))


def test_nested_tuples_are_neither_hashed_nor_printed(tmp_path):
    doubled = b')' + b'q\x00h\x00\x86' * 200  # a tuple of itself twice, 200 times over
    for table in (doubled + b'.', doubled + b'Q.', b'}' + doubled + b'K\x01s.', tensor_code(shape=()).replace(
            b'\x89', doubled + b'\x89')):
        refusal(archive(tmp_path / 'x.pth', b'\x80\x02' + table.removeprefix(b'\x80\x02')))


def test_damaged_archives_are_refused(tmp_path):
    path = tmp_path / 'x.pth'
    assert 'compressed' in refusal(archive(path, tensor_code(), compression=zipfile.ZIP_DEFLATED))
    assert 'little-endian' in refusal(archive(path, tensor_code(), byteorder='big'))
    assert 'too many' in refusal(archive(path, tensor_code() + bytes(2**19)))
    with zipfile.ZipFile(path, 'w') as file:
        for name in ('x/data.pkl', 'y/data.pkl'):
            file.writestr(name, tensor_code())
    assert 'without the data.pkl' in refusal(path)
    path.write_bytes(b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.')
    assert 'since 1.6' in refusal(path)
    path.unlink()
    assert 'missing' in refusal(path)
    content = archive(path, tensor_code()).read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        refusal(path)
    with zipfile.ZipFile(path, 'w') as file, pytest.warns(UserWarning, match='Duplicate'):
        for _ in range(2):
            file.writestr('x/data.pkl', tensor_code())
    assert 'twice' in refusal(path)


def test_an_inconsistent_directory_is_refused(tmp_path):
    path = tmp_path / 'x.pth'
    content = archive(path, tensor_code()).read_bytes()
    end = content.rindex(b'PK\5\6')
    first = content.index(b'PK\1\2')
    second = content.index(b'PK\1\2', first + 1)

    def edited(at, layout, value):
        return content[:at] + struct.pack(layout, value) + content[at + struct.calcsize(layout):]

    for broken in (
        edited(end + 12, '<L', 2**31), edited(end + 16, '<L', len(content)), edited(end + 10, '<H', 9),
        edited(first + 42, '<L', 2**31), edited(first + 42, '<L', end), edited(first + 28, '<H', 60_000),
        edited(second + 42, '<L', 0), edited(first + 24, '<L', 2**32 - 1),
        edited(second + 46, '<7s', b'y/data/'),
    ):
        path.write_bytes(broken)
        refusal(path)


def test_sizes_over_four_gigabytes_are_read_from_zip64(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_files.files, 'allocate', lambda file, size: file.truncate(size))  # sparse
    path = tmp_path / 'x.zip'
    sizes = {'a': 5 * 2**30, 'b': b'end'}
    monkeypatch.setattr(zip_files, '_checksum', lambda *_: 0)
    with zip_files.create(path, sizes) as offsets:
        pass
    assert zip_files.read_directory(path) == {'a': (offsets['a'], 5 * 2**30), 'b': (offsets['b'], 3)}
    assert zip_files.read(path, (offsets['b'], 3)) == b'end'
