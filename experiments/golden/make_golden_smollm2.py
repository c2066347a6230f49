"""Run SmolLM2 with transformers: greedy answers to three questions, the loss of a page, token ids.

Needs the 'oracle' extra (torch and transformers) and the folder whose path the first command prints:

    python experiments/checks/check_smollm2.py --convert
    python experiments/golden/make_golden_smollm2.py FOLDER        writes tests/golden/smollm2.json
"""

import argparse
import json
import pathlib

from lct.cli.main import needs, run_script

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden'
QUESTIONS = (
    'What is the capital of France, and what is it known for?',
    'Write a short story about an old lighthouse keeper and a storm.',
    'Explain in simple words why the sky is blue.',
)
NEW_TOKENS = 64
LINES = (
    '', 'Hello world!', "it's 12345.\n\n  def f(x):\n\treturn x", 'naïve 北京 🙂 \x00', 'Ⅷ ½ ١٢٣ x²',
    '  two  spaces \r\n', '<|im_start|>user <|im_end|>', "DON'T we'll I'd", 'snake_case_name=0x1F;',
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    args = parser.parse_args()
    with needs("'.[oracle]'"):
        import torch
        import transformers
        from oracle import open_model

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    model = open_model(args.folder)

    answers = []
    for question in QUESTIONS:
        chat = [{'role': 'user', 'content': question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)['input_ids']
        with torch.no_grad():
            # 64 tokens each, also past the end of the answer
            new = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                                 do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(ids):]
        answers.append({'question': question, 'text': text, 'prompt': ids, 'new': new.tolist(),
                        'answer': tokenizer.decode(new)})
    page = tokenizer((GOLDEN / 'page.txt').read_text(), add_special_tokens=False)['input_ids']
    with torch.no_grad():
        logits = model(torch.tensor([page]), use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(page[1:])).item()
    result = {
        'made_by': f'transformers {transformers.__version__}, torch {torch.__version__}, float32',
        'answers': answers, 'page': page, 'page_loss': loss,
        'lines': [{'text': line, 'ids': tokenizer._tokenizer.encode(line, add_special_tokens=False).ids}
                  for line in LINES],
    }
    path = GOLDEN / 'smollm2.json'
    rows = (f'{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}' for key, value in result.items())
    path.write_text('{' + ',\n'.join(rows) + '}\n')
    print(f'{path}: {len(page)} tokens of the page, loss {loss:.6f}; {path.stat().st_size} bytes')


if __name__ == '__main__':
    run_script(main)
