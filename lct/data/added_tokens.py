"""More tokens for a byte-level BPE whose model is already trained: the ids that it has keep their meaning."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from lct import files


def add_tokens(path: str | os.PathLike, strings: Sequence[str]) -> dict[str, int]:
    """Make each of strings one token of the tokenizer.json at path, by merges that come after all others.

    Text in which no such merge applies is encoded as before. The parts that a merge needs become tokens too.

    Returns:
      {token in the alphabet of the file: its id} of all tokens. The ids of new ones are the highest.

    Raises:
      ValueError: if a string stays in several tokens because the pattern cuts it.
    """
    from tokenizers import Tokenizer as Library
    path = Path(path)
    fields = json.loads(path.read_text(encoding='utf-8'))
    vocabulary, merges = fields['model']['vocab'], fields['model']['merges']
    for string in strings:
        tokens = _encode(Library, fields, string)
        while len(tokens) > 1:  # from the end, so that what is in front of a word is merged last
            merges.append(tokens[-2:])
            tokens[-2:] = [''.join(tokens[-2:])]
            vocabulary.setdefault(tokens[-1], len(vocabulary))
    for string in strings:
        if len(_encode(Library, fields, string)) > 1:
            raise ValueError(f'{string!r} cannot become one token, since the pattern of {path} cuts it or '
                             'merges of other strings come first; leave it out')
    files.write_atomically(path, json.dumps(fields, ensure_ascii=False, indent=2))
    return vocabulary


def _encode(library, fields, string):
    """[token] of string."""
    return library.from_str(json.dumps(fields)).encode(string, add_special_tokens=False).tokens
