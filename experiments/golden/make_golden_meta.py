"""Write with PyTorch the small .pth files that tests/test_torch_files.py reads without it.

Needs the 'oracle' extra.

    python experiments/golden/make_golden_meta.py        writes tests/golden/torch_*.pth and .npz
"""

import argparse
import collections
import pathlib

import numpy as np

from lct.cli.main import needs, run_script

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden'


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with needs("'.[oracle]'"):
        import torch

    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 8, generator=draw)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.RMSNorm(3)).half()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    files = {
        # a plain dict: three dtypes, and views of one storage: rows, their transpose ('turned'), one row
        'torch_views': {
            'bf16': matrix.bfloat16(), 'f16': matrix[:2].half(), 'f32': matrix,
            'rows': matrix[2:5], 'turned': matrix[:, 1:4].T, 'row': matrix[3],
        },
        # a state_dict: an OrderedDict with attributes
        'torch_module': module.state_dict(),
        'torch_ordered': collections.OrderedDict(w=torch.arange(12.0).reshape(3, 4).bfloat16()),
    }
    for name, tensors in files.items():
        torch.save(tensors, GOLDEN / f'{name}.pth')
        arrays = {key: value.float().numpy() for key, value in tensors.items()}
        np.savez_compressed(GOLDEN / f'{name}.npz', **arrays)
        print(name, (GOLDEN / f'{name}.pth').stat().st_size, 'bytes by torch', torch.__version__)


if __name__ == '__main__':
    run_script(main)
