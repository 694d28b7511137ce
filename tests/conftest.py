"""Fixtures shared by the tests: small random models of every supported kind, and a browser."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports transformers

import pytest

if TYPE_CHECKING:  # tests of pages need no torch, nor does the process that starts the others
    import torch

    from sparse_signals.core.model import Model
    from sparse_signals.core.prompts import Batch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [  # works as root in a container, and asks no host for anything by itself
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """HF directories, without tokenizer, of the random models below."""
    from random_models import NEOX, ROTARY, SIZES, save_random_model

    root = tmp_path_factory.mktemp("models")
    return {
        "gpt2": save_random_model(root / "tiny-gpt2", "gpt2", **SIZES),
        "llama": save_random_model(root / "tiny-llama", "llama", **ROTARY),
        "qwen2": save_random_model(root / "tiny-qwen2", "qwen2", **ROTARY),
        "qwen3": save_random_model(root / "tiny-qwen3", "qwen3", **ROTARY, head_dim=8),
        "gpt_neox": save_random_model(root / "tiny-gpt_neox", "gpt_neox", **NEOX),
    }


def float64(directory: Path) -> "Model":
    import torch

    from sparse_signals.core.model import load_model

    return load_model(directory, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_directories: dict[str, Path]) -> "Model":
    """Learned positions, LayerNorm, biases: 3 layers of 4 heads of 8."""
    return float64(tiny_directories["gpt2"])


@pytest.fixture(scope="session")
def tiny_llama(tiny_directories: dict[str, Path]) -> "Model":
    """Rotary positions, RMSNorm, grouped keys (4 query heads, 2 key heads), no biases."""
    return float64(tiny_directories["llama"])


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_directories: dict[str, Path]) -> "Model":
    """As tiny_llama, with query and key biases."""
    return float64(tiny_directories["qwen2"])


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_directories: dict[str, Path]) -> "Model":
    """As tiny_llama, with queries and keys that are normalised inside heads."""
    return float64(tiny_directories["qwen3"])


@pytest.fixture(scope="session")
def tiny_gpt_neox(tiny_directories: dict[str, Path]) -> "Model":
    """Parallel blocks, LayerNorm, biases, and rotary positions that turn half of each head."""
    return float64(tiny_directories["gpt_neox"])


@pytest.fixture(scope="session")
def tokens() -> "torch.Tensor":
    """Eight prompts of up to twelve random tokens, padded on the right."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 50, (8, 12), generator=generator)


@pytest.fixture(scope="session")
def mask(tokens: "torch.Tensor") -> "torch.Tensor":
    """Which of `tokens` are not padding: lengths 5 to 12."""
    import torch

    return torch.arange(12) < torch.arange(5, 13)[:, None]


@pytest.fixture(scope="session")
def batch(tokens: "torch.Tensor", mask: "torch.Tensor") -> "Batch":
    """`tokens` as prompts, without text, roles or names."""
    from batches import plain_batch

    return plain_batch(tokens, mask)


@pytest.fixture(scope="session")
def browser():
    """A Chromium without a window. Skips, with the reason, where there is none."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("no Chromium here: no page was tested (sudo apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core, which checks pages for accessibility."""
    script = Path(__file__).parents[1] / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        pytest.skip("accessibility was not tested: make book fetches axe-core with npm")
    return script.read_text(encoding="utf-8")
