"""Appendix: tables of what is planted, for charts: edges, decoys, attention."""

import pandas as pd

from sparse_signals.planted import LOUD, MUTE, Planted
from sparse_signals.truth import Case, among

ROLES = ("end", "IO", "S2", "S1+1", "S1")  # the first of these that a token has names it


def drawn_edges(case: Planted) -> pd.DataFrame:
    """The planted edges by the roles of their tokens: circuit, upstream, role, side, reader, dest.

    One row per edge, whatever the prompt; `role` is where upstream writes.
    """
    edges = case.truth.assign(reader=_names(case.truth), circuit=case.name)
    writes = edges["dest"].where(edges["side"] == "dest", edges["src"])
    edges["role"], edges["at"] = _roles(case, edges, writes), _roles(case, edges, edges["dest"])
    columns = ["circuit", "upstream", "role", "side", "reader", "at"]
    return edges[columns].drop_duplicates(ignore_index=True)


def drawn_decoys(case: Case) -> pd.DataFrame:
    """The decoys of a circuit, and at which token they fire: circuit, reader, at."""
    fired = case.pairs.table()
    if case.planted.name == "decoys":
        fired = fired[fired["name"].isin(MUTE + LOUD)]
    else:
        fired = fired.iloc[:0]
    at = _roles(case.planted, fired, fired["dest"])
    return pd.DataFrame({"circuit": case.planted.name, "reader": fired["name"], "at": at})


def drawn_attention(case: Case) -> pd.DataFrame:
    """Attention of the heads of a circuit on its first prompt: one row per head and visible pair.

    Columns: head ("inhibition 0.0"), dest, src, target, source (words), attention, planted
    (whether the circuit needs the head to look there).
    """
    labels = [f"{pos} {word}" for pos, word in enumerate(case.planted.batch.labels[0])]
    rows = case.planted.truth[case.planted.truth["prompt"] == 0]
    parts = []
    for (layer, head), pairs in rows.groupby(["layer", "head"]):
        weights = case.run.attention.pattern[layer, 0, head]
        table = pd.DataFrame(weights[: len(labels), : len(labels)].numpy()).stack()
        table = table.rename("attention").rename_axis(["dest", "src"]).reset_index()
        table["planted"] = among(table, pairs, ["dest", "src"])
        table = table[table["src"] <= table["dest"]]
        parts.append(table.assign(head=f"{case.planted.name} {layer}.{head}"))
    looks = pd.concat(parts, ignore_index=True)
    words = dict(enumerate(labels))
    return looks.assign(target=looks["dest"].map(words), source=looks["src"].map(words))


def _names(table: pd.DataFrame) -> pd.Series:
    return table["layer"].astype(str) + "." + table["head"].astype(str)


def _roles(case: Planted, table: pd.DataFrame, token: pd.Series) -> list[str]:
    roles = {role: case.batch.roles[role].tolist() for role in ROLES if role in case.batch.roles}
    pairs = zip(table["prompt"], token, strict=True)
    return [next(r for r in roles if roles[r][prompt] == place) for prompt, place in pairs]
