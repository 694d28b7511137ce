"""A trace from the answer as one HTML file: the question, the graph, paths, edges, comparisons."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparse_signals.app.directions import ALONG
from sparse_signals.app.page import answer_table, fill_page
from sparse_signals.attribution.answer import AnswerTrace
from sparse_signals.charts.attribution import numbered
from sparse_signals.core.numbers import fmt, signed_percent
from sparse_signals.core.questions import Questions, answer_words

MOST_PATHS, MOST_COMPARISONS, MOST_PROMPTS = 20, 40, 200
FAINTEST = 0.005  # shares of tokens from here on are written below them
DARKEST = 55  # percent of the colour behind a token: text stays legible on it
PATHS_SAID = "From a token to the answer, one component after the other, each with its share."
POOLED_PATHS_SAID = (
    "From a token to the answer, by roles, each with its share over all prompts. A path counts as "
    "nothing in a prompt where it is not among the largest."
)


def write_answer_page(
    path: Path | str,
    traced: AnswerTrace,
    asked: Questions,
    pooled: pd.DataFrame,
    clusters: list[int],
) -> Path:
    """Write a trace of one prompt, or of many, as a self-contained page, and return its path.

    `pooled`: its edges by role, `clusters`: what varied independently, see `AnswerTrace.pool`.
    The file appears whole or not at all.
    """
    if len(asked) == 1:
        view = prompt_view(traced, asked)
    else:
        view = pooled_view(traced, asked, pooled, clusters)
    return fill_page(path, "answer.html", facts=traced.facts, **view)


def prompt_view(traced: AnswerTrace, asked: Questions) -> dict[str, Any]:
    """What the page of one prompt shows."""
    labels, edges, heads = asked.batch.labels[0], traced.edges, traced.comparisons
    names = dict(enumerate(numbered(labels)))
    heads = heads.sort_values("share", key=abs, ascending=False, kind="stable")
    heads = heads.assign(**{f"{end}_name": heads[end].map(names) for end in ("dest", "src")})
    right, wrong = (_words(traced, ids[0]) for ids in (asked.right, asked.wrong))
    other = None if asked.counterfactual is None else asked.counterfactual.labels[0]
    row = traced.prompts.iloc[0]
    shares = traced.tokens["share"].tolist()
    tokens = [
        {
            "text": text.strip() or repr(text)[1:-1],
            "other": other[n].strip() if other and other[n] != text else None,
            "share": shares[n],
            "shade": _shade(shares[n], traced.tokens["share"]),
            "shown": abs(shares[n]) >= FAINTEST,
        }
        for n, text in enumerate(labels)
    ]
    first, second = fmt(row["f"]), fmt(row["counterfactual_f"])
    return {
        "title": _title(traced, right, wrong),
        "tokens": tokens,
        "differs": other is not None,
        "sentences": [
            f"{_asked(traced, asked, right, wrong)} is {first} here, and {second} "
            f"{'in the counterfactual' if other else 'in what it is compared with'}. "
            + _split(traced)
        ],
        "roles": None,
        "edges": answer_table(edges[edges["graph"]], labels),
        "paths_said": PATHS_SAID,
        "paths": traced.paths.head(MOST_PATHS).to_dict("records"),
        "comparisons": heads.head(MOST_COMPARISONS).to_dict("records"),
        "prompts": None,
    }


def pooled_view(
    traced: AnswerTrace, asked: Questions, pooled: pd.DataFrame, clusters: list[int]
) -> dict[str, Any]:
    """What the page of many prompts shows."""
    mean = traced.used[["f", "counterfactual_f"]].mean()
    roles, heads = traced.pooled_tokens(clusters), traced.pooled_comparisons()
    shades = [_shade(share, roles["share"], 100) for share in roles["share"]]
    heads = heads.rename(columns={"dest_role": "dest_name", "src_role": "src_name"})
    shown = traced.prompts.head(MOST_PROMPTS)
    few = f"The first {len(shown)} of {len(traced.prompts):,}. " * (
        len(shown) < len(traced.prompts)
    )
    return {
        "title": f"Why {_these(traced)} {len(asked):,} prompts?",
        "tokens": None,
        "differs": asked.counterfactual is not None,
        "sentences": [
            f"{_asked_of_all(traced, asked)} is {fmt(mean['f'])} on average, and "
            f"{fmt(mean['counterfactual_f'])} in what the prompts are compared with. "
            + _split(traced)
        ],
        "roles": roles.assign(shade=shades).to_dict("records"),
        "edges": answer_table(pooled),
        "paths_said": POOLED_PATHS_SAID,
        "paths": traced.pooled_paths(clusters).head(MOST_PATHS).to_dict("records"),
        "comparisons": heads.head(MOST_COMPARISONS).to_dict("records"),
        "prompts_said": f"{few}F of the prompt, F′ of what it is compared with (in italics), the "
        "part of the difference that the edges of its graph alone carry.",
        "prompts": shown.assign(
            text=asked.batch.table["text"].head(MOST_PROMPTS),
            other=_others(asked, len(shown)),  # pyright: ignore[reportArgumentType]
            right=[_words(traced, ids) for ids in asked.right[:MOST_PROMPTS]],
            wrong=[_words(traced, ids) for ids in asked.wrong[:MOST_PROMPTS]],
        ).to_dict("records"),
    }


def _title(traced: AnswerTrace, right: str, wrong: str) -> str:
    """The question of one prompt."""
    if _along(traced):
        return "Why this much along a direction?"
    return f"Why “{right}” rather than “{wrong}”?" if wrong else f"Why “{right}”?"


def _these(traced: AnswerTrace) -> str:
    return "this much along a direction in" if _along(traced) else "these answers to"


def _along(traced: AnswerTrace) -> bool:
    """Whether F is a direction of the last stream, and no answer."""
    return traced.facts["asked"].startswith(ALONG)


def _asked_of_all(traced: AnswerTrace, asked: Questions) -> str:
    """F of many prompts in words."""
    return f"F, {traced.facts['asked'] if _along(traced) else f'the {asked.objective.what}'},"


def _asked(traced: AnswerTrace, asked: Questions, right: str, wrong: str) -> str:
    """F of one prompt in words."""
    if _along(traced):
        return f"F, {traced.facts['asked']},"
    if asked.objective.logarithm:
        return f"The logarithm of the probability of “{right}”"
    return f"The logit of “{right}” less that of “{wrong}”"


def _split(traced: AnswerTrace) -> str:
    """What is split, and how much of it the graph carries, in words."""
    difference, edges = traced.used[["difference", "edges"]].mean()
    asked, what = traced.facts["asked"], f"The difference of {fmt(difference)} is split here"
    if asked.startswith("what "):
        what = f"Of this, {asked.split(' adds')[0]} adds, {fmt(difference)} is split here"
    many = " of each prompt (on average)" if len(traced.prompts) > 1 else ""
    carry = f"alone carry {signed_percent(traced.explained)} of it"
    return f"{what}: the {round(edges):,} strongest edges{many} {carry}."


def _others(asked: Questions, n: int) -> list[str | None]:
    """The texts of the counterfactuals, where there are any."""
    if asked.counterfactual is None:
        return [None] * n
    return asked.counterfactual.table["text"].head(n).tolist()


def _words(traced: AnswerTrace, ids: list[int]) -> str:
    return answer_words(ids, traced.model.tokenizer)


def _shade(share: float | np.floating, shares: pd.Series, darkest: int = DARKEST) -> float:
    """How strong the colour of a token is, in percent: that of the largest is the darkest."""
    return round(darkest * abs(float(share)) / max(1e-9, float(shares.abs().max())), 1)
