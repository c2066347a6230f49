"""Speed and memory of loading a Hugging Face folder, against reading and copying the same files.

    python experiments/bench/bench_load.py FOLDER [--output FILE]

FOLDER is empty or new, on a disk with 5 GB free. The script writes two models into it, a random Llama-3.2-1B
(2.5 GB) and a sparse Llama-3-8B (16 GB of holes), then measures, each in a process of its own:
  1. seconds and peak resident memory of loading the 1B onto a mesh of eight devices, interleaved with copying
     the same bytes from the same memory-mapped files, by one thread and by as many as the loader uses;
  2. the peak of each of four processes that hold a quarter of the 8B (jax.distributed, loading in turns).
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
ROUNDS = 5
QUARTER_MESH = (1, 4, 1, 2)  # a process holds both tensor shards of one fsdp rank


def write_folder(folder, config, random):
    """A bf16 folder of a config, with random numbers or with holes."""
    import numpy as np

    from lct import json_files
    from lct.weights import llama_hf, safetensors_files

    folder.mkdir(parents=True)
    json_files.write_json(folder / 'config.json', llama_hf.config_to_json(config))
    plan = safetensors_files.plan_shards(llama_hf.checkpoint_shapes(config), 'BF16', 5_000_000_000)
    rng = np.random.default_rng(0)
    weight_map = {}
    for file_name, names in plan:
        header, at = {}, 0
        for name in names:
            shape = llama_hf.checkpoint_shapes(config)[name]
            end = at + 2 * int(np.prod(shape))
            header[name] = {'dtype': 'BF16', 'shape': list(shape), 'data_offsets': [at, end]}
            at = end
        text = json.dumps(header).encode()
        with open(folder / file_name, 'wb') as file:
            file.write(len(text).to_bytes(8, 'little') + text)
            for done in range(0, at if random else 0, 2**26):
                bits = rng.integers(0, 2**16, min(2**25, (at - done) // 2), np.uint16)
                file.write((bits & 0xBFFF).tobytes())  # one bit of the exponent is never set: all are finite
            file.truncate(8 + len(text) + at)
        weight_map |= dict.fromkeys(names, file_name)
    if len(plan) > 1:
        json_files.write_json(folder / 'model.safetensors.index.json',
                              {'metadata': {}, 'weight_map': weight_map})


def peak():
    """Peak resident memory of this process in bytes, file pages included."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM'))


def report(**values):
    print(json.dumps(values), flush=True)


def eight_devices():
    """A mesh of eight virtual devices, set and used once."""
    import jax

    from lct.sharding import make_mesh

    jax.config.update('jax_num_cpu_devices', 8)
    jax.set_mesh(make_mesh((1, 2, 2, 2)))
    jax.block_until_ready(jax.numpy.zeros(8))


def load(folder):
    import jax

    from lct.weights import llama_hf

    return jax.tree.leaves(jax.block_until_ready(llama_hf.load(folder)[1]))


def copy(folder, threads):
    import numpy as np

    from lct.weights import safetensors_files

    tensors = safetensors_files.read_folder(folder).values()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda tensor: np.array(tensor.read()), tensors))


def peak_child(folder):
    eight_devices()
    params = load(folder)
    report(peak=peak(), bytes=sum(x.nbytes for x in params))


def speed_child(folder):
    """Seconds of loading, and of copying with one and with several threads, in turns.

    The first round warms the page cache. All run in one process, because a fresh one must first get its
    memory from the host, which takes longer than loading or copying.
    """
    eight_devices()
    threads = min(8, os.cpu_count())
    tasks = {'load': lambda: load(folder), 'copy, 1 thread': lambda: copy(folder, 1),
             f'copy, {threads} threads': lambda: copy(folder, threads)}
    seconds, computing = ({name: [] for name in tasks} for _ in range(2))
    for _ in range(ROUNDS + 1):
        for name, task in tasks.items():
            start, busy = time.perf_counter(), time.process_time()
            arrays = task()
            seconds[name].append(time.perf_counter() - start)
            computing[name].append(time.process_time() - busy)
            nbytes = sum(x.nbytes for x in arrays)
            del arrays
    report(bytes=nbytes, **{kind: {name: some[1:] for name, some in clock.items()}
                            for kind, clock in (('seconds', seconds), ('cpu_seconds', computing))})


