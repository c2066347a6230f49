"""A tokenizer for prompts that begin alike: what a long text has in common with the one before it is encoded
once."""

import functools
from collections.abc import Callable, Iterable

from lct.data.tokenizer import Tokenizer

SEGMENT = 2**14  # characters that are encoded together
CONTEXT = 64  # characters after a cut that decide whether it is exact; see Tokenizer.split_stream

Progress = Callable[[int, int], None]


class PrefixTokenizer(Tokenizer):
    """Gives the ids of another tokenizer, and remembers those of the last long text.

    progress: called as progress(done, total) with the characters of a long text while it is encoded.
    """

    def __init__(self, tokenizer: Tokenizer, progress: Progress | None = None):
        # Not Tokenizer.__init__: the fingerprint is that of the other tokenizer, whose ids these are.
        self.__dict__.update(vars(tokenizer))
        self.tokenizer, self.progress = tokenizer, progress
        self._plain, self._special = _Memory(tokenizer.encode, progress), {}

    def encode(self, text: str) -> list[int]:
        return self._plain.ids(text)

    def encode_special(self, text: str, drop: str = '') -> list[int]:
        if drop not in self._special:
            encode = functools.partial(self.tokenizer.encode_special, drop=drop)
            self._special = {drop: _Memory(encode, self.progress)}
        return self._special[drop].ids(text)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)


class _Memory(Tokenizer):
    """The last long text and its ids. encode: text -> ids, of which a Tokenizer finds exact cuts."""

    def __init__(self, encode: Callable[[str], list[int]], progress: Progress | None):
        self.encode, self.progress = encode, progress
        self._text, self._segments = '', []  # [(end of the segment in the text, its ids)]

    def ids(self, text: str) -> list[int]:
        if len(text) <= 2 * SEGMENT:
            return self.encode(text)
        same = common_length(self._text, text)
        segments = [segment for segment in self._segments if segment[0] + CONTEXT <= same]
        start = segments[-1][0] if segments else 0
        for segment, is_exact in self.split_stream([text[start:]], SEGMENT):
            if not is_exact:  # no place where this tokenizer could begin anew
                return self.encode(text)
            start += len(segment)
            segments.append((start, self.encode(segment)))
            if self.progress is not None:
                self.progress(start, len(text))
        self._text, self._segments = text, segments
        return [i for _, ids in segments for i in ids]


def common_length(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
