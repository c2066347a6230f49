"""The text of tokens as they come: whole characters, up to where a stop string begins."""

UNFINISHED = '\N{REPLACEMENT CHARACTER}'  # what a decoder makes of a character whose bytes have not all come


class Detokenizer:
    """push(token) -> the text that is certain by now; finish() -> what was held back, when no more tokens come.

    decode: token ids -> text. stops: strings that end the text and are no part of it, wherever in them tokens
    end. stopped: whether one of them has come; text: all that was given out.
    """

    def __init__(self, decode, stops=()):
        if not all(stops):
            raise ValueError('a stop string is empty, which would stop every text before its first token; leave it out')
        self._decode, self._stops = decode, tuple(stops)
        self.text, self.stopped = '', False
        self._held = ''  # may be the beginning of a stop string
        # Tokens whose text is known and those behind them: a decoder may treat the first of a text in its own way.
        self._told, self._new = [], []

    def push(self, token):
        self._new.append(int(token))
        text = self._new_text()
        if self.stopped or text.endswith(UNFINISHED):
            return ''
        self._told, self._new = self._new, []
        return self._give(text)

    def finish(self):
        if self.stopped:
            return ''
        out = self._give(self._new_text())
        if not self.stopped:
            out, self.text, self._held = out + self._held, self.text + self._held, ''
        return out

    def _new_text(self):
        return self._decode(self._told + self._new)[len(self._decode(self._told)):]

    def _give(self, new):
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - max(begun, default=0)
        out, self._held = text[:end], text[end:]
        self.text += out
        return out
