"""Charts of chapter 3: slices, supports, sparsity beside its nulls, what a signal means."""

import altair as alt
import pandas as pd

from sparse_signals.charts.style import WIDTH, distinct, finish, menu, tooltips
from sparse_signals.core.numbers import counted, interval

IN_SUPPORT = alt.Color("chosen:N").title("slice is").scale(domain=["in the support", "left out"])
TOKEN_KINDS = ["a name", "another word"]
SEPARATOR = "\t"  # no token holds it
HATCH = alt.Opacity("chosen:O").scale(domain=["in the support", "left out"], range=[1, 0.45])
SPARSITY_MEASURES = {
    "participation": "participation ratio of |p|",
    "ninety": "slices holding 90 % of Σ|p|",
    "settled": "slices until the sum stays within 10 %",
    "support": "published support size",
}


def slice_bars(table: pd.DataFrame) -> alt.TopLevelMixin:
    """One firing and one silent pair: their slices from the largest to the smallest.

    Columns: pair ("firing: …" and "silent: …"), and those of `signals.slice_table`.
    """
    words = {True: "in the support", False: "left out"}
    table = table.assign(chosen=table["chosen"].map(words))
    score = table.groupby("pair", sort=False)["score"].first()
    size = table[table["chosen"] == "in the support"].groupby("pair", sort=False).size()
    base = alt.Chart(table).encode(
        alt.X("rank:O").title("slices, largest first").axis(labels=False)
    )
    bars = base.mark_bar().encode(
        alt.Y("p:Q").title("p, and its running sum"),
        IN_SUPPORT,
        HATCH.legend(None),
        tooltip=["k:O", alt.Tooltip("p:Q", format=".3f"), "chosen:N"],
    )
    line = base.mark_line(point=alt.OverlayMarkDef(size=14), color="currentColor", strokeWidth=1)
    rule = alt.Chart(table).mark_rule(strokeDash=[4, 4]).encode(y="mean(score):Q")
    chart = (bars + line.encode(y="total:Q") + rule).properties(width=250, height=220)
    counts = " and ".join(f"{size.get(name, 0)} of {table['k'].nunique()}" for name in score.index)
    return finish(
        chart.facet(alt.Facet("pair:N").title(None).sort(list(score.index)), columns=2),
        f"The published support takes {counts} slices: first the firing pair, then the silent one",
        "Two bar charts. Slices of one firing pair and of one silent pair, sorted in descending "
        "order, with their running sum as a line and the score as a dashed rule. Slices in the "
        "published support are filled, the others are pale.",
    )


def score_explorer(table: pd.DataFrame, head: str) -> alt.TopLevelMixin:
    """Pick prompt, head and destination: attention over the sources, and slices of the strongest.

    Columns: prompt, name (head), dest, src (strongest source, the first token apart), and lists:
    labels and weights (per token), slices and chosen (per singular pair). It opens on `head` at
    the last token of the first prompt.
    """
    chosen = [["01"[int(x)] for x in row] for row in table["chosen"]]
    table = table.assign(chosen=pd.Series(chosen, table.index))
    lists = ("labels", "weights", "slices", "chosen")
    packed = {name: [SEPARATOR.join(map(_short, row)) for row in table[name]] for name in lists}
    table = table[["prompt", "name", "dest", "src"]].assign(**packed)  # a tenth of the size
    last = int(table["dest"].max())
    prompts, heads = sorted(table["prompt"].unique().tolist()), list(table["name"].unique())
    bind = {
        "prompt": alt.binding_select(options=prompts, name="prompt "),
        "name": alt.binding_select(options=heads, name="head "),
        "dest": alt.binding_range(min=1, max=last, step=1, name="destination position "),
    }
    start = table[table["name"] == head].sort_values(["prompt", "dest"], ascending=[True, False])
    start = start[list(bind)].to_dict("records")[0]
    picks = [
        alt.param(name=f"pick_{field}", value=start[field], bind=bind[field]) for field in bind
    ]
    test = " && ".join(f"datum.{field} == pick_{field}" for field in bind)
    base = alt.Chart(table).transform_filter(test)
    attention = _flatten(base, "labels", "weights").mark_bar().encode(
        alt.X("pos:O").title("source token").axis(labelExpr=_token_axis(table), labelAngle=-60),
        alt.Y("value:Q").title("attention").scale(domain=[0, 1]),
        alt.Color("datum_best:N").title("strongest source").scale(domain=["no", "yes"]),
        tooltip=["label:N", alt.Tooltip("value:Q", format=".3f")],
    ).transform_calculate(datum_best="datum.pos == datum.src ? 'yes' : 'no'")  # fmt: skip
    slices = _flatten(base, "chosen", "slices").mark_bar().encode(
        alt.X("pos:O").title("singular pair k").axis(labelOverlap=True),
        alt.Y("value:Q").title("slice p of the strongest source"),
        alt.Color("label:N").title("slice is").scale(domain=["in the support", "left out"]),
        tooltip=["pos:O", alt.Tooltip("value:Q", format=".3f"), "label:N"],
    ).transform_calculate(label="datum.label == '1' ? 'in the support' : 'left out'")  # fmt: skip
    panels = [chart.properties(width=WIDTH - 60, height=150) for chart in (attention, slices)]
    chart = alt.vconcat(*panels).add_params(*picks).resolve_scale(color="independent")
    return finish(
        chart,
        f"Every score is a sum of slices: {len(heads)} heads to explore",
        "Two linked bar charts with a menu for the prompt, a menu for the head and a slider for "
        "the destination. Above: attention of the destination to each source token. Below: the "
        "slices of its score with the most attended source, the support marked.",
    )


