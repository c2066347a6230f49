"""Rows of Parquet and Arrow files, a batch at a time."""

import os
from collections.abc import Iterator

from lct.data.corpus.blocks import BLOCK, ROWS, Block, Fields, File, Splitter
from lct.data.corpus.compression import optional


def parquet_blocks(file: File, fields: Fields, _split: Splitter) -> Iterator[Block]:
    """The rows of a Parquet file.

    Raises:
      ValueError: for a file that is not complete, or lacks the column.
    """
    parquet = optional('pyarrow.parquet', file.path)
    try:
        table = parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=BLOCK)
    except ValueError as error:
        raise ValueError(f'{file.path} is not a complete Parquet file ({error}); copy it again') from None
    with table:
        columns = _columns(file, fields, table.schema_arrow.names)
        size, number = os.path.getsize(file.path), 0
        for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
            bytes_read = size * (number + len(batch)) // table.metadata.num_rows
            yield Block(file, _rows(batch), batch.nbytes, bytes_read, first=number)
            number += len(batch)


def arrow_blocks(file: File, fields: Fields, _split: Splitter) -> Iterator[Block]:
    """The rows of an Arrow file: of the stream format, as datasets.save_to_disk writes it, or of the file
    format (Feather).

    Raises:
      ValueError: for a file that is not complete, or lacks the column.
    """
    arrow, ipc = optional('pyarrow', file.path), optional('pyarrow.ipc', file.path)
    size, number = os.path.getsize(file.path), 0
    try:
        with arrow.memory_map(file.path) as source:
            is_file = source.read(6) == b'ARROW1'
            source.seek(0)
            reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
            columns = _columns(file, fields, reader.schema.names)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                batch = batch.select(list(dict.fromkeys(name.split('.')[0] for name in columns)))
                for start in range(0, len(batch), ROWS):
                    rows = batch.slice(start, ROWS)
                    end = start + len(rows) == len(batch) and not is_file
                    yield Block(file, _rows(rows), rows.nbytes, source.tell() if end else 0, first=number)
                    number += len(rows)
    except (arrow.ArrowInvalid, OSError) as error:
        if getattr(error, 'errno', None) is not None:
            raise
        raise ValueError(f'{file.path} is not a complete Arrow file ({error}); copy it again') from None
    if number:
        yield Block(file, [], 0, size, first=number)


def _columns(file, fields, names):
    columns = [field for field in fields if field is not None]
    missing = [field for field in columns if field.split('.')[0] not in names]
    if missing:
        raise ValueError(f'{file.path} has no column {missing[0]!r}, only {", ".join(names)}; name the '
                         'column that holds the text, or leave the file out')
    return columns


def _rows(batch) -> list[dict | None]:
    """The rows of a pyarrow.RecordBatch, None for a row that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]
