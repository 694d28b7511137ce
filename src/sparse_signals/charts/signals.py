"""Charts of chapter 3: slices, supports, vectors in use, what a signal means."""

import altair as alt
import pandas as pd

from sparse_signals.charts.style import WIDTH, distinct, finish, menu, tooltips

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
        f"The published support is smaller for pairs that do not fire in {smaller} of "
        f"{len(wide)} heads",
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


def vectors_in_use(table: pd.DataFrame) -> alt.TopLevelMixin:
    """How often each singular pair is in the support, per head; click a head for its profile.

    Columns: name, k, pairs ("firing", "silent"), share (of pairs whose support has k).
    """
    heads = distinct(table["name"])
    pick = _chosen_head(heads)
    grid = alt.Chart(table).transform_filter("datum.pairs == 'firing'").mark_rect().encode(
        alt.X("k:O").title("singular pair k").axis(labelOverlap=True),
        alt.Y("name:N").title("head").sort(heads),
        alt.Color("share:Q").title("share of firings").scale(domain=[0, 1]),
        stroke=alt.condition(pick, alt.value("currentColor"), alt.value(None)),
        tooltip=["name:N", "k:O", alt.Tooltip("share:Q", format=".2f")],
    ).add_params(pick).properties(width=WIDTH - 130, height=alt.Step(14))  # fmt: skip
    bars = alt.Chart(table).transform_filter(pick).mark_bar().encode(
        alt.X("k:O").title("singular pair k").axis(labelOverlap=True),
        alt.Y("share:Q").title("share of pairs").scale(domain=[0, 1]), alt.XOffset("pairs:N"),
        alt.Fill("pairs:N").title("pairs").scale(domain=["firing", "silent"]),
        tooltip=["name:N", "k:O", "pairs:N", alt.Tooltip("share:Q", format=".2f")],
    ).properties(width=WIDTH - 130, height=150)  # fmt: skip
    often = (table[table["pairs"] == "firing"].set_index("name")["share"] >= 0.5).groupby(level=0)
    return finish(
        alt.vconcat(grid, bars),
        f"A head uses {often.sum().median():.0f} of its {table['k'].nunique()} singular pairs in "
        "at least half of its firings (median head)",
        "Heat map of heads by singular pairs: the share of a head's firings whose support holds "
        "the pair. Below, the same for the chosen head, firing and silent pairs side by side.",
    )


def token_signals(table: pd.DataFrame, auc: float, chance: str) -> alt.TopLevelMixin:
    """How much signal each kind of token carries. Columns: token, name (bool), strength."""
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
        f"The signal tells names from other tokens with AUC {auc:.2f}; as many random "
        f"singular pairs of the same head: {chance}",
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


