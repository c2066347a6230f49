"""Memory per device: the prediction of lct.plan.buffers beside what compilers for GPUs and TPUs assign.

    python experiments/checks/check_plan_memory.py                  prints results/plan_memory.json
    python experiments/checks/check_plan_memory.py --compile cuda    compiles missing rows (extra 'aot-cuda')
    python experiments/checks/check_plan_memory.py --compile tpu     (extra 'aot-tpu'; minutes per row)

'compiled' is the memory of one device in the training step: arguments, temporaries, and outputs that do not
reuse an argument. (The compilers' own peak includes offloaded buffers on the host.) The constants of
buffers.py were fitted to the rows 'calibration' and 'adapters'. The rows 'held out' were added later, and
some constants corrected after them; two terms, of exchanges and double rings and of passes on one device,
after the rows 'planned'. Nothing was changed after the rows 'refused' and the last of 'planned'.
"""

import argparse
import json
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from lct.cli.main import run_script
from lct.cli.paths import experiments_folder
from lct.cli.plan_models import MODELS
from lct.files import write_atomically
from lct.models.llama import Memory
from lct.models.lora import Adapter
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention
from lct.plan import compiled, hardware, hlo, targets
from lct.plan.cost import Step
from lct.plan.search import needed_by
from lct.plan.tables import policy
from lct.text import table

RESULTS = experiments_folder() / 'results' / 'plan_memory.json'
BF16, F32, MIXED = ('bfloat16', None), ('float32', None), ('float32', 'bfloat16')  # parameters, computation
HEADER = ('', 'target', 'model', 'mesh', 'rows x times', 'tokens', 'policy', 'dtype', 'predicted GiB',
          'compiled GiB',
          'ratio')
