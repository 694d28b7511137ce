"""Where the nodes of a circuit graph go: columns of tokens, bands of layers, no two overlap."""

from dataclasses import dataclass

import pandas as pd

from sparse_signals.charts.base import WIDTH

PLOT = WIDTH - 64  # what the axis of layers leaves
LETTER = 6.3  # mean width of a letter in the labels, in pixels
PADDING = 8  # inside a node, left and right together
BETWEEN = 5  # pixels between two nodes
NARROW = 16  # a column without nodes
HALF = 8  # half the height of a node
ROW = 19  # pixels from a row of nodes to the next one
GAP = 15  # free pixels between two bands, where edges show
MARGIN = 22  # free pixels left and right, where edges bend
WORDS = {"embedding": "embed", "position": "pos", "bias row": "bias"}
LETTERS = {"embedding": "E", "position": "P", "bias row": "B"}


@dataclass(frozen=True)
class Layout:
    """Nodes with their places in pixels, and the places of the names on both axes.

    `nodes`: node, component, column, layer, label, x, y, left, right. y grows upwards. `brief`
    tells whether labels are letters.
    """

    nodes: pd.DataFrame
    columns: dict[str, int]
    bands: dict[float, int]
    width: int
    height: int
    brief: bool


def place(nodes: pd.DataFrame, columns: list[str]) -> Layout:
    """Lay out `nodes` (node, component, column, layer, strength; one row per node).

    Every node gets a box that holds its label; in a cell the strongest comes first. Labels are
    words where they fit into the width of a page, and letters where there are too many columns.
    """
    nodes = nodes.sort_values(["strength", "node"], ascending=[False, True])
    words = nodes["component"].map(lambda name: short(name, WORDS, "MLP ", "bias "))
    letters = nodes["component"].map(lambda name: short(name, LETTERS, "M", "B"))
    brief = bool(_least_widths(nodes, words, columns).sum() > PLOT - 2 * MARGIN)
    labels = letters if brief else words
    widths = _fill(nodes, _least_widths(nodes, labels, columns))
    nodes = _rows(nodes.assign(label=labels, box=_box(labels)), widths)
    bands, height = _bands(nodes)
    centres = (MARGIN + widths.cumsum() - widths / 2).round().astype(int)
    x = (nodes["column"].map(centres) + nodes["offset"]).round().astype(int)
    half = (nodes["box"] / 2).round().astype(int)
    y = nodes["layer"].map(bands) + ROW * nodes["row"]
    nodes = nodes.assign(x=x, y=y, left=x - half, right=x + half).reset_index(drop=True)
    nodes = nodes[["node", "component", "column", "layer", "label", "x", "y", "left", "right"]]
    width = round(widths.sum() + 2 * MARGIN)
    return Layout(nodes, centres.to_dict(), bands, width, height, brief)


def short(component: str, names: dict[str, str], mlp: str, bias: str) -> str:
    """The name of a component as its node shows it."""
    if component in names:
        return names[component]
    return component.replace("MLP ", mlp).replace("bias ", bias)


def _box(labels: pd.Series) -> pd.Series:
    return labels.str.len() * LETTER + PADDING


def _least_widths(nodes: pd.DataFrame, labels: pd.Series, columns: list[str]) -> pd.Series:
    """The least width of each column: its widest node; columns without nodes are narrow."""
    widest = _box(labels).groupby(nodes["column"]).max() + BETWEEN
    return widest.reindex(columns).fillna(NARROW)


def _fill(nodes: pd.DataFrame, widths: pd.Series) -> pd.Series:
    """The widths, with the free room of the page given to the columns with the fullest cells."""
    free = max(0, PLOT - 2 * MARGIN - widths.sum())
    fullest = nodes.groupby(["column", "layer"]).size().groupby("column").max()
    need = fullest.reindex(widths.index).fillna(0)
    return widths + free * need / need.sum()


def _rows(nodes: pd.DataFrame, widths: pd.Series) -> pd.DataFrame:
    """Row and offset from the column's centre: boxes fill a row of their cell, then the next."""
    cells = []
    for (column, _), cell in nodes.groupby(["column", "layer"], sort=False):
        row, used, rows, ends = 0, 0.0, [], []
        for box in cell["box"] + BETWEEN:
            if used and used + box > widths[column]:
                row, used = row + 1, 0.0
            used += box
            rows.append(row)
            ends.append(used)
        cell = cell.assign(row=rows, end=ends)
        length = cell.groupby("row")["end"].transform("max")
        offset = cell["end"] - (cell["box"] + BETWEEN) / 2 - length / 2
        cells.append(cell.assign(offset=offset))
    return pd.concat(cells)


def _bands(nodes: pd.DataFrame) -> tuple[dict[float, int], int]:
    """Height of the lowest row of every layer above the bottom, and the height of the graph."""
    bands, bottom = {}, 0
    for layer, rows in nodes.groupby("layer")["row"].max().items():
        bands[layer] = bottom + (ROW + GAP) // 2
        bottom += ROW * (int(rows) + 1) + GAP
    return bands, bottom + ROW  # room for names at the top
