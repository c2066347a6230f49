"""Many files as one text: each under a line with its path, in the order of the paths."""

from lct.data.corpus import documents

HEADER = '======== {name} ========\n'
NAMED = 5  # files that a refusal names


def read(sources):
    """[Document] of several folders, globs or files (documents.read), in the order of their names."""
    found = [document for source in sources for document in documents.read(source)]
    names = [document.name for document in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'{len(twice)} of {len(names)} files have a name that another has too, the first is '
                         f"{twice[0]!r}; give one folder or glob, such as 'repo/**/*.py', that names them apart")
    return sorted(found, key=lambda document: document.name)


def section(document):
    """A file of the text: its header, its lines, the last one ended."""
    return HEADER.format(name=document.name) + document.text + '\n' * (not document.text.endswith('\n'))


def text(found):
    return ''.join(map(section, found))


def check_fits(found, tokenizer, needed, length):
    """Refuse files that need `needed` tokens, with all that stands around them and the answer, where there are
    `length`; says by how much, and which are the largest."""
    if needed <= length:
        return
    sizes = sorted(zip(map(len, tokenizer.encode_batch([section(one) for one in found])),
                       [one.name for one in found], strict=True), reverse=True)
    largest = ', '.join(f'{name} ({size:,})' for size, name in sizes[:NAMED])
    raise ValueError(f'{len(found)} files with question and answer take {needed:,} tokens, {needed - length:,} more than '
                     f'the {length:,} that the model may read; the largest are {largest}: leave some out, allow fewer '
                     'new tokens, or use a model with a longer context')