def quarter_child(folder, address, index):
    import jax

    from lct.sharding import make_mesh
    from lct.weights import llama_hf

    jax.config.update('jax_num_cpu_devices', 2)
    jax.distributed.initialize(address, 4, int(index))
    with jax.set_mesh(make_mesh(QUARTER_MESH)):
        report(ready=True)
        sys.stdin.readline()
        start = time.perf_counter()
        config, params = llama_hf.load(folder)
        jax.block_until_ready(params)
        held = sum(nbytes for leaf in jax.tree.leaves(params) for nbytes in
                   {str(x.index): x.data.nbytes for x in leaf.addressable_shards}.values())
        report(seconds=time.perf_counter() - start, peak=peak(), bytes=held)
        del params
        sys.stdin.readline()


def spawn(*args):
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen([sys.executable, str(HERE), *map(str, args)], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def result(process):
    line = process.stdout.readline()
    if not line:
        raise RuntimeError('a measuring process failed; see its message above')
    return json.loads(line)


def measure_1b(folder):
    memory, speed = (result(spawn(folder, '--child', kind)) for kind in ('peak', 'speed'))
    seconds = speed['seconds']
    for name, some in seconds.items():
        rates = [speed['bytes'] / x / 1e9 for x in some]
        print(f'{name:16} {statistics.median(rates):.2f} GB/s (median of '
              f'{", ".join(f"{x:.2f}" for x in rates)}), '
              f'{statistics.median(speed["cpu_seconds"][name]):.2f} s of CPU')
    load, *copies = seconds.values()
    ratios = {name: statistics.median(y / x for x, y in zip(load, some))
              for name, some in zip(list(seconds)[1:], copies)}
    for name, ratio in ratios.items():
        print(f'speed of load / {name}: {ratio:.2f}, median of rounds (bar 0.70)')
    print(f'peak / parameters: {memory["peak"] / memory["bytes"]:.3f} (bar 1.25)')
    return {**speed, 'load_over': ratios, **memory}


def measure_quarters(folder):
    address = f'localhost:{20000 + os.getpid() % 10000}'
    processes = [spawn(folder, '--child', 'quarter', address, i) for i in range(4)]
    for process in processes:
        result(process)
    found = []
    for i, process in enumerate(processes):
        process.stdin.write('go\n')
        process.stdin.flush()
        found.append(result(process))
        print(f'process {i}: {found[-1]["bytes"] / 1e9:.2f} GB of parameters in '
              f'{found[-1]["seconds"]:.1f} s, peak / parameters '
              f'{found[-1]["peak"] / found[-1]["bytes"]:.3f} (bar 1.25)')
    for process in processes:  # all get the message before any is waited for: they leave together
        process.stdin.write('end\n')
        process.stdin.flush()
    for process in processes:
        process.wait(timeout=600)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('--output', type=pathlib.Path, help='write the figures there too')
    parser.add_argument('--child', nargs='+', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *more = args.child
        {'peak': peak_child, 'speed': speed_child, 'quarter': quarter_child}[kind](args.folder, *more)
        return
    from lct.models.llama_sizes import SIZES

    one, eight = args.folder / '1b', args.folder / '8b'
    figures = {}
    try:
        write_folder(one, SIZES['llama3.2-1b'], random=True)
        write_folder(eight, SIZES['llama3-8b'], random=False)
        figures = {'1b': measure_1b(one), '8b in quarters': measure_quarters(eight)}
    finally:
        for folder in (one, eight):
            shutil.rmtree(folder, ignore_errors=True)
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main()
