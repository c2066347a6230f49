"""TensorBoard events as bytes: records of the format TFRecord, each with two checksums.

tensorboardX encodes them. Its own writer is not used: its thread ends at the first error, a full disk or a
clock that was set back, and then the training waits for it for ever.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

PREFIX = 'events.out.tfevents.'


def header(purge_step: int) -> bytes:
    """The records at the beginning of a file. TensorBoard then hides events of earlier files from purge_step
    on, which a run that is continued writes again."""
    now = time.time()
    return _record(Event(wall_time=now, step=purge_step, file_version='brain.Event:2')) + _record(
        Event(wall_time=now, step=purge_step, session_log=SessionLog(status=SessionLog.START)))


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """The record of the scalars of one step."""
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    return _record(Event(wall_time=time.time(), step=step, summary=summary))


def image(step: int, name: str, png: bytes) -> bytes:
    """The record of a picture."""
    width, height = struct.unpack('>II', png[16:24])  # of the header that every PNG begins with
    value = Summary.Value(tag=name, image=Summary.Image(
        encoded_image_string=png, width=width, height=height, colorspace=4))
    return _record(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))


def new_path(folder: str | Path) -> Path:
    """A new file after all others in the order in which TensorBoard reads them, even if the clock was set
    back: that of their names, which hold a time."""
    times = [path.name.removeprefix(PREFIX).partition('.')[0] for path in Path(folder).glob(PREFIX + '*')]
    newest = max((int(text) for text in times if text.isdigit()), default=0)
    return Path(folder) / f'{PREFIX}{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}'


def _record(event: Event) -> bytes:
    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    return b''.join((length, struct.pack('<I', masked_crc32c(length)), data,
                     struct.pack('<I', masked_crc32c(data))))
