"""The text of tokens as they arrive: complete characters, up to where a stop string begins."""

from collections.abc import Callable, Sequence

INCOMPLETE = '\N{REPLACEMENT CHARACTER}'  # in place of a character whose last bytes have not arrived


class Detokenizer:
    """push(token) -> text that is certain by now; finish() -> the rest, when no more tokens arrive.

    decode: token ids -> text. stops: strings that end the text and are not part of it; they may begin and end
    within tokens. stopped: whether one of them has arrived. text: everything that was returned so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        if not all(stops):
            raise ValueError('a stop string is empty, which would stop every text before its first token; '
                             'leave it out')
        self._decode, self._stops = decode, tuple(stops)
        self.text, self.stopped = '', False
        self._withheld = ''  # may be the beginning of a stop string
        # The last tokens that were decoded, and new tokens after them. A decoder may treat the first token of
        # a text in its own way, so new tokens are decoded after decoded ones.
        self._decoded, self._new = [], []

    def push(self, token: int) -> str:
        self._new.append(int(token))
        text = self._new_text()
        if self.stopped or text.endswith(INCOMPLETE):
            return ''
        if not text and not self._decode(2 * self._new):
            self._new = []  # a special token, which is no context for the space of the next one
            return ''
        self._decoded, self._new = self._new, []
        return self._release(text)

    def finish(self) -> str:
        if self.stopped:
            return ''
        out = self._release(self._new_text())
        if not self.stopped:
            out, self.text, self._withheld = out + self._withheld, self.text + self._withheld, ''
        return out

    def _new_text(self) -> str:
        return self._decode(self._decoded + self._new)[len(self._decode(self._decoded)):]

    def _release(self, new: str) -> str:
        """The text up to a stop string, or up to what may be the beginning of one."""
        text = self._withheld + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        partial = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - max(partial, default=0)
        out, self._withheld = text[:end], text[end:]
        self.text += out
        return out
