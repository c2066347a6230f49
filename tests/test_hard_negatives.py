"""Hard negatives between the chunks of a document."""

import itertools
import json

import interleave
import pytest

from lct.data.corpus import hard_negatives
from lct.data.corpus.documents import Document

TOPICS = {'bees': 'hive honey queen swarm nectar pollen', 'ships': 'mast sail anchor harbour keel rudder',
          'bread': 'flour yeast dough oven crust knead'}


def documents():
    """Four documents on each topic, whose lines name their document."""
    return [Document(f'{topic}{i}', ''.join(f'{words} line {line} of {topic}{i}\n' for line in range(6)))
            for topic, words in TOPICS.items() for i in range(4)]


CHUNKS = hard_negatives.Chunks(documents(), 120)


def test_chunks_end_at_lines_and_are_the_text():
    text = documents()[0].text + 'x' * 300
    parts = hard_negatives.split(text, 120)
    assert ''.join(parts) == text and max(map(len, parts)) <= 120
    assert all(part.endswith('\n') for part in parts[:3]) and len(parts) == 6


def test_the_chunks_most_alike_are_of_the_same_topic_and_of_other_documents():
    for number, chunk in enumerate(CHUNKS.all):
        found = [CHUNKS.all[one] for one in CHUNKS.like(number, 6, set())]
        assert {one.document // 4 for one in found} == {chunk.document // 4}
        assert chunk.document not in {one.document for one in found}
    first = CHUNKS.like(0, 3, set())
    assert not set(first) & set(CHUNKS.like(0, 3, set(first)))


def test_documents_keep_their_order_and_have_the_length_and_no_negative_twice():
    for found in itertools.islice(hard_negatives.interleave(CHUNKS, 1000), 24):
        source = found[0].document
        own = [chunk for chunk in found if chunk.document == source]
        assert ''.join(chunk.text for chunk in own) == documents()[source].text
        others = [chunk.text for chunk in found if chunk.document != source]
        assert len(set(others)) == len(others)
        assert 880 <= sum(len(chunk.text) for chunk in found) <= 1120
        between = [len(list(group)) for is_own, group in itertools.groupby(
            chunk.document == source for chunk in found) if not is_own]
        assert len(between) == len(own) and max(between) - min(between) <= 2
    sources = [found[0].document for found in itertools.islice(hard_negatives.interleave(CHUNKS, 1000), 12)]
    assert sorted(sources) == list(range(12))


def test_nothing_stands_between_the_chunks_of_long_documents():
    with pytest.raises(ValueError, match='none of the 12 documents is shorter than 100 characters'):
        next(hard_negatives.interleave(CHUNKS, 100))


def test_the_script_writes_a_corpus(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / 'short', tmp_path / 'long.jsonl'
    folder.mkdir()
    for document in documents():
        (folder / f'{document.name}.txt').write_text(document.text)
    monkeypatch.setattr('sys.argv', ['interleave.py', '--corpus', str(folder), '--output', str(out),
                                     '--length', '256', '--chunk', '120', '--documents', '5'])
    interleave.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 5 and all(900 <= len(line['text']) <= 1150 for line in lines)
    assert 'are their own' in capsys.readouterr().out
