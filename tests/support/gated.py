"""Prompts for models whose edges are gated, and all their edges."""

import pandas as pd
import torch

from sparse_signals.core.model import head_name
from sparse_signals.core.prompts import Batch
from sparse_signals.interventions.faithfulness import switchable
from sparse_signals.tracing.contributions import SIDES

KINDS = ("tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox")
TOLERANCE = 1e-9
LENGTH = 9


def batch_of(prompts, seed=0, length=LENGTH):
    """Random words after the same first token; names stand at 2, 4 and 6 in every prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (prompts, length), generator=generator)
    tokens[:, 0] = 0
    at = {"IO": 2, "S1": 4, "S2": 6, "end": length - 1}
    roles = {role: torch.full((prompts,), pos) for role, pos in at.items()}
    table = pd.DataFrame({"text": [""] * prompts})
    labels = [["?"] * length] * prompts
    everywhere = torch.ones(prompts, length, dtype=torch.bool)
    return Batch(table, tokens, everywhere, labels, roles, tokens[:, 2], tokens[:, 4])


def every(board):
    return switchable(board).flatten().nonzero().flatten()


def edge_table(board, edges):
    """Edges, given as places in the flattened `switchable`, in words."""
    places = torch.unravel_index(edges.cpu(), switchable(board).shape)
    role, layer, head, side, component = (place.numpy() for place in places)
    columns = {
        "upstream": board.model.components["component"].to_numpy()[component],
        "downstream": head_name(pd.Series(layer), pd.Series(head)),
        "side": [SIDES[n] for n in side],
        "role": [board.roles[n] for n in role],
    }
    return pd.DataFrame({"edge": edges.cpu().numpy()} | columns)
