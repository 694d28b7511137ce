"""Which ranking of edges gives the most faithful circuits: methods in one table, held out.

Rankings are made of training prompts and templates and tested on held-out ones, in several draws.
Writes and prints tables: curves, areas and their differences for circuits of edges, or nodes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.attribution.rules import RELP, SECANT, gradients, integrated
from sparse_signals.attribution.shares import Shares, edge_shares
from sparse_signals.core.model import Model, load_model
from sparse_signals.core.questions import questions
from sparse_signals.core.run import run
from sparse_signals.core.tasks import TASKS, task_prompts
from sparse_signals.interventions.aligned_circuits import (
    AlignedPrompts,
    Edges,
    best_nodes,
    direct_edges,
    role_rows,
    run_nodes,
    traced_edges,
)
from sparse_signals.interventions.circuit_curves import (
    area_table,
    circuit_answers,
    curve_table,
    edge_answers,
)
from sparse_signals.tracing.roots import strongest_roots
from sparse_signals.tracing.trace import trace

RULES = {
    "secant": SECANT,
    "gradients at both ends": gradients(0.0, 1.0),
    "EAP": gradients(1.0),
    "EAP-IG 5": integrated(5),
    "EAP-IG 20": integrated(20),
    "RelP": RELP,
}
AGAINST = "EAP-IG 20"
NODES = (10, 20, 40, 80)
USES = ("train", "test", "reference")
OF_NODES = ("secant", "EAP", "EAP-IG 5", "RelP")
BY = ("method", "size")
KINDS = {"heads": ("head",), "heads and MLPs": ("head", "MLP")}
REFERENCES = 4  # counterfactuals that nodes are averaged over, for each test prompt
ROOTS = 3
T = TypeVar("T")


def prompts_of(
    given: argparse.Namespace, model: Model, use: str, draw: int, n: int
) -> AlignedPrompts:
    """Prompts of a task, sorted by template, so that those that differ late stand together."""
    table = task_prompts(
        given.task,
        n,
        seed=len(USES) * draw + USES.index(use),  # others for every use and draw
        tokenizer=model.tokenizer,
        counterfactual=given.counterfactual,
        held_out=use != "train",
    )
    asked = questions(model, table.sort_values("template").reset_index(drop=True))
    assert asked.counterfactual is not None
    return AlignedPrompts(model, asked.batch, asked.counterfactual, asked.objective)


def shares_of(prompts: AlignedPrompts, roles: list[str], name: str) -> Shares:
    """Shares or gradients of all edges and nodes, in a row for every role."""
    row = role_rows(prompts.batch, roles)
    both = prompts.batch, prompts.counterfactual
    given = {"objective": prompts.objective, "row": row, "rule": RULES[name]}
    return edge_shares(prompts.model, *both, **given)


def edge_values(edges: Edges, shares: Shares) -> Float[Tensor, "edge"]:
    """Shares of edges, summed over roles."""
    return edges.flat({name: getattr(shares, name).sum(0) for name in edges.shapes})


def traced_values(
    prompts: AlignedPrompts, gradients: Float[Tensor, "edge"]
) -> dict[str, Float[Tensor, "edge"]]:
    """Edges of traces of scores: by their shares as published; and by gradients of the answer."""
    roots = strongest_roots(prompts.model, prompts.batch, ROOTS)
    traced = partial(trace, run(prompts.model, prompts.batch), roots)
    published = traced_edges(traced(weighting="published"))
    return {
        "score trace, published": published,
        "score trace, weighed": gradients * (traced_edges(traced()) > 0),
    }


def rankings(prompts: AlignedPrompts, found: dict[str, Shares]) -> dict[str, Float[Tensor, "edge"]]:
    """A value for every edge, by every method; chance too."""
    edges = Edges.of(prompts.model)
    values = {name: edge_values(edges, shares) for name, shares in found.items()}
    values["direct attribution"] = direct_edges(prompts)
    if prompts.batch.io is not None:
        values |= timed("score traces", lambda: traced_values(prompts, values["EAP"]))
    return values | {"random": torch.zeros(len(edges), dtype=torch.float64)}  # ties at random


def timed(what: str, work: Callable[[], T]) -> T:
    """Do some work, and say how long it took."""
    start = time.monotonic()
    found = work()
    print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
    return found


def edges_compared(given: argparse.Namespace, model: Model) -> dict[str, pd.DataFrame]:
    """Curves and areas of circuits of edges."""
    pieces = []
    for draw in range(given.draws):
        train = prompts_of(given, model, "train", draw, given.train)
        test = prompts_of(given, model, "test", draw, given.test)
        found = {name: timed(name, partial(shares_of, train, [], name)) for name in RULES}
        answers = partial(edge_answers, test, rankings(train, found), draw=draw)
        pieces.append(timed("circuits", answers))
        pd.concat(pieces).to_csv(given.out / "answers.csv", index=False)
    answers = pd.concat(pieces, ignore_index=True)
    return {
        "curves": curve_table(answers, by=("method", "size")),
        "draws": curve_table(answers),
        "areas": area_table(answers),
        "differences": area_table(answers, against=AGAINST),
    }


def nodes_compared(given: argparse.Namespace, model: Model) -> dict[str, pd.DataFrame]:
    """Curves of circuits of nodes: heads, or heads and MLPs, at the tokens of a role."""
    pieces: dict[str, list[pd.DataFrame]] = {label: [] for label in KINDS}
    for draw in range(given.draws):
        train = prompts_of(given, model, "train", draw, given.train)
        test = prompts_of(given, model, "test", draw, given.test)
        more = prompts_of(given, model, "reference", draw, REFERENCES * given.test)
        reference = replace(more.counterfactual, table=more.batch.table)  # knows its templates
        roles = [role for role in train.batch.roles if role in test.batch.roles]
        row = role_rows(test.batch, roles)
        values = {
            name: timed(name, partial(shares_of, train, roles, name)).nodes for name in OF_NODES
        }
        values["random"] = torch.zeros_like(values["secant"])
        for label, kinds in KINDS.items():
            every = values["secant"].numel()
            ends = best_nodes(model, values["secant"], (0, every), kinds)
            best = (best_nodes(model, value, NODES, kinds, draw) for value in values.values())
            circuits = torch.cat([ends, *best])
            found = timed(label, partial(run_nodes, test, circuits, row, reference))
            sizes = dict.fromkeys(values, NODES)
            pieces[label].append(circuit_answers(test.batch, found, sizes, draw))
    tables = {label: curve_table(pd.concat(each), by=BY) for label, each in pieces.items()}
    return {"nodes": pd.concat(tables, names=["nodes"]).reset_index(0)}


def main(arguments: list[str] | None = None) -> int:
    """Run it; the options say on what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2-ioi")
    parser.add_argument("--task", default="ioi", choices=TASKS)
    parser.add_argument("--counterfactual", help="a kind of the task's, by default its first")
    parser.add_argument("--circuits", default="edges", choices=("edges", "nodes"))
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--test", type=int, default=64)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("_build") / "methods")
    given = parser.parse_args(arguments)
    compared = edges_compared if given.circuits == "edges" else nodes_compared
    given.out.mkdir(parents=True, exist_ok=True)
    for name, table in compared(given, load_model(given.model)).items():
        table.to_csv(given.out / f"{name}.csv", index=False)
        print(f"\n{name}\n{table.round(3).to_string(index=False)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
