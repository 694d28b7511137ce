"""What `sparse-signals fetch` does: put weights where every later load finds them."""

import os
import time
from argparse import Namespace

from sparse_signals.app.errors import UsageError
from sparse_signals.core.checkpoints import ModelError, find_checkpoint
from sparse_signals.core.names import HUB_MODELS
from sparse_signals.core.smollm2 import fetch_smollm2


def execute_fetch(options: Namespace, started: float) -> None:
    """Fetch a model and say where it is; UsageError, in one line, when that cannot be done."""
    name = options.name
    try:
        if name in HUB_MODELS:
            directory = find_checkpoint(name)
        else:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
            directory = fetch_smollm2(lambda line: print(line, flush=True))
    except ModelError as error:
        raise UsageError(str(error)) from error
    size = sum(path.stat().st_size for path in directory.iterdir())
    seconds = time.perf_counter() - started
    print(f"{name} is in {directory}: {size / 1e6:.0f} MB ({seconds:.0f} s)")
