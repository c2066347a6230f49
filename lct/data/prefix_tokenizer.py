"""A tokenizer for prompts that begin alike: what a long text has in common with the one before it is encoded
once."""

from collections.abc import Callable, Iterable

from lct.data.tokenizer import Tokenizer

SEGMENT = 2**14  # characters that are encoded together
CONTEXT = 64  # characters after a cut that decide whether it is exact; see Tokenizer.split_stream


class PrefixTokenizer(Tokenizer):
    """Gives the ids of another tokenizer, and remembers those of the last long text.

    progress: called as progress(done, total) with the characters of a long text while it is encoded.
    """

    def __init__(self, tokenizer: Tokenizer, progress: Callable[[int, int], None] | None = None):
        # Not Tokenizer.__init__: the fingerprint is that of the other tokenizer, whose ids these are.
        self.tokenizer, self.progress = tokenizer, progress
        self.vocab_size, self.bos_id, self.eos_id = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
        self.special_tokens, self.fingerprint = tokenizer.special_tokens, tokenizer.fingerprint
        self._text, self._segments = '', []  # [(end of the segment in the text, its ids)]

    def encode(self, text: str) -> list[int]:
        if len(text) <= 2 * SEGMENT:
            return self.tokenizer.encode(text)
        same = common_length(self._text, text)
        kept = [segment for segment in self._segments if segment[0] + CONTEXT <= same]
        start = kept[-1][0] if kept else 0
        segments, exact = list(kept), True
        for segment, is_exact in self.tokenizer.split_stream([text[start:]], SEGMENT):
            exact &= is_exact
            if not exact:  # no place where this tokenizer could begin anew
                self._text, self._segments = '', []
                return self.tokenizer.encode(text)
            start += len(segment)
            segments.append((start, self.tokenizer.encode(segment)))
            if self.progress is not None:
                self.progress(start, len(text))
        self._text, self._segments = text, segments
        return [i for _, ids in segments for i in ids]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)


def common_length(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
