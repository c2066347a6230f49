"""The text of mail: headers that a reader wants, and the body, decoded."""

import email.policy
import html.parser
from collections.abc import Iterable, Iterator
from email.message import EmailMessage
from email.parser import BytesParser

HEADERS = ('From', 'To', 'Cc', 'Date', 'Subject')
LINE_TAGS = frozenset('br p div tr li h1 h2 h3 h4 h5 h6 blockquote'.split())
HIDDEN_TAGS = frozenset(('script', 'style', 'title'))


def message_text(content: bytes) -> str:
    """The text of one message (.eml). Attachments are named, not included."""
    message = BytesParser(policy=email.policy.default).parsebytes(content)
    lines = [f'{name}: {_one_line(message, name)}' for name in HEADERS if name in message]
    names = [part.get_filename() or part.get_content_type() for part in message.iter_attachments()]
    lines += [f'Attachment: {name}' for name in names] if message.is_multipart() else []
    return '\n'.join([*lines, '', _body(message).strip(), ''])


def messages(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The messages of an mbox: each begins with a line 'From ' at the start of the file or after an empty
    line; within a message such lines are written as '>From '."""
    message, after_empty = [], True
    for line in lines:
        if after_empty and line.startswith(b'From '):
            if message:
                yield b''.join(message)
            message, after_empty = [], False
            continue
        after_empty = not line.strip()
        message.append(line[1:] if line.lstrip(b'>').startswith(b'From ') and line.startswith(b'>') else line)
    if message:
        yield b''.join(message)


def _one_line(message: EmailMessage, name: str) -> str:
    try:
        return ' '.join(str(message[name]).split())
    except Exception:  # the parser of the standard library fails on some malformed headers
        return ''


def _body(message: EmailMessage) -> str:
    part = message.get_body(('plain', 'html'))
    if part is None:
        return ''
    try:
        text = part.get_content()
    except (LookupError, ValueError):  # a charset that Python does not know
        text = (part.get_payload(decode=True) or b'').decode('utf-8', 'replace')
    text = text.replace('\r\n', '\n')
    return _plain(text) if part.get_content_type() == 'text/html' else text


def _plain(source: str) -> str:
    """The text of HTML, a line for each paragraph; HTML that cannot be parsed stays as it is."""
    parser = _Text()
    try:
        parser.feed(source)
        parser.close()
    except AssertionError:  # of the standard library, for a malformed marked section
        return source
    lines = (' '.join(line.split()) for line in ''.join(parser.parts).split('\n'))
    return '\n'.join(line for line in lines if line)


class _Text(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self._hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in HIDDEN_TAGS
        self.parts.append('\n' * (tag in LINE_TAGS))

    def handle_endtag(self, tag):
        self._hidden -= tag in HIDDEN_TAGS and self._hidden > 0
        self.parts.append('\n' * (tag in LINE_TAGS))

    def handle_data(self, data):
        if not self._hidden:
            self.parts.append(data)
