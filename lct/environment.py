"""Where and with what a program runs: git state, packages, flags, devices, host. For records, never compared;
what must be the same in all processes is in lct.installation."""

import hashlib
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lct import installation

# Variables that change what jax, XLA and the network do. No others: a record must not hold secrets.
VARIABLES = re.compile(r'(XLA|JAX|LIBTPU|TPU|NCCL|CUDA|LCT|SLURM_JOB|SLURM_NTASKS|OMP_NUM)')
SECRET = re.compile(r'KEY|TOKEN|SECRET|PASSW|CREDENTIAL|CERT', re.IGNORECASE)
MAX_DIFF = 100_000  # characters; of a longer diff its hash is kept


def describe(folder: Path) -> dict[str, Any]:
    """The environment of this process, for JSON. folder: in the checkout whose git state is described."""
    options = {name: str(getattr(jax.config, name)) for name in installation.OPTIONS}
    return {
        'python': platform.python_version(), 'packages': packages(), 'code_sha256': code_hash(),
        'git': git_state(folder), 'variables': variables(), 'jax_options': options, 'devices': devices(),
        'host': {'name': socket.gethostname(), 'system': platform.platform(), 'cores': os.cpu_count(),
                 'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')},
    }


def command() -> str:
    """The command line of this process."""
    return 'python ' + shlex.join(sys.argv)


def packages() -> dict[str, str]:
    """{name: version} of all installed packages."""
    found = {dist.metadata['Name']: dist.version for dist in metadata.distributions()}
    return {name: found[name] for name in sorted(filter(None, found), key=str.lower)}


def versions() -> dict[str, str]:
    """The versions that numbers depend on most, for results."""
    return {'python': platform.python_version(), 'jax': jax.__version__}


def code_hash() -> str:
    """sha256 over the names and contents of all modules of lct."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted(folder.rglob('*.py')):
        digest.update(path.relative_to(folder).as_posix().encode() + b'\0')
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def variables() -> dict[str, str]:
    """The environment variables of VARIABLES that are set, without secrets."""
    return {name: value for name, value in sorted(os.environ.items())
            if VARIABLES.match(name) and not SECRET.search(name)}


def devices() -> dict[str, Any]:
    """Kind, number and memory of the devices of all processes."""
    found = jax.local_devices()
    stats = found[0].memory_stats() or {}
    return {'platform': found[0].platform, 'kind': found[0].device_kind, 'count': jax.device_count(),
            'per_process': len(found), 'processes': jax.process_count(),
            'memory_bytes': stats.get('bytes_limit')}


def commit(folder: Path) -> str | None:
    """The commit of a checkout, with -dirty where files differ from it; None outside of a checkout."""
    return _git(folder, 'describe', '--always', '--dirty', '--abbrev=12')


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch, and what differs from the commit in the files that git tracks; None outside of a
    checkout."""
    head = _git(folder, 'rev-parse', 'HEAD')
    if head is None:
        return None
    diff = _git(folder, 'diff', 'HEAD', '--no-ext-diff') or ''
    state = {'commit': head, 'branch': _git(folder, 'rev-parse', '--abbrev-ref', 'HEAD'),
             'changed': (_git(folder, 'diff', 'HEAD', '--name-only') or '').splitlines()}
    if diff:
        state['diff_sha256'] = hashlib.sha256(diff.encode()).hexdigest()
        state['diff'] = diff if len(diff) <= MAX_DIFF else None
    return state


def _git(folder, *arguments):
    """What git prints, stripped; None where it prints nothing or cannot."""
    if not shutil.which('git'):
        return None
    try:
        done = subprocess.run(['git', *arguments], capture_output=True, check=False, timeout=60, cwd=folder)
    except (OSError, subprocess.TimeoutExpired):  # many files on a slow disk
        return None
    return done.stdout.decode(errors='replace').strip() or None
