"""Metrics that no disk can stop."""

import errno
import json
import os
import struct
import threading
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from lct.train import append_file, event_records, metrics, metrics_writer
from lct.train.append_file import AppendFile
from lct.train.metrics import Metrics


def rows(folder):
    return [json.loads(row, parse_constant=pytest.fail)
            for row in (folder / 'metrics.jsonl').read_text().splitlines()]


def events(path):
    data, found = path.read_bytes(), []
    while data:
        size, = struct.unpack('<Q', data[:8])
        found.append(Event.FromString(data[12:12 + size]))
        data = data[16 + size:]
    return found


@pytest.fixture
def disk(monkeypatch):
    """disk['room']: bytes that can still be written."""
    left, write = {'room': 1 << 30}, os.write

    def limited(file, data):
        if not left['room']:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, data[:left['room']])
        left['room'] -= written
        return written

    monkeypatch.setattr(append_file.os, 'write', limited)
    monkeypatch.setattr(metrics, 'write_line', lines := [].append)
    monkeypatch.setattr(metrics_writer, 'RETRY_S', 0.01)
    left['lines'] = lines.__self__
    return left


def test_a_full_disk_is_warned_of_once_and_rows_come_when_there_is_room(tmp_path, disk):
    written = Metrics(tmp_path, 0)
    written.write(1, {'loss': 1.0})
    written.flush()
    disk['room'] = 11  # in the middle of a record
    for step in (2, 3, 4):
        written.write(step, {'loss': float(step)})
        written.flush()
    assert [row['step'] for row in rows(tmp_path)] == [1]  # not a half row
    assert len(disk['lines']) == 1 and 'No space left on device); training goes on' in disk['lines'][0]
    disk['room'] = 1 << 30
    written.write(5, {'loss': 5.0})
    written.close()
    assert [row['step'] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    path, = tmp_path.glob('events*')
    assert [event.step for event in events(path) if event.HasField('summary')] == [1, 2, 3, 4, 5]
    assert disk['lines'][1:] == ['metrics are written again; 0 rows are missing']


def test_rows_that_are_lost_are_counted(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(AppendFile, 'MOST', 2)
    disk['room'] = 0
    written = Metrics(tmp_path, 0)
    for step in range(5):
        written.write(step, {'loss': 1.0})
        written.flush()
    written.write(6, {'loss': object()})
    written.close()
    assert disk['lines'][-1].startswith('WARNING: 6 rows of metrics could not be written to ')


def test_a_disk_that_does_not_answer_blocks_nothing(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(metrics_writer, 'WAIT_S', 0.05)
    monkeypatch.setattr(append_file.os, 'write', lambda *_: threading.Event().wait())
    written, began = Metrics(tmp_path, 0), time.monotonic()
    for step in range(20):
        written.write(step, {'loss': 1.0})
        written.flush()
    written.close()
    assert time.monotonic() - began < 5
    assert 'has taken no metrics for 0 s; training goes on' in disk['lines'][0] and len(disk['lines']) == 2


def test_metrics_are_strict_json(tmp_path):
    written = Metrics(tmp_path, 0)
    written.write(1, {'loss': float('nan'), 'grad_norm': float('inf'), 'skipped': 1})
    written.close()
    assert rows(tmp_path) == [{'step': 1, 'loss': None, 'grad_norm': None, 'skipped': 1}]
    path, = tmp_path.glob('events*')
    values = {value.tag: value.simple_value for value in events(path)[-1].summary.value}
    assert np.isnan(values['loss']) and values['grad_norm'] == float('inf')


@pytest.mark.parametrize('end', [b'{"step": 4, "lo', b'\0\0\0', b''])
def test_a_continued_run_drops_what_lies_behind_its_checkpoint(end, tmp_path, disk):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b''.join(b'{"step": %d}\n' % step for step in (1, 2, 3)) + end)
    disk['room'] = 0  # also then
    Metrics(tmp_path, 2).close()
    assert [row['step'] for row in rows(tmp_path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 2}\n')
    Metrics(tmp_path, 2).close()
    assert [row['step'] for row in rows(tmp_path)] == [1, 2]


def test_tensorboard_hides_the_steps_that_are_written_again(tmp_path, monkeypatch):
    for first, clock in ((0, 1e9), (2, 5e8)):  # the clock was set back between the two
        monkeypatch.setattr(event_records.time, 'time', lambda clock=clock: clock)
        written = Metrics(tmp_path, first)
        for step in range(first + 1, first + 4):
            written.write(step, {'loss': 1.0})
        written.close()
    old, new = sorted(tmp_path.glob('events*'))  # the order in which TensorBoard reads them
    assert [event.step for event in events(old)[2:]] == [1, 2, 3]
    version, start, *scalars = events(new)
    assert version.file_version == 'brain.Event:2' and start.step == 3
    assert start.session_log.status == start.session_log.START
    assert [event.step for event in scalars] == [3, 4, 5]


def test_a_deleted_file_is_written_anew(tmp_path):
    file = AppendFile(tmp_path / 'a', b'head ')
    for text in (b'1 ', b'2 '):
        file.add(text)
        file.write()
    (tmp_path / 'a').unlink()
    file.add(b'3 ')
    file.write()
    file.close()
    assert (tmp_path / 'a').read_bytes() == b'head 3 '
