"""Small random models of every supported kind."""

from pathlib import Path

import torch

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROTARY = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
STRETCHED = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
ROPES = (
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", **STRETCHED},
    {"rope_type": "dynamic", **STRETCHED},
    {"rope_type": "yarn", "attention_factor": 1.7, **STRETCHED},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **STRETCHED},
)
NEOX = {**SIZES, "intermediate_size": 48, "rotary_pct": 0.5}


def save_random_model(directory: Path, kind: str, seed: int = 0, **config: object) -> Path:
    """Save a random model of one architecture, with norms and biases that are not trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    hf_config = AutoConfig.for_model(kind, **config)
    model = AutoModelForCausalLM.from_config(hf_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "attn" in name or "attention" in name:
                parameter.mul_(5)  # attention that is far from uniform
    model.save_pretrained(directory)
    return directory