LORA = Adapter(frozen_dtype='bfloat16')
LORA8 = Adapter(frozen_dtype='int8')
LONGLORA = Adapter(frozen_dtype='bfloat16', also_train=('embed', 'attn_norm', 'mlp_norm', 'final_norm'))
# target, model, mesh, batch_size, accumulation, seq_len, remat, strategy, node_size, ffn_chunks, dtype; the
# kernel, if it is not xla; offload_state, if it is not none; query_passes, if there are several; and the
# adapter that is trained in place of all weights
CALIBRATION = (
    ('l40s:512', 'llama3-8b', (1, 1, 512, 1), 1, 1, 2**20, 'full', 'ring', 1, 1, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'full', 'ring', 1, 1, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'offload', 'ring', 1, 8, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'attention', 'ring', 1, 8, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'none', 'ring', 1, 1, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'double_ring', 8, 8, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'all_gather_ring', 8, 8, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'all_to_all_ring', 8, 8, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'all_gather', 1, 8, BF16),
    ('h100:512', 'llama3-70b', (1, 1, 512, 1), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('h100:512', 'llama3-70b', (1, 1, 64, 8), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('h100:512', 'llama3-70b', (1, 1, 512, 1), 1, 1, 2**20, 'offload', 'ring', 1, 8, F32),
    ('h100:512', 'llama3-70b', (1, 8, 64, 1), 8, 2, 2**19, 'offload', 'ring', 1, 8, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 4, 2**16, 'full', 'ring', 1, 1, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**16, 'attention', 'ring', 1, 1, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**16, 'dots', 'ring', 1, 1, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**16, 'none', 'ring', 1, 1, BF16),
    ('h100:8', 'llama3-8b', (1, 1, 4, 2), 1, 1, 2**17, 'full', 'ring', 1, 4, BF16),
    ('h100:8', 'llama3-8b', (2, 1, 2, 2), 2, 1, 2**16, 'full', 'ring', 1, 4, BF16),
    ('h100:8', 'llama3.2-1b', (1, 1, 8, 1), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('h100:8', 'llama3.2-3b', (1, 1, 8, 1), 1, 1, 2**19, 'offload', 'all_to_all', 1, 8, BF16),
    ('h100:32', 'llama3-70b', (1, 1, 8, 4), 1, 1, 2**17, 'full', 'ring', 1, 4, BF16),
    ('l40s:32', 'llama3-8b', (1, 1, 32, 1), 1, 16, 2**18, 'full', 'ring', 1, 8, BF16),
    ('l40s:512', 'llama3-8b', (1, 1, 512, 1), 2, 2, 2**22, 'offload', 'ring', 1, 8, BF16),
    ('a100:8', 'llama3-8b', (1, 8, 1, 1), 8, 1, 2**15, 'full', 'ring', 1, 4, F32),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 32, 2**16, 'full', 'ring', 1, 1, MIXED),
    ('l40s:32', 'llama3-8b', (1, 1, 32, 1), 1, 16, 2**18, 'full', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 16, 1, 2**19, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'offload', 'ring', 1, 8, MIXED),
    ('v5p:4x4x4', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('v5p:8x8x8', 'llama3-8b', (1, 1, 512, 1), 1, 1, 2**20, 'full', 'ring', 1, 1, BF16),
    ('v5p:4x4x4', 'llama3-8b', (1, 4, 16, 1), 4, 1, 2**18, 'offload', 'ring', 1, 8, BF16),
    ('v5e:4x4', 'llama3.2-1b', (1, 1, 16, 1), 1, 1, 2**17, 'full', 'ring', 1, 1, BF16),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload', 'ring', 1, 8, MIXED),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'attention_output', 'ring', 1, 8, MIXED),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload_attention_output', 'ring', 1, 8, MIXED),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto'),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 5 * 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**17, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**19, 'full', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**19, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto'),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 5 * 2**19, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto'),
    ('h200:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**21, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h100:8', 'llama3-8b', (1, 2, 4, 1), 2, 1, 2**20, 'offload_attention_output', 'ring', 1, 2, MIXED,
     'auto'),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 5 * 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto', 'none',
     8),
    ('h200:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto', 'none', 8),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto', 'none', 8),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**23, 'offload', 'ring', 1, 64, MIXED, 'auto', 'none', 16),
)
ADAPTERS = (
    ('h100:1', 'llama3-8b', (1, 1, 1, 1), 1, 1, 2**15, 'full', 'ring', 1, 8, MIXED, 'auto', LORA),
    ('h100:1', 'llama3-8b', (1, 1, 1, 1), 1, 1, 2**15, 'full', 'ring', 1, 8, MIXED, 'auto', LORA8),
    ('h100:1', 'llama3-8b', (1, 1, 1, 1), 1, 1, 2**15, 'full', 'ring', 1, 8, MIXED, 'auto', LONGLORA),
    ('rtx4090:1', 'llama3-8b', (1, 1, 1, 1), 1, 1, 2**13, 'full', 'ring', 1, 8, MIXED, 'auto', LORA8),
    ('rtx4090:1', 'llama3.2-3b', (1, 1, 1, 1), 1, 1, 2**15, 'offload', 'ring', 1, 8, MIXED, 'auto', LORA),
    ('rtx4090:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**17, 'offload', 'ring', 1, 16, MIXED, 'auto', LORA8),
    ('h100:8', 'llama3-70b', (1, 1, 8, 1), 1, 1, 2**17, 'offload', 'ring', 1, 16, MIXED, 'auto', LORA8),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto', LORA),
    ('h200:1', 'llama3-8b', (1, 1, 1, 1), 1, 1, 2**19, 'offload', 'ring', 1, 16, MIXED, 'auto', LORA8),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 4, 2**17, 'full', 'ring', 1, 8, MIXED, 'xla', LORA8),
    ('a100:8', 'llama3-70b', (1, 2, 4, 1), 2, 1, 2**15, 'full', 'all_to_all', 1, 4, MIXED, 'auto', LORA8),
)
HELD_OUT = (
    ('h100:512', 'llama3.1-405b', (1, 1, 512, 1), 1, 1, 2**18, 'full', 'ring', 1, 8, BF16),
    ('h200:64', 'llama3-70b', (1, 2, 16, 2), 2, 1, 2**18, 'offload', 'double_ring', 4, 8, BF16),
    ('a100:64', 'llama3.2-3b', (1, 4, 16, 1), 8, 1, 2**17, 'attention', 'ring', 1, 4, BF16),
    ('l40s:64', 'llama3.2-1b', (2, 4, 8, 1), 16, 2, 2**16, 'none', 'ring', 1, 1, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'attention', 'all_to_all_ring', 8, 2, BF16),
    ('h100:512', 'llama3-70b', (1, 4, 128, 1), 4, 1, 2**20, 'attention', 'double_ring', 8, 1, BF16),
    ('l40s:512', 'llama3-8b', (1, 1, 512, 1), 2, 2, 2**22, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-70b', (1, 64, 8, 1), 64, 1, 2**16, 'offload', 'ring', 1, 4, MIXED),
    ('l40s:512', 'llama3-70b', (1, 16, 32, 1), 16, 1, 2**18, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-70b', (1, 8, 64, 1), 8, 2, 2**19, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:128', 'llama3-70b', (1, 1, 128, 1), 1, 4, 2**20, 'offload', 'ring', 1, 8, MIXED),
    ('v6e:4x4', 'llama3-8b', (1, 1, 16, 1), 1, 1, 2**18, 'full', 'ring', 1, 8, BF16),
    ('v5p:8x8x8', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'offload', 'ring', 1, 8, BF16),
    ('v5p:4x4x4', 'llama3-8b', (1, 1, 16, 4), 1, 1, 2**19, 'full', 'ring', 1, 8, BF16),
    ('h200:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'attention_output', 'ring', 1, 16, MIXED, 'auto'),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'full', 'ring', 1, 16, MIXED, 'auto'),
    ('h100:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**19, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**19, 'attention', 'ring', 1, 8, MIXED, 'auto'),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**22, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto'),
    ('h100:32', 'llama3-8b', (1, 1, 32, 1), 1, 1, 24 * 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:64', 'llama3-70b', (1, 1, 64, 1), 1, 1, 8 * 2**20, 'offload_attention_output', 'ring', 1, 16,
     MIXED, 'auto'),
    ('h200:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 8 * 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h100:1', 'llama3-8b', (1, 1, 1, 1), 1, 1, 2**19, 'offload', 'ring', 1, 16, MIXED, 'auto', 'all'),
    ('h200:1', 'llama3-8b', (1, 1, 1, 1), 1, 1, 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto', 'all'),
    ('h100:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**20, 'offload', 'ring', 1, 16, MIXED, 'auto', 'moments'),
    ('h100:8', 'qwen2.5-7b', (1, 1, 4, 2), 1, 1, 2**18, 'full', 'ring', 1, 16, MIXED, 'auto'),
    ('h100:8', 'mistral-7b-v0.3', (1, 1, 8, 1), 1, 1, 2**18, 'attention_output', 'double_ring', 4, 8, MIXED,
     'auto'),
    ('h100:8', 'qwen3-8b', (1, 1, 8, 1), 1, 1, 2**18, 'full', 'all_to_all', 1, 8, MIXED, 'auto'),
    ('l40s:8', 'phi3-mini-4k', (1, 1, 8, 1), 1, 1, 2**16, 'full', 'ring', 1, 4, MIXED, 'xla'),
    ('l40s:8', 'smollm3-3b', (1, 1, 8, 1), 1, 1, 2**17, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto'),
    ('a100:8', 'qwen2.5-14b', (1, 1, 8, 1), 1, 1, 2**18, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h200:1', 'llama3.2-3b', (1, 1, 1, 1), 1, 1, 2**19, 'offload', 'ring', 1, 16, MIXED, 'auto'),
    ('h100:16', 'llama3-8b', (1, 1, 16, 1), 1, 1, 2**23, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto'),
)
# The last stages that plan.py chooses for these models, contexts and devices.
PLANNED = (
    ('h100:8', 'llama3-8b', (1, 2, 4, 1), 2, 2, 2**20, 'offload_attention_output', 'ring', 1, 2, MIXED,
     'auto'),
    ('h200:1', 'llama3-8b', (1, 1, 1, 1), 2, 2, 2**20, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto', 'all', 4),
    ('h100:1', 'llama3-8b', (1, 1, 1, 1), 2, 4, 2**19, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto', 'all', 4),
    ('h200:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 3 * 2**20, 'offload_attention_output', 'ring', 1, 16, MIXED,
     'auto', 'none', 4),
    ('h100:32', 'llama3-8b', (1, 1, 32, 1), 1, 1, 24 * 2**20, 'offload', 'double_ring', 8, 4, MIXED, 'auto'),
    ('h100:32', 'llama3-8b', (1, 1, 32, 1), 1, 1, 24 * 2**20, 'offload', 'all_to_all_ring', 8, 4, MIXED,
     'auto'),
    ('h100:32', 'llama3-8b', (1, 1, 32, 1), 1, 1, 24 * 2**20, 'offload', 'double_ring', 8, 16, MIXED, 'auto',
     'none', 4),
)
# Of twelve jobs, a step that the planner refuses near the limit, for a few percent more than is usable.
REFUSED = (
    ('l40s:8', 'llama3-8b', (1, 1, 1, 8), 1, 1, 2**17, 'full', 'ring', 1, 64, MIXED, 'auto', 'moments', 16),
    ('h100:8', 'llama3-8b', (1, 1, 4, 2), 1, 1, 2**20, 'full', 'all_gather', 1, 64, MIXED, 'auto', 'all', 16),
    ('h100:32', 'llama3-70b', (2, 1, 2, 8), 4, 1, 2**17, 'offload_attention_output', 'ring', 1, 64, MIXED,
     'auto', 'none', 16),
    ('h200:64', 'llama3-70b', (1, 1, 16, 4), 1, 1, 2**20, 'attention', 'ring', 1, 16, MIXED, 'auto', 'all'),
    ('h200:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**21, 'full', 'ring', 1, 64, MIXED, 'auto', 'all', 16),
    ('h100:1', 'llama3.2-3b', (1, 1, 1, 1), 1, 1, 2**18, 'attention_output', 'ring', 1, 64, MIXED, 'auto',
     'all', 16),
    ('a100:8', 'qwen2.5-14b', (1, 2, 2, 2), 2, 4, 2**17, 'attention', 'ring', 1, 16, MIXED, 'auto', 'all'),
    ('l40s:4', 'mistral-7b-v0.3', (1, 1, 2, 2), 2, 2, 2**16, 'attention', 'all_gather', 1, 16, MIXED,
     'auto', 'all'),
    ('a100:2', 'llama3-8b', (1, 1, 1, 2), 1, 2, 2**15, 'offload', 'ring', 1, 64, MIXED, 'auto', 'none', 16),
    ('rtx4090:1', 'llama3.2-1b', (1, 1, 1, 1), 1, 1, 2**16, 'full', 'ring', 1, 64, MIXED, 'auto', 'none', 16),
    ('h200:4', 'llama3-8b', (1, 1, 2, 2), 1, 1, 2**19, 'attention_output', 'ring', 1, 64, MIXED, 'auto',
     'none', 16),
    ('h100:4', 'qwen3-8b', (2, 1, 2, 1), 2, 1, 2**18, 'full', 'all_gather', 1, 64, MIXED, 'auto',
     'moments', 16),
)
GROUPS = {'calibration': CALIBRATION, 'adapters': ADAPTERS, 'held out': HELD_OUT, 'planned': PLANNED,
          'refused': REFUSED}
POINTS = CALIBRATION + ADAPTERS + HELD_OUT + PLANNED + REFUSED


def step_of(point):
    """The Step of a point."""
    _, _, mesh, batch, accumulation, seq_len, remat, strategy, node_size, ffn_chunks, dtype, *more = point
    more = [one for one in more if not isinstance(one, Adapter)]
    kernel, offload_state, passes = [*more, *('xla', 'none', 1)[len(more):]]
    attention = Attention(strategy, node_size, Chunks(512, 512), kernel)
    memory = Memory(remat, attention, ffn_chunks, dtype=dtype[1], offload_state=offload_state,
                    query_passes=passes)
    return Step(MODELS[point[1]], mesh, seq_len, batch, accumulation, memory, dtype[0])


def adapter_of(point):
    """The Adapter of a point, or None."""
    return point[-1] if isinstance(point[-1], Adapter) else None


def key(point):
    return compiled.step_key(*point[:2], step_of(point), adapter_of(point))


def predict(point):
    """Bytes of a device."""
    return needed_by(step_of(point), hardware.find(point[0].split(':')[0]), adapter_of(point)).peak


def row_of(group, point, memory):
    """The cells of the table, and predicted over compiled bytes."""
    target, model, dtype, adapter = *point[:2], point[10], adapter_of(point)
    step, predicted = step_of(point), predict(point)
    size = hlo.device_bytes(memory)
    return (group, target, model, step.mesh, f'{step.batch_size} x {step.accumulation}', step.seq_len,
            policy(step),
            '/'.join(filter(None, dtype)) + (f', adapter on {adapter.frozen_dtype}' if adapter else ''),
            f'{predicted / 2**30:.2f}', f'{size / 2**30:.2f}',
            f'{predicted / size:.2f}'), predicted / size


def show(results):
    rows, ratios = zip(*(row_of(group, point, results[key(point)])
                         for group, points in GROUPS.items()
                         for point in points if key(point) in results))
    print(table(HEADER, rows, left=(0, 1, 2, 6, 7)))
    within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(f'\n{within} of {len(ratios)} within 10%; ratios {min(ratios):.2f} to {max(ratios):.2f}')


def read_results():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def compile_missing(platform):
    """Compile the points of a platform that have no result yet, and add each to the JSON."""
    from lct.cli.compile import step_memory

    for point in POINTS:
        target = targets.parse(point[0])
        if target.platform == platform and key(point) not in read_results():
            memory = step_memory(target, step_of(point), adapter_of(point))
            write_atomically(RESULTS, json.dumps({**read_results(), key(point): memory}, indent=1) + '\n')


def run():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--compile', choices=('cuda', 'tpu'))
    args = parser.parse_args()
    if args.compile:
        compile_missing(args.compile)
    show(read_results())


if __name__ == '__main__':
    run_script(run)