def measure_intervals(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Sparsity in every basis with bootstrap intervals; a menu chooses the measure.

    Columns: basis, pairs, measure, value, low, high.
    """
    measures = _measures(table)
    pick, (measure, *_) = menu("measure", measures), measures
    rows, kinds = distinct(table["basis"]), distinct(table["pairs"])
    base = alt.Chart(table).transform_filter("datum.measure == measure").encode(
        alt.Y("basis:N").title(None).sort(rows), alt.YOffset("pairs:N").sort(kinds),
        alt.Color("pairs:N").title("pairs").scale(domain=kinds),
    )  # fmt: skip
    tooltip = ["basis:N", "pairs:N", *tooltips("value", "low", "high", form=".2f")]
    points = base.mark_point(filled=True, size=80).encode(
        alt.X("value:Q").title("slices (mean over pairs, 95 % interval)").scale(zero=True),
        alt.Shape("pairs:N").title("pairs").scale(domain=kinds), tooltip=tooltip,
    )  # fmt: skip
    chart = (base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q") + points).add_params(pick)
    first = table[table["measure"] == measure].set_index(["pairs", "basis"])["value"]
    best = first[kinds[0]].idxmin()
    return finish(
        chart.properties(width=WIDTH - 180, height=alt.Step(14)),
        f"By {measures[measure]}, the sparsest code of {kinds[0]} pairs is: {best}",
        "Dot plot with intervals. Rows are bases and null models, colours and shapes the kind of "
        "pairs; a menu chooses one of four measures of sparsity.",
    )


def _measures(table: pd.DataFrame) -> dict[str, str]:
    """The measures that the table has, and what they are called."""
    found = set(table["measure"])
    return {name: label for name, label in SPARSITY_MEASURES.items() if name in found}


def head_differences(table: pd.DataFrame, most: int = 40) -> alt.TopLevelMixin:
    """SVD minus null, head by head, with intervals; menus choose the null and the measure.

    Columns: name, pairs (count), null, measure, difference, low, high. Negative: SVD is sparser.
    """
    busiest = table.drop_duplicates("name").nlargest(most, "pairs")["name"]
    verdict = pd.Series("unclear", table.index)
    verdict = verdict.mask(table["high"] < 0, "SVD sparser").mask(table["low"] > 0, "null sparser")
    table = table.assign(verdict=verdict)
    shown = table[table["name"].isin(busiest)]
    nulls, measures = distinct(table["null"]), _measures(table)
    picks = [menu("against", nulls), menu("measured", measures, "measure")]
    kinds = ["SVD sparser", "unclear", "null sparser"]
    base = alt.Chart(shown).transform_filter("datum.null == against && datum.measure == measured")
    base = base.encode(
        alt.Y("name:N").title("head").sort(distinct(shown["name"])),
        alt.Color("verdict:N").title("95 % interval").scale(domain=kinds),
    )
    tooltip = ["name:N", "pairs:Q", *tooltips("difference", "low", "high", form=".2f")]
    points = base.mark_point(filled=True, size=60).encode(
        alt.X("difference:Q").title("SVD minus null, in slices"),
        alt.Shape("verdict:N").title("95 % interval").scale(domain=kinds), tooltip=tooltip,
    )  # fmt: skip
    rules = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    zero = alt.Chart(pd.DataFrame({"zero": [0]})).mark_rule(strokeDash=[4, 4]).encode(x="zero:Q")
    first = table[(table["null"] == nulls[0]) & (table["measure"] == next(iter(measures)))]
    clear = (first["verdict"] == kinds[0]).sum()
    return finish(
        (zero + rules + points)
        .add_params(*picks)
        .properties(width=WIDTH - 140, height=alt.Step(14)),
        f"Against the {nulls[0]}, the SVD basis is sparser in {clear} of {len(first)} heads",
        "Dot plot with intervals, a row per head: sparsity in the SVD basis minus that of a null. "
        "Left of zero the SVD basis is sparser. Menus choose the null and the measure.",
        subtitle=None if len(first) <= most else f"The {most} heads that fire most are drawn.",
    )


def captured(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Share of the score in the n largest slices. Columns: basis, n, share, low, high."""
    names = distinct(table["basis"])
    base = alt.Chart(table).encode(
        alt.X("n:Q").title("number of slices, largest |p| first"),
        alt.Color("basis:N").title("basis").scale(domain=names),
    )
    band = base.mark_area(opacity=0.2).encode(
        alt.Y("low:Q").title("share of the score (median, middle half)"), alt.Y2("high:Q")
    )
    line = base.mark_line().encode(
        y="share:Q", strokeDash=alt.StrokeDash("basis:N").title("basis").scale(domain=names),
        tooltip=["basis:N", "n:Q", alt.Tooltip("share:Q", format=".2f")],
    )  # fmt: skip
    reach = table[table["share"] >= 0.9].groupby("basis")["n"].min()
    found = ", ".join(f"{reach.get(name, '–')} ({name})" for name in names)
    return finish(
        (band + line).properties(height=260),
        f"Slices until the median pair has reached 90 % of its score: {found}",
        "Lines of the share of the score held by the n largest slices, one line and one band (the "
        "middle half of all pairs) per basis.",
    )
