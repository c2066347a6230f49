"""Mail and notebooks are read as people read them."""

import json

import pytest

from lct.data.corpus import documents

MESSAGE = '''From: =?utf-8?q?J=C3=B6rg?= <joerg@example.org>
To: a@example.org
Subject: =?iso-8859-1?q?Gr=FC=DFe?=
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Sch=F6ne Gr=FC=DFe,=20
=46rom here
--b
Content-Type: application/pdf; name=x.pdf
Content-Disposition: attachment; filename=x.pdf
Content-Transfer-Encoding: base64

JVBERg==
--b--
'''
READ = ('From: Jörg <joerg@example.org>\nTo: a@example.org\nSubject: Grüße\nAttachment: x.pdf\n\n'
        'Schöne Grüße, \nFrom here\n')
HTML = ('Subject: x\nContent-Type: text/html; charset=utf-8\n\n<style>p{}</style><p>One &amp; two</p>'
        '<p>3</p>\n')


def test_a_message_is_decoded(tmp_path):
    (tmp_path / 'a.eml').write_text(MESSAGE)
    (tmp_path / 'b.eml').write_text(HTML)
    (tmp_path / 'c.eml').write_bytes(b'Subject: y\nContent-Type: text/plain; charset=klingon\n\nfine \xff\n')
    found = documents.read(tmp_path)
    assert [one.name for one in found] == ['a.eml', 'b.eml', 'c.eml']
    assert found[0].text == READ
    assert found[1].text == 'Subject: x\n\nOne & two\n3\n'
    assert found[2].text.startswith('Subject: y\n\nfine ')


def test_every_message_of_an_mbox_is_a_document(tmp_path):
    second = 'Subject: 2\n\nbody\n>From the beginning\n'
    (tmp_path / 'inbox.mbox').write_text(f'From x Mon Jan 1\n{MESSAGE}\nFrom y Tue Jan 2\n{second}')
    found = documents.read(tmp_path)
    assert [one.name for one in found] == ['inbox.mbox:1', 'inbox.mbox:2']
    assert found[0].text == READ and found[1].text == 'Subject: 2\n\nbody\nFrom the beginning\n'


def test_a_notebook_is_its_cells(tmp_path):
    cells = [{'cell_type': 'markdown', 'source': ['# Title\n', 'text']},
             {'cell_type': 'code', 'source': 'x = 1\n', 'outputs': [{'text': 'never'}]}]
    (tmp_path / 'n.ipynb').write_text(json.dumps({'cells': cells}))
    assert documents.read(tmp_path)[0].text == '# %% [markdown]\n# Title\ntext\n\n# %%\nx = 1\n'
    (tmp_path / 'n.ipynb').write_text('{"cells": 3}')
    with pytest.raises(ValueError, match=r'n.ipynb is not a Jupyter notebook .*; correct or remove it'):
        documents.read(tmp_path)


def test_html_that_cannot_be_parsed_stays_as_it_is(tmp_path):
    (tmp_path / 'a.eml').write_bytes(b'Content-Type: text/html\n\na <![>b')
    assert documents.read(tmp_path)[0].text == '\na <![>b\n'
