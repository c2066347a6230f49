"""Chat templates: messages to the text that an instruct model was trained on, as Jinja in a sandbox.

The template comes with the model (chat_template.jinja or tokenizer_config.json), so it is somebody else's
program: it runs without access to Python, and whatever goes wrong in it is one ValueError. It may call what
transformers' apply_chat_template lets it call, so that a folder renders alike in both.
"""

import datetime
import json
import re
from pathlib import Path

import jinja2
from jinja2 import ext, nodes, sandbox, utils

TOKENS = ('bos_token', 'eos_token', 'unk_token', 'pad_token')
PRIVATE_USE = range(0xE000, 0xF900)


class ChatTemplate:
    """render(messages) -> text; encode(tokenizer, messages) -> ids.

    messages are dicts with role, content, and what else the template reads (tool_calls, ...), in plain JSON
    values.
    """

    def __init__(self, source, tokens=None, name='chat template'):
        """tokens: {'bos_token': its spelling, ...}; name: what errors call the template."""
        self.source, self.tokens, self.name = source, tokens or {}, name
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f'{name}, line {error.lineno}: {error.message}; correct the template') from None

    def render(self, messages, *, add_generation_prompt=False, tools=None, documents=None, now=None,
               **variables):
        """The text of messages, special tokens spelled in it, the opening of the answer at its end if
        add_generation_prompt.

        Args:
          tools, documents: as the template wants them.
          now: the datetime of strftime_now, for prompts that are the same tomorrow; default is the clock.
          variables: whatever else the template reads, such as date_string.
        """
        if not messages:
            raise ValueError(f'{self.name}: there are no messages; give at least one')
        values = {'messages': messages, 'tools': tools, 'documents': documents, **variables}
        values = _plain(values, self.name)
        now = now or datetime.datetime.now()
        try:
            return self._template.render(
                {'strftime_now': now.strftime, **self.tokens, **values,
                 'add_generation_prompt': add_generation_prompt})
        except jinja2.TemplateError as error:
            raise ValueError(f'{self.name} refuses these messages: {error}') from None
        except Exception as error:  # anything may happen in somebody else's program
            raise ValueError(
                f'{self.name} fails on these messages: {type(error).__name__}: {error}') from error

    def encode(self, tokenizer, messages, **options):
        """Token ids of render(messages, **options). Special tokens are those that the template writes: one
        that a message spells is plain text, so no message can end its own turn."""
        spellings = sorted(map(re.escape, tokenizer.special_tokens), key=len, reverse=True)
        pattern = re.compile('|'.join(spellings) or '(?!)')
        everything = json.dumps([messages, options], ensure_ascii=False, default=str) + self.source
        wedge = next(chr(x) for x in PRIVATE_USE if chr(x) not in everything)

        def defuse(value):
            if isinstance(value, str):
                return pattern.sub(lambda match: match[0][0] + wedge + match[0][1:], value)
            if isinstance(value, dict):
                return {key: defuse(x) for key, x in value.items()}
            return [defuse(x) for x in value] if isinstance(value, (list, tuple)) else value

        return tokenizer.encode_special(self.render(defuse(messages), **defuse(options)), drop=wedge)


def load(folder, name='default'):
    """The ChatTemplate of a Hugging Face folder; name chooses where a tokenizer_config.json has several."""
    folder = Path(folder)
    settings = _read_object(folder / 'tokenizer_config.json')
    tokens = {}
    for key in TOKENS:
        value = settings.get(key)
        value = value.get('content') if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[key] = value
    path = folder / 'chat_template.jinja'
    if path.is_file() and name == 'default':
        return ChatTemplate(path.read_text(encoding='utf-8'), tokens, str(path))
    for path, values in ((folder / 'chat_template.json', _read_object(folder / 'chat_template.json')),
                         (folder / 'tokenizer_config.json', settings)):
        found = values.get('chat_template')
        if isinstance(found, list):
            found = {one.get('name'): one.get('template') for one in found if isinstance(one, dict)}
        elif found is not None:
            found = {'default': found}
        if found and isinstance(found.get(name), str):
            return ChatTemplate(found[name], tokens, f'chat_template {name!r} of {path}')
        if found:
            raise ValueError(f'{path} has the chat templates {sorted(map(str, found))}, and none is a text '
                             f'named {name!r}')
    raise ValueError(f'{folder} has no chat template (chat_template.jinja, or chat_template in '
                     'tokenizer_config.json): it is a base model; take the template of its instruct version')


class _Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words; rendering ignores it."""

    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(['name:endgeneration'], drop_needle=True), lineno=line)


class _Namespace(utils.Namespace):
    """namespace() whose names do not begin with '_': Jinja itself looks such names up on objects."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name, value):
        if name.startswith('_'):
            raise jinja2.exceptions.SecurityError(f'namespace cannot hold {name!r}')
        super().__setitem__(name, value)


def _environment():
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation])
    environment.filters['tojson'] = _to_json
    environment.globals = {'range': sandbox.safe_range, 'dict': lambda *x, **y: dict(*x, **y),
                           'namespace': _Namespace, 'raise_exception': _raise}
    return environment


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message):
    raise jinja2.TemplateError(message)


def _plain(value, name):
    """value if it is made of plain JSON values: an object's methods would be the template's to call."""
    if isinstance(value, dict):
        return {_plain(key, name): _plain(x, name) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x, name) for x in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ValueError(f'{name}: {value!r} of type {type(value).__name__} is no plain JSON value; pass '
                     'messages of dicts, lists, strings and numbers')


def _read_object(path):
    """The JSON object of a file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON ({error}); fetch it again') from None
    if not isinstance(values, dict):
        raise ValueError(f'{path} must hold a JSON object')
    return values
