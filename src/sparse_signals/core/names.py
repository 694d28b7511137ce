"""The models that have a name, and which one is meant. Nothing heavy is imported here."""

import os

MODEL_NAMES = ("gpt2-ioi", "gpt2-small", "smollm2-135m")
DEFAULT_MODEL = "gpt2-ioi"
FETCHED = ("smollm2-135m", "gpt2-small")  # whose weights do not come with the package
HUB_MODELS = {"gpt2-small"}  # the only ones that may need the network


def chosen_model() -> str:
    """The model that is asked for: the environment variable MODEL, or the shipped one."""
    return os.environ.get("MODEL") or DEFAULT_MODEL
