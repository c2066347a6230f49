"""The texts in a tar archive, such as a shard of a WebDataset."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator

from lct.data.corpus.blocks import MAX_LINE, Block, Fields, File, Splitter, Text, field_of
from lct.data.corpus.compression import open_stream

TEXTS = ('.txt', '.text', '.md', '.rst', '.html')


def tar_blocks(file: File, fields: Fields, _split: Splitter) -> Iterator[Block]:
    """A document for each sample, which is the members whose names are equal up to the first dot: its first
    member that is text, or a .json with a text field. Other members, such as images, are passed over.

    Raises:
      ValueError: for an archive that is damaged, or in which no sample has a text.
    """
    found, others = 0, Counter()
    with open(file.path, 'rb') as raw, open_stream(raw, file.path) as stream:
        try:
            for text in _texts(file, stream, fields, others):
                found += 1
                yield Block(file, text, len(text.text), raw.tell(), found)
        except tarfile.TarError as error:
            raise ValueError(f'{file.path} is truncated or damaged ({error}); copy it again') from None
    if not found:
        held = ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in others.items())
        raise ValueError(f'{file.path} holds no member with text ({" ".join(TEXTS)}, or .json with a field '
                         f'{fields.text!r}), only {held or "nothing"}; leave it out, for example with '
                         "--exclude '*.tar'")


def _texts(file, stream, fields, others):
    """The Texts of an archive; others: a Counter of the suffixes of all other members."""
    with tarfile.open(fileobj=stream, mode='r|gz' if file.path.lower().endswith('.tgz') else 'r|') as archive:
        previous = None
        for member in archive:
            folder, name = os.path.split(member.name)
            stem, dot, suffix = name.partition('.')
            if not member.isfile() or not stem:
                continue
            text = None
            if (folder, stem) != previous:  # a sample gives one document
                text = _text_of(file, archive, member, dot + suffix.lower(), fields)
            if text is None:
                others[dot + suffix.lower()] += 1
            else:
                previous = folder, stem
                yield text


def _text_of(file, archive, member, suffix, fields):
    """The Text of a member, or None."""
    kind = '.' + suffix.rpartition('.')[2]
    if kind not in (*TEXTS, '.json'):
        return None
    name = f'{file.name}:{member.name}'
    if member.size > MAX_LINE:
        return Text(name, file.source, '', error=f'{file.path} member {member.name} has {member.size:,} '
                    f'bytes, and a text in an archive may have {MAX_LINE:,}; unpack it')
    content = archive.extractfile(member).read()
    try:
        if kind == '.json':
            record = json.loads(content)
            if not isinstance(record, dict) or fields.text.split('.')[0] not in record:
                return None
            source = file.source if fields.source is None else field_of(record, fields.source)
            return Text(name, source, field_of(record, fields.text))
        return Text(name, file.source, content.decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
        reason = 'is not UTF-8 text' if isinstance(error, UnicodeDecodeError) else error
        return Text(name, file.source, '', error=f'{file.path} member {member.name} {reason}; correct or '
                    'remove it')
