"""Chapter 4: traces of many prompts pooled into one circuit, and circuits as files.

Edges are pooled by what is the same in every prompt: the two ends, the side, and the roles of the
destination and source tokens. A token may have several roles, and then its edges count in each.
"""

import json
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy.typing import ArrayLike

from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.core.resume import atomic, write_parquet
from sparse_signals.core.stats import DRAWS, group_bootstrap, resample

KEY = ["upstream", "downstream", "side", "dest_role", "src_role"]
FORMATS = (".graphml", ".json", ".parquet", ".html")


@dataclass(frozen=True)
class Quirks:
    """What the released code of Franco and Crovella 2024 does when it pools, for comparison.

    double_count: an edge counts once for every path that reaches it (in its first prompt, once).
    first_writer: edges are told apart by their ends and the receiving role alone, and keep the
    side and roles of the first one met. last_role: a token has only the last of its roles.
    """

    double_count: bool = False
    first_writer: bool = False
    last_role: bool = False


@dataclass(frozen=True)
class Circuit:
    """A pooled circuit: one row per edge, and how it was made.

    edges: upstream, downstream, side, dest_role, src_role, role (of the token where upstream
    writes), up_layer, down_layer, prompts (distinct ones with the edge), of (prompts traced),
    prompts_low, prompts_high, weight (mean over these prompts), low, high (95 % bootstrap over
    prompts), spread (standard deviation), share (mean share of its side). Strongest first. Of a
    trace from the answer (chapter 6) they are the columns of `AnswerTrace.pool`; files take any.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:  # .html, .graphml and .parquet likewise
    ...     back = Circuit.load(circuit.save(Path(folder) / "circuit.json"))
    >>> back.edges.equals(circuit.edges), back.facts["model"]
    (True, 'gpt2-ioi')
    """

    edges: pd.DataFrame
    facts: dict[str, str]

    def save(self, path: str | Path) -> Path:
        """Write the circuit by the suffix of the path: see `FORMATS`; .html is a page to look at.

        The file appears whole or not at all. Raises ValueError for another suffix.
        """
        path = Path(path)
        if path.suffix not in FORMATS:
            raise ValueError(_wrong_suffix(path))
        if path.suffix == ".html":
            (page,) = entry_points(group="sparse_signals.pages", name="circuit")
            page.load()(self, path)
        else:
            write_circuit(self, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read back, without loss, what `save` wrote as .graphml, .json or .parquet."""
        return read_circuit(Path(path))


def labelled(edges: pd.DataFrame, roles: pd.DataFrame) -> pd.DataFrame:
    """The edges with a row for each pair of roles of their destination and source."""
    for end in ("dest", "src"):
        names = roles.rename(columns={"pos": end, "role": f"{end}_role"})
        edges = edges.merge(names, on=["prompt", end])
    return edges.assign(role=edges["dest_role"].where(edges["side"] == "dest", edges["src_role"]))


def pool(
    edges: pd.DataFrame,
    batch: Batch,
    quirks: Quirks = Quirks(),
    draws: int = DRAWS,
    seed: int = 0,
    clusters: ArrayLike | None = None,
) -> pd.DataFrame:
    """The edges of a pooled circuit, as in `Circuit`, from the edges of a trace.

    Where an edge occurs several times in a prompt its weight there is the mean. Intervals resample
    prompts, or the clusters that the prompts belong to, such as their templates. Source: Franco and
    Crovella 2024, section 5; distinct prompts, intervals and sets of roles are this book's.
    """
    clusters = np.arange(len(batch.tokens)) if clusters is None else clusters
    roles = roles_of(batch)
    if quirks.last_role:
        roles = roles.groupby(["prompt", "pos"], as_index=False).last()
    table = labelled(edges, roles).sort_values(["prompt", "firing"], kind="stable")
    if quirks.first_writer:
        ends = table.groupby(["upstream", "downstream", "role"], sort=False)
        table[KEY[2:]] = ends[KEY[2:]].transform("first")
    each = table.groupby([*KEY, "role", "prompt"], as_index=False).agg(
        weight=("weight", "mean"),
        share=("share", "mean"),
        times=("visits", "sum"),
        up_layer=("up_layer", "first"),
        down_layer=("down_layer", "first"),
    )
    if quirks.double_count:
        started = each.groupby([*KEY, "role"])["prompt"].transform("min") == each["prompt"]
        each["times"] = each["times"].mask(started, 1)
    else:
        each["times"] = 1
    return _sorted(_pooled(each, np.unique(clusters, return_inverse=True)[1], draws, seed))


def _pooled(
    each: pd.DataFrame, clusters: Int[np.ndarray, "prompt"], draws: int, seed: int
) -> pd.DataFrame:
    """Counts, means and bootstrap intervals of every edge; `each` has a row per edge and prompt."""
    groups = each.groupby([*KEY, "role"], sort=False)
    table = groups.agg(
        up_layer=("up_layer", "first"),
        down_layer=("down_layer", "first"),
        prompts=("times", "sum"),
        spread=("weight", lambda x: float(x.std(ddof=0))),
        share=("share", "mean"),
    ).reset_index()
    number, cluster = groups.ngroup().to_numpy(), clusters[each["prompt"]]
    times, drawn = each["times"].to_numpy(float), resample(int(clusters.max()) + 1, draws, seed)
    weights = times * each["weight"].to_numpy()
    found = group_bootstrap(weights, number, cluster, drawn, len(table), times)
    table["weight"], table["low"], table["high"] = found
    counts = group_bootstrap(times, number, cluster, drawn, len(table))
    table["prompts_low"], table["prompts_high"] = counts[1:]
    return table.assign(of=len(clusters))


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    order = [*KEY, "role", "up_layer", "down_layer", "prompts", "of", "prompts_low", "prompts_high",
             "weight", "low", "high", "spread", "share"]  # fmt: skip
    table = table[order].sort_values(
        ["prompts", "weight", *KEY], ascending=[False, False, *[True] * len(KEY)]
    )
    return table.reset_index(drop=True)


# --- files ---------------------------------------------------------------------------------------


def to_graph(circuit: Circuit) -> nx.MultiDiGraph:
    """Nodes "component@role" (component, role, height); every column of an edge is an attribute.

    So is its place in the table, rank.
    """
    graph = nx.MultiDiGraph()
    graph.graph.update(circuit.facts)
    for row in circuit.edges.assign(rank=range(len(circuit.edges))).to_dict("records"):
        ends = []
        for component, role, height in (
            (row["upstream"], row["role"], row["up_layer"]),
            (row["downstream"], row["dest_role"], row["down_layer"]),
        ):
            ends.append(f"{component}@{role}")
            graph.add_node(ends[-1], component=component, role=role, height=height)
        graph.add_edge(*ends, **{str(name): value for name, value in row.items()})
    return graph


def from_graph(graph: nx.MultiDiGraph) -> Circuit:
    """The circuit that `to_graph` made the graph of."""
    rows = [attributes for _, _, attributes in graph.edges(data=True)]
    facts = {name: value for name, value in graph.graph.items() if isinstance(value, str)}
    table = pd.DataFrame(rows).sort_values("rank", ignore_index=True).drop(columns="rank")
    return Circuit(table, facts)  # GraphML adds defaults that are no facts


def write_circuit(circuit: Circuit, path: Path) -> None:
    """Write a circuit as GraphML, JSON (node-link) or Parquet."""
    if path.suffix == ".parquet":
        table = circuit.edges.copy()
        table.attrs = {**circuit.facts}
        write_parquet(table, path)
        return
    with atomic(path) as aside:
        if path.suffix == ".json":
            data = nx.node_link_data(to_graph(circuit), edges="edges")
            aside.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
        else:
            nx.write_graphml(to_graph(circuit), aside)


def read_circuit(path: Path) -> Circuit:
    """Read back what `write_circuit` wrote, without loss."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        return Circuit(table, {str(name): fact for name, fact in table.attrs.items()})
    if path.suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8"))
        return from_graph(nx.node_link_graph(data, edges="edges"))
    if path.suffix == ".graphml":
        return from_graph(nx.read_graphml(path, force_multigraph=True))
    raise ValueError(_wrong_suffix(path))


def _wrong_suffix(path: Path) -> str:
    return f"a circuit is kept as {', '.join(FORMATS)}, not as {path.suffix!r}"