def support_sizes(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Support size per head, firing and silent; click a head to see the whole distribution.

    Columns: name, pairs ("firing", "silent"), support; one row per pair of tokens.
    """
    table = table.rename(columns={"support": "size"})
    table = table.groupby(["name", "pairs", "size"]).size().rename("count").reset_index()
    heads, cell = distinct(table["name"]), alt.X("size:Q").title("size of the support")
    pick = _chosen_head(heads)
    means = table.assign(total=table["size"] * table["count"]).groupby(
        ["name", "pairs"], sort=False
    )
    means = (means["total"].sum() / means["count"].sum()).rename("mean").reset_index()
    points = alt.Chart(means).mark_point(filled=True, size=70).encode(
        alt.X("mean:Q").title("mean size of the support").scale(zero=True),
        alt.Y("name:N").title("head").sort(heads),
        alt.Color("pairs:N").title("pairs").scale(domain=["firing", "silent"]),
        alt.Shape("pairs:N").title("pairs").scale(domain=["firing", "silent"]),
        opacity=alt.condition(pick, alt.value(1), alt.value(0.55)),
        tooltip=["name:N", "pairs:N", alt.Tooltip("mean:Q", format=".2f")],
    ).add_params(pick).properties(width=WIDTH - 80, height=alt.Step(15))  # fmt: skip
    bars = alt.Chart(table).transform_filter(pick).mark_bar(opacity=0.8).encode(
        cell.bin(step=1), alt.Y("count:Q").title("pairs").stack(None),
        alt.Color("pairs:N"), alt.Row("pairs:N").title(None).sort(["firing", "silent"]),
        tooltip=["size:Q", "count:Q", "pairs:N"],
    ).properties(width=WIDTH - 80, height=70)  # fmt: skip
    wide = means.pivot(index="name", columns="pairs", values="mean")
    smaller = int((wide["silent"] < wide["firing"]).sum())
    return finish(
        alt.vconcat(points, bars),
        f"The mean published support is smaller for pairs that do not fire in "
        f"{counted(smaller, len(wide), 'heads')}",
        "Dot plot of the mean support size per head, for firing and for silent pairs, and below "
        "it histograms of the sizes for the head that is clicked or chosen in the menu.",
    )


def _chosen_head(heads: list[str]) -> alt.Parameter:
    """One head, chosen by a click or by a menu."""
    menu = {"name": alt.binding_select(options=heads, name="head ")}
    return alt.selection_point(
        fields=["name"], value=heads[0], empty=False, on="click",
        bind=menu,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def token_signals(table: pd.DataFrame, found: pd.Series) -> alt.TopLevelMixin:
    """How much signal each kind of token carries.

    table: token, name (bool), strength. found: a row of `message.against_chance`.
    """
    groups = table.groupby([table["token"].str.strip(), "name"])["strength"]
    table = groups.agg(["mean", "size"]).reset_index()
    table["low"], table["high"] = groups.quantile(0.1).to_numpy(), groups.quantile(0.9).to_numpy()
    table["kind"] = table["name"].map({True: "a name", False: "another word"})
    table = pd.concat([part.nlargest(18, "size") for _, part in table.groupby("kind")])
    order = table.sort_values("mean", ascending=False)["token"].tolist()
    base = alt.Chart(table).encode(
        alt.Y("token:N").title(None).sort(order),
        alt.Color("kind:N").title("token is").scale(domain=TOKEN_KINDS),
    )
    points = base.mark_point(filled=True, size=60).encode(
        alt.X("mean:Q").title(
            "what the typical destination hears, in softmax units (mean, middle 80 %)"
        ),
        alt.Shape("kind:N").title("token is").scale(domain=TOKEN_KINDS),
        tooltip=["token:N", "kind:N", alt.Tooltip("mean:Q", format=".2f")],
    )
    rules = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    return finish(
        (rules + points).properties(width=WIDTH - 120, height=alt.Step(15)),
        f"In new sentences the signal tells names from other words with AUC {found['auc']:.2f}, "
        f"{found['verdict']} the range of as many random singular pairs, "
        + interval(found["chance"], found["chance_low"], found["chance_high"]),
        "Dot plot: for each kind of token, how much of the head's signal it carries; names "
        "are marked by colour and shape.",
    )


def _short(value) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def _flatten(chart: alt.Chart, labels: str, values: str) -> alt.Chart:
    """One row per entry of two packed strings: label, value, and its position pos."""
    return (
        chart.transform_calculate(
            label=f"split(datum.{labels}, '{SEPARATOR}')",
            text=f"split(datum.{values}, '{SEPARATOR}')",
        )
        .transform_flatten(["label", "text"])
        .transform_calculate(value="toNumber(datum.text)")
        .transform_window(pos="row_number()")
        .transform_calculate(pos="datum.pos - 1")
    )


def _token_axis(table: pd.DataFrame) -> str:
    """Axis label of a position: the token there in the chosen prompt."""
    rows = table.drop_duplicates("prompt")
    cases = ", ".join(
        f"'{row.prompt}': split({row.labels!r}, '{SEPARATOR}')" for row in rows.itertuples()
    )
    return f"({{{cases}}})[pick_prompt][datum.value]"


def null_gaps(table: pd.DataFrame, main: str) -> alt.TopLevelMixin:
    """The singular basis minus its nulls, for firings and pairs that do not fire.

    Columns as of `nulls.mean_gaps`: kind, null, measure, value, low, high. A menu chooses the
    measure; the title speaks of the null `main`, by participation ratio.
    """
    measures, kinds = _measures(table), distinct(table["kind"])
    pick, rows = menu("measure", measures), distinct(table["null"])
    shape = alt.Shape("kind:N").title("pairs").scale(domain=kinds)
    base = alt.Chart(table).transform_filter("datum.measure == measure").encode(
        alt.Y("null:N").title(None).sort(rows), alt.YOffset("kind:N").sort(kinds),
        alt.Color("kind:N").title("pairs").scale(domain=kinds),
    )  # fmt: skip
    points = base.mark_point(filled=True, size=70).encode(
        alt.X("value:Q").title("singular basis minus null, in slices (95 % interval)"), shape,
        tooltip=["null:N", "kind:N", *tooltips("value", "low", "high", form=".2f")],
    )  # fmt: skip
    lines = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    here = table[(table["null"] == main) & (table["measure"] == next(iter(measures)))]
    columns = (here[name] for name in ("kind", "value", "low", "high"))
    found = [f"{kind} {interval(*numbers)}" for kind, *numbers in zip(*columns, strict=True)]
    return finish(
        (_zero() + lines + points).add_params(pick).properties(
            width=WIDTH - 200, height=alt.Step(13)
        ),
        f"By participation ratio, singular vectors against rotated {main}: {', '.join(found)}",
        "Dot plot with intervals: how many slices fewer the singular basis needs than each null, "
        "for firings, for pairs that score alike and do not fire, and the difference of the two. "
        "Left of zero the singular basis is sparser. A menu chooses one of four measures.",
    )  # fmt: skip


def _zero() -> alt.Chart:
    return alt.Chart(pd.DataFrame({"zero": [0]})).mark_rule(strokeDash=[4, 4]).encode(x="zero:Q")


def _measures(table: pd.DataFrame) -> dict[str, str]:
    """The measures that the table has, and what they are called."""
    found = set(table["measure"])
    return {name: label for name, label in SPARSITY_MEASURES.items() if name in found}


def head_differences(table: pd.DataFrame, null: str, most: int = 24) -> alt.TopLevelMixin:
    """The singular basis minus one null, head by head, with intervals; a menu has the measure.

    Columns as of `nulls.head_gaps`: name, pairs, measure, value, low, high, q, verdict. The heads
    furthest from zero by the first measure are drawn, `most` of them.
    """
    measures = _measures(table)
    first = table[table["measure"] == next(iter(measures))]
    far = first["value"].abs().nlargest(most).index
    order = first.loc[far].sort_values("value")["name"].tolist()
    shown, kinds = table[table["name"].isin(order)], ["sparser", "unclear", "less sparse"]
    base = alt.Chart(shown).transform_filter("datum.measure == measure").encode(
        alt.Y("name:N").title("head").sort(order),
        alt.Color("verdict:N").title("singular basis is").scale(domain=kinds),
    )  # fmt: skip
    points = base.mark_point(filled=True, size=60).encode(
        alt.X("value:Q").title("singular basis minus null, in slices (95 % interval)"),
        alt.Shape("verdict:N").title("singular basis is").scale(domain=kinds),
        tooltip=["name:N", "pairs:Q", *tooltips("value", "low", "high", "q"), "verdict:N"],
    )  # fmt: skip
    lines = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    words = first["verdict"].value_counts()
    heads = f"{len(first)} heads" if len(first) != 1 else "one head"
    found = ", ".join(f"{words.get(kind, 0) or 'none'} {kind}" for kind in kinds)
    drawn = f"The {most} heads furthest from zero are drawn." if len(first) > most else None
    return finish(
        (_zero() + lines + points).add_params(menu("measure", measures)).properties(
            width=WIDTH - 140, height=alt.Step(14)
        ),
        f"By participation ratio against rotated {null}, of {heads}: {found}",
        "Dot plot with intervals, a row per head: sparsity in the singular basis minus that of a "
        "null, on the firings of the task. Colour and shape: the verdict at a false-discovery "
        "rate of 5 % over heads. A menu chooses the measure.",
        subtitle=drawn,
    )  # fmt: skip
