"""A reference reader of the comprehension tasks: from a prompt to its answer, and common knowledge."""

import re

from lct.eval.tasks import associations, generated_passages, nth_request

EDGE = re.compile(r'^(\w+) -> (\w+)$', re.M)
DEED = re.compile(r'(\w+ \w+ the (\w+))(?:;|\. In which order)')


def oracle(prompt: str) -> str:
    """The answer to a prompt of a comprehension task on generated material."""
    text, _, question = prompt.rpartition('Question: ')
    if prompt.startswith('A dialogue'):
        return _nth_text(prompt)
    if 'of these people' in question:
        return _associated_name(text, question)
    if 'breadth-first search' in question:
        start, steps = re.search(r'from (\w+) reach in exactly (\d+)', question).groups()
        return ', '.join(_walk(EDGE.findall(text), start, int(steps)))
    if 'have an edge' in question:
        node = re.search(r'leads to (\w+)', question)[1]
        return ', '.join(source for source, target in EDGE.findall(text) if target == node)
    if 'How many times' in question:
        person, place = re.search(r'did (\w+) go to the (\w+)', question).groups()
        return str(text.count(f'{person} went to the {place}.'))
    if 'In which order' in question:
        return ', '.join(thing for _, thing in sorted(
            DEED.findall(question), key=lambda deed: text.index(f'{deed[0]}.')))
    return _stated_fact(text, question)


def _nth_text(prompt):
    ordinal, kind, subject = re.search(
        rf'repeat the ({"|".join(nth_request.ORDINALS)}) ({"|".join(nth_request.KINDS)}) about the (.+?)\.',
        prompt.rpartition('User: ')[2]).groups()
    found = re.findall(rf'^User: Write a {kind} about the {subject}\.\nAssistant: (.+)$', prompt, re.M)
    return found[nth_request.ORDINALS.index(ordinal)]


def _associated_name(text, question):
    for kind in associations.KINDS:
        remarks = re.finditer(_pattern(kind.line, name=r'(?P<name>\w+)', clue='(?P<clue>.+)'), text)
        for hop, template in enumerate(filter(None, kind.questions), 1):
            match = re.search(_pattern(f'people {template}?', answer='(.+)'), question)
            if match and (clues := {row[0] for row in kind.rows if row[hop] == match[1]}):
                return next(remark['name'] for remark in remarks if remark['clue'] in clues)
    return ''


def _walk(edges, start, steps):
    targets = {}
    for source, target in edges:
        targets.setdefault(source, []).append(target)
    layer, reached = {start}, {start}
    for _ in range(steps):
        layer = {target for source in layer for target in targets.get(source, [])} - reached
        reached |= layer
    return sorted(layer)


def _stated_fact(text, question):
    for statement, pattern in [fact for facts in generated_passages.FACTS for fact in facts]:
        if building := re.match(_pattern(pattern, building=r'(\w+ \w+)'), question):
            value = r'([\w ]+)'
            return re.search(_pattern(statement.replace('{building}', building[1]), year=value, person=value),
                             text)[1]
    return ''


def _pattern(template, **groups):
    """A regular expression that matches what a template can become; groups: {field: expression}."""
    parts = re.split(r'\{(\w+)\}', template)
    return ''.join(groups[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
