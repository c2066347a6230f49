"""Files appear complete under their name or not at all."""

import pytest

from lct import files


def test_text_and_bytes_replace_an_old_file(tmp_path):
    path = tmp_path / 'results.json'
    files.write_atomically(path, 'grüße\r\n')
    assert path.read_bytes() == 'grüße\r\n'.encode()
    files.write_atomically(path, b'\xff')
    assert path.read_bytes() == b'\xff'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / 'rows.jsonl'
    path.write_text('old')
    with pytest.raises(error), files.atomic_file(path) as file:
        file.write('new')
        raise error
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_the_name_appears_when_the_block_ends(tmp_path):
    path = tmp_path / 'figure.png'
    with files.atomic_path(path) as partial:
        partial.write_bytes(b'png')
        assert not path.exists()
    assert path.read_bytes() == b'png'


def test_a_name_without_a_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_path(tmp_path / 'figure.png'):
        pass
