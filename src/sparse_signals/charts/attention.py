"""Charts of chapter 1: where the heads of a model look."""

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.style import (
    COLOURS,
    HIGHLIGHT,
    TOKEN_STEP,
    Layered,
    colour_and_shape,
    distinct,
    finish,
    menu,
    tooltips,
)
from sparse_signals.core.numbers import counted, percent

NAMED_ROLES = ("IO", "S1", "S2", "third", "end")
BLUE, ORANGE = COLOURS[:2]
CELL = {"width": {"band": 1}, "height": {"band": 1}, "stroke": "currentColor"}
SHADE = alt.Scale(domain=[0, 1], range=[0.04, 1])  # opacity: low is faint on any background


def head_names(table: pd.DataFrame) -> pd.Series:
    """The book's names of heads, "layer.head"."""
    return table["layer"].astype(str) + "." + table["head"].astype(str)


def token_labels(roles: pd.DataFrame) -> pd.DataFrame:
    """One row per token: prompt, pos, label. "7 Mary (IO)" has its place, its text and its roles.

    `roles` is the table of `prompts.role_table`: prompt, pos, token, role, a row for each role.
    """
    kept = roles.assign(role=roles["role"].where(roles["role"].isin(NAMED_ROLES), ""))
    rows = kept.groupby(["prompt", "pos"], as_index=False).agg(
        token=("token", "first"), role=("role", lambda r: ", ".join(x for x in r if x))
    )
    role = rows["role"].map(lambda x: f" ({x})" if x else "")
    label = rows["pos"].astype(str) + " " + rows["token"].str.strip() + role
    return rows[["prompt", "pos"]].assign(label=label)


def attention_explorer(
    attention: pd.DataFrame, roles: pd.DataFrame, start: str
) -> alt.TopLevelMixin:
    """Every head on a few prompts: choose a head, a prompt and a destination token.

    `attention`: prompt, layer, head, dest, src, attention (all pairs). `roles`: the table of
    `prompts.role_table` for the same prompts. `start`: the head shown first, like "2.3".
    """
    texts, attention = _visible_pairs(attention, roles)
    heads = _looks_at(attention, roles, "end", "IO")
    head = _choice("name", list(heads["name"]), start, "Head ")
    answers = roles[roles["role"] == "IO"].sort_values("prompt")["token"].str.strip()
    pairs = zip(texts["prompt"], answers, strict=True)
    prompt = menu("prompt", {int(p): f"{p}: {word}" for p, word in pairs}, "Prompt")
    far = alt.binding_range(
        min=0, max=int(texts["last"].max()), step=1, name="Destination: tokens from the end "
    )
    back = alt.selection_point(
        name="back",
        fields=["back"],
        bind=far,
        value=[{"back": 0}],
        on="rect:click",
        empty=False,
        clear=False,
    )
    grid = _head_grid(heads, head, "mean attention from end to IO")
    unpacked = _unpack(_packed(attention), texts, head)
    chart = alt.vconcat(grid, _matrix(unpacked, back), _row(unpacked, back), spacing=14)
    chart = chart.resolve_scale(fillOpacity="independent").add_params(prompt)
    share = percent(heads.set_index("name")["mean"][start])
    title = (
        f"From the last word, head {start} gives the indirect object {share} of its attention, "
        "on average over these prompts"
    )
    description = (
        f"Three linked views of {len(heads)} heads on {len(texts)} prompts: a grid of layers and "
        "heads, the attention matrix of the chosen head, and the attention from the chosen "
        f"destination over the tokens of the prompt. {title}."
    )
    return finish(chart, title, description)


def _visible_pairs(
    attention: pd.DataFrame, roles: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The labels of each prompt in one string, and the pairs without padding and future tokens."""
    texts = token_labels(roles).groupby("prompt", as_index=False).agg(
        labels=("label", "\t".join), last=("pos", "max")
    )  # fmt: skip
    last = attention["prompt"].map(texts.set_index("prompt")["last"])
    real = attention["src"].le(attention["dest"]) & attention["dest"].le(last)
    return texts, attention[real]


def _looks_at(attention: pd.DataFrame, roles: pd.DataFrame, dest: str, src: str) -> pd.DataFrame:
    place = roles.pivot_table(index="prompt", columns="role", values="pos", aggfunc="first")
    pairs = place[[dest, src]].reset_index().set_axis(["prompt", "dest", "src"], axis=1)
    found = attention.merge(pairs.astype(int), on=["prompt", "dest", "src"])
    mean = found.groupby(["layer", "head"], as_index=False).agg(mean=("attention", "mean"))
    return mean.assign(name=head_names(mean))


def _packed(attention: pd.DataFrame) -> pd.DataFrame:
    ordered = attention.sort_values(["layer", "head", "prompt", "dest", "src"])
    weights = (ordered["attention"] * 100).round().astype(int).astype(str)
    table = ordered[["layer", "head", "prompt"]].assign(name=head_names(ordered), packed=weights)
    groups = table.groupby(["layer", "head", "prompt", "name"], as_index=False)
    return groups[["packed"]].agg(" ".join)[["name", "prompt", "packed"]]


def _choice(field: str, options: list, value: object, label: str) -> alt.Parameter:
    """A selection of one value, by a click on a mark or by a list that the keyboard reaches."""
    return alt.selection_point(
        name=f"chosen_{field}", fields=[field], on="rect:click", empty=False, clear=False,
        value=[{field: value}],  # pyright: ignore[reportArgumentType]
        bind={field: alt.binding_select(options=options, name=label)},  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _head_grid(heads: pd.DataFrame, head: alt.Parameter, legend: str) -> Layered:
    """Layers by heads: colour and size of a dot say the same, a frame marks the chosen head."""
    many = heads["layer"].nunique() > 12
    table = heads.assign(size=heads["mean"], back=0)  # another head: back to the last token
    base = alt.Chart(table, width=alt.Step(26), height=alt.Step(13 if many else 24))
    base = base.encode(
        alt.X("head:O").title("head").axis(labelAngle=0).scale(padding=0),
        alt.Y("layer:O").title("layer").scale(padding=0),
        tooltip=["name:N", alt.Tooltip("mean:Q", format=".1%", title=legend)],
    )
    area = alt.Scale(domain=[0, 1], range=[0, 120 if many else 320])
    dots = base.mark_circle(opacity=1, color=BLUE).encode(
        alt.Size("size:Q").scale(area).legend(None),
        alt.FillOpacity("mean:Q").scale(SHADE).title("attention").legend(format="%", tickCount=4),
    )
    frame = base.mark_rect(**CELL, fill="transparent").encode(
        strokeWidth=alt.condition(head, alt.value(2), alt.value(0.2))
    )
    return alt.layer(dots, frame.add_params(head))


def _unpack(packed: pd.DataFrame, texts: pd.DataFrame, head: alt.Parameter) -> alt.Chart:
    return (
        alt.Chart(packed)
        .transform_filter(head)
        .transform_filter("datum.prompt == prompt")
        .transform_lookup("prompt", alt.LookupData(texts, "prompt", ["labels"]))
        .transform_calculate(weight="split(datum.packed, ' ')", words="split(datum.labels, '\\t')")
        .transform_flatten(["weight"])
        .transform_window(n="row_number()")
        .transform_calculate(attention="toNumber(datum.weight) / 100")
        .transform_calculate(i="floor((sqrt(8 * datum.n - 7) - 1) / 2)")
        .transform_calculate(j="datum.n - 1 - datum.i * (datum.i + 1) / 2")
        .transform_calculate(destination="datum.words[datum.i]", source="datum.words[datum.j]")
        .transform_calculate(back="length(datum.words) - 1 - datum.i")
    )


def _matrix(unpacked: alt.Chart, back: alt.Parameter) -> alt.Chart:
    return (
        unpacked.mark_rect(**CELL, color=BLUE)
        .encode(
            alt.X("source:N").sort(field="j", op="min").title("source").axis(labelAngle=-60),
            alt.Y("destination:N").sort(field="i", op="min").title("destination"),
            alt.FillOpacity("attention:Q").scale(SHADE).legend(None),
            strokeWidth=alt.condition(back, alt.value(1), alt.value(0)),
            tooltip=["destination:N", "source:N", alt.Tooltip("attention:Q", format=".1%")],
        )
        .properties(width=alt.Step(TOKEN_STEP), height=alt.Step(TOKEN_STEP))
        .add_params(back)
    )


def _row(unpacked: alt.Chart, back: alt.Parameter) -> Layered:
    bars = unpacked.transform_filter(back).encode(
        alt.X("attention:Q").scale(domain=[0, 1.1]).axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
        .title("attention from the chosen destination"),
        alt.Y("source:N").sort(field="j", op="min").title("source"),
    )  # fmt: skip
    values = bars.transform_filter("datum.attention >= 0.005").mark_text(align="left", dx=3)
    values = values.encode(text=alt.Text("attention:Q", format=".0%"))
    shown = bars.mark_bar(color=ORANGE).encode(tooltip=["destination:N", "source:N"])
    return alt.layer(shown, values).properties(width=260, height=alt.Step(TOKEN_STEP))


def role_attention(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Mean attention between two roles in every head, linked to the single prompts of a head.

    `table`: pair ("end → IO"), layer, head, prompt, order, attention.
    """
    means = table.groupby(["pair", "layer", "head"], as_index=False, sort=False).agg(
        mean=("attention", "mean")
    )
    means = means.assign(name=head_names(means))
    pairs = distinct(table["pair"])
    top = means.loc[means.groupby("pair", sort=False)["mean"].idxmax()].set_index("pair")
    pair = menu("pair", pairs, "Pair of roles")
    head = _choice("name", distinct(means["name"]), top["name"][pairs[0]], "Head ")
    grid = _head_grid(means, head, "mean attention").transform_filter("datum.pair === pair")
    strip = _strip(table, head)
    found = "; ".join(f"{p}: {top['name'][p]} ({percent(top['mean'][p])})" for p in pairs)
    title = f"The heads that look hardest, {found}"
    description = (
        "A grid of layers and heads, coloured by mean attention between two token roles, and below "
        f"it the attention of the chosen head on each prompt, by order of the names. {title}."
    )
    chart = alt.vconcat(grid, strip, spacing=14).add_params(pair)
    chart = chart.resolve_scale(yOffset="independent")  # or it would squeeze the grid's rows
    return finish(chart, title, description)


def _strip(table: pd.DataFrame, head: alt.Parameter) -> alt.Chart:
    whole = (100 * table["attention"]).round().astype(int)
    packed = (
        table.assign(name=head_names(table), value=whole.astype(str))
        .groupby(["pair", "name", "order"], as_index=False)["value"].agg(" ".join)
    )  # fmt: skip
    return (
        alt.Chart(packed, width=300, height=alt.Step(46))
        .transform_filter("datum.pair === pair")
        .transform_filter(head)
        .transform_calculate(value="split(datum.value, ' ')")
        .transform_flatten(["value"])
        .transform_window(n="row_number()", groupby=["order"])
        .transform_calculate(attention="toNumber(datum.value) / 100", jitter="(datum.n * 7) % 11")
        .mark_point(opacity=0.7)
        .encode(
            alt.X("attention:Q").scale(domain=[0, 1]).axis(format="%")
            .title("attention of the chosen head, one point a prompt"),
            alt.Y("order:N").title("order of names"),
            yOffset=alt.YOffset("jitter:Q"),
            tooltip=["order:N", alt.Tooltip("attention:Q", format=".0%")],
            color=alt.Color("order:N").legend(None),
            shape=alt.Shape("order:N").legend(None),
        )
    )  # fmt: skip


def softmax_bars(row: pd.DataFrame, head: str) -> alt.TopLevelMixin:
    """Scores and attention of one destination token; a slider adds to the score of one source.

    `row`: label, score, one row per visible source token, in reading order.
    """
    best, second = row["score"].nlargest(2)
    weight = np.exp(row["score"] - best)
    favourite = row["label"].iloc[row["score"].argmax()]
    token = menu("token", list(row["label"]), "Token", start=favourite)
    slider = alt.binding_range(min=-6, max=6, step=0.5, name="Add to its score ")
    extra = alt.param(name="extra", value=0, bind=slider)
    place = alt.Y("label:N").sort(None).title("source token")
    bars = (
        alt.Chart(row.assign(order=range(len(row))), width=150, height=alt.Step(TOKEN_STEP + 3))
        .transform_calculate(changed="datum.score + (datum.label === token ? extra : 0)")
        .transform_calculate(e="exp(datum.changed)")
        .transform_joinaggregate(all="sum(e)")
        .transform_calculate(attention="datum.e / datum.all")
    )
    tips = tooltips("score", "changed", "attention")
    chosen = alt.condition("datum.label === token", alt.value(1), alt.value(0.65))
    score = bars.mark_bar(color=BLUE).encode(
        alt.X("changed:Q").title("score (softmax units)"), place,
        opacity=chosen, tooltip=["label:N", *tips],
    )  # fmt: skip
    attention = bars.mark_bar(color=ORANGE).encode(
        alt.X("attention:Q").title("attention").axis(format="%").scale(domain=[0, 1]),
        place.axis(None), opacity=chosen, tooltip=["label:N", *tips],
    )  # fmt: skip
    title = (
        f"The model's own scores: head {head} gives “{favourite}” {percent(1 / weight.sum())} of "
        f"its attention, with a score {best - second:.1f} above the next"
    )
    description = (
        f"Two bar charts over the {len(row)} tokens that the last token sees, for head {head}: "
        f"scores on the left, attention on the right. {title}. A slider changes one score."
    )
    chart = alt.hconcat(score, attention, spacing=12).add_params(token, extra)
    return finish(chart, title, description, subtitle="The slider asks what if one were another.")


def log_odds(points: pd.DataFrame) -> alt.TopLevelMixin:
    """Odds of attention between two sources of one row against the difference of their scores.

    `points`: layer, head, difference (a_ij − a_ij'), odds (A_ij / A_ij').
    """
    off = np.abs(np.log(points["odds"]) - points["difference"]).max()
    where = "on the line" if off < 1e-3 else f"within {off:.2g} of the line"
    title = (
        f"All {len(points):,} pairs lie {where}: one more unit of score multiplies the odds "
        "by e = 2.718…"
    )
    limit = float(np.ceil(np.abs(points["difference"]).max()))
    line = pd.DataFrame({"difference": [-limit, limit], "odds": np.exp([-limit, limit])})
    x = alt.X("difference:Q").title("difference of two scores, a(i,j) − a(i,j′)")
    y = alt.Y("odds:Q").scale(type="log").title("odds of attention, A(i,j) / A(i,j′)")
    y = y.axis(format="~g", tickCount=7)
    tips = ["name:N", *tooltips("difference", "odds", form=".3g")]
    points = points.assign(name=head_names(points))[["name", "difference", "odds"]]
    dots = alt.Chart(points).mark_point(size=28, opacity=0.7, color=BLUE)
    rule = alt.Chart(line).mark_line(strokeDash=[5, 4], color=ORANGE)
    layers = alt.layer(rule.encode(x, y), dots.encode(x, y, tooltip=tips))
    description = (
        "Scatter chart. Each point is two source tokens seen by one destination in one head: the "
        f"difference of their scores and the odds of their attention. {title}."
    )
    return finish(layers.properties(width=380, height=260), title, description)


def part_shares(table: pd.DataFrame) -> alt.TopLevelMixin:
    """How much of the variation of the scores is due to each part of Ω, in every head.

    `table`: scope ("within a softmax row" or another choice), part, layer, head, share.
    """
    table = table.assign(name=head_names(table))
    scopes, parts = distinct(table["scope"]), distinct(table["part"])
    chosen = alt.selection_point(name="marked", fields=["name"], on="click", empty=False)
    dots = (
        _by_layer(alt.Chart(table, width=380, height=70), table)
        .transform_filter("datum.scope === scope")
        .mark_point(color=BLUE, filled=True)
        .encode(
            alt.Y("share:Q").title("share").axis(format="%", tickCount=4),
            size=alt.condition(chosen, alt.value(150), alt.value(28)),
            shape=alt.condition(chosen, alt.value("diamond"), alt.value("circle")),
            tooltip=["name:N", "part:N", alt.Tooltip("share:Q", format=".1%")],
        )
        .add_params(chosen)
    )
    row = alt.Row("part:N", sort=parts).title(None)
    row = row.header(labelOrient="top", labelAnchor="start", labelFontWeight="bold")
    title = _parts_title(table[table["scope"] == scopes[0]], parts, scopes[0])
    description = (
        "Four dot charts, one for each part of the score, with one dot for each head: the share of "
        f"the variation of the head's scores that is due to the part. {title}."
    )
    return finish(
        dots.facet(row=row, spacing=6).add_params(menu("scope", scopes, "Variation")),
        title,
        description,
    )


def _parts_title(table: pd.DataFrame, parts: list[str], scope: str) -> str:
    median = table.groupby("part")["share"].median()
    size = table.groupby("part")["share"].apply(lambda share: share.abs().max())
    live = [part for part in parts if size[part] > 1e-9]
    found = ", ".join(f"{part} {percent(median[part])}" for part in live)
    *others, last = [part for part in parts if part not in live] or [""]
    dead = f"{', '.join(others)} and {last}" if others else last
    nothing = f"; {dead} exactly nothing" if dead else ""
    return f"What makes scores vary {scope} (median head): {found}{nothing}"


def pair_share(table: pd.DataFrame, verdicts: pd.DataFrame, head: str) -> alt.TopLevelMixin:
    """What an additive score leaves unexplained in every head, beside its controls.

    `table`: kind, name, share, low, high. `verdicts`: half ("more", "less" or "undecided"), of the
    first kind, the one that is claimed. `head`: the one that is labelled.
    """
    kinds = distinct(table["kind"])
    rank = table.groupby("kind")["share"].rank(method="first", ascending=False)
    table = table.assign(rank=rank, label=np.where(table["name"] == head, f"head {head}", ""))
    base = alt.Chart(table, width=380, height=280).encode(
        alt.X("rank:Q").title("heads, each curve in its own order").scale(nice=False, zero=False)
    )
    legend = alt.Legend(orient="bottom", columns=1)
    colour = alt.Color("kind:N").scale(domain=kinds).title(None)
    y = alt.Y("share:Q").title("share of the variation within a row").axis(format="%")
    band = base.mark_area(opacity=0.2).encode(
        alt.Y("low:Q").title("share of the variation within a row"), alt.Y2("high:Q"),
        colour.legend(None),
    )  # fmt: skip
    dots = base.mark_point(filled=True, size=26).encode(
        y, colour.legend(legend),
        alt.Shape("kind:N").scale(domain=kinds).title(None).legend(legend),
        tooltip=["name:N", "kind:N", *tooltips("share", "low", "high", form=".1%")],
    )  # fmt: skip
    mine = alt.Chart(table[(table["name"] == head) & (table["kind"] == kinds[0])])
    mine = mine.encode(alt.X("rank:Q"), y)
    ring = mine.mark_point(size=140, color=HIGHLIGHT, strokeWidth=2)
    label = mine.mark_text(dy=-14, align="left").encode(text="label:N")
    half = alt.Chart(pd.DataFrame({"share": [0.5]})).mark_rule(strokeDash=[2, 3]).encode(y)
    count = verdicts["half"].value_counts()
    medians = table.groupby("kind", sort=False)["share"].median()
    found = "; ".join(f"{kind}: {percent(share)}" for kind, share in medians.items())
    title = (
        "The pair carries clearly more than half of the variation in "
        f"{counted(int(count.get('more', 0)), len(verdicts), 'heads')}, clearly less in "
        f"{counted(int(count.get('less', 0)), len(verdicts), 'heads')} (medians: {found})"
    )
    description = (
        "Heads in order of the share of the variation of scores within a softmax row that no "
        f"additive score explains, with 95 % bands, and of the same for two controls. {title}."
    )
    chart = alt.layer(half, band, dots, ring, label)
    chart = chart.resolve_scale(color="independent", shape="independent")
    return finish(chart, title, description)


def giver_effects(heads: pd.DataFrame, head: str, labelled: int = 3) -> alt.TopLevelMixin:
    """What the repetition of a name, and what its place, does to the attention of every head.

    `heads`: name, repetition, place, moves ("repetition", "place", "both" or "neither"). `head` is
    labelled, as are the `labelled` heads with the largest effects of each kind.
    """
    extreme = {head}
    for effect in ("repetition", "place"):
        extreme |= set(heads["name"][heads[effect].abs().nlargest(labelled).index])
    table = heads.assign(label=heads["name"].where(heads["name"].isin(extreme), ""))
    kinds = [
        kind for kind in ("repetition", "both", "place", "neither") if kind in set(table.moves)
    ]
    base = alt.Chart(
        table[["name", "repetition", "place", "moves", "label"]], width=380, height=300
    )
    base = base.encode(
        alt.X("place:Q").title("place: attention to the first minus the second name")
        .axis(format="%", tickCount=6),
        alt.Y("repetition:Q").title("repetition: to the name not repeated, minus the other")
        .axis(format="%"),
    )  # fmt: skip
    legend = alt.Legend(orient="bottom", columns=2)
    styles = {
        key: channel.scale(domain=kinds).legend(legend)
        for key, channel in colour_and_shape("moves:N", "clearly moved by").items()
    }
    tips = ["name:N", "moves:N", *tooltips("repetition", "place", form=".1%")]
    dots = base.mark_point(filled=True, size=50, opacity=0.8).encode(**styles, tooltip=tips)
    text = base.mark_text(dx=7, align="left").encode(text="label:N")
    zero = pd.DataFrame({"x": [0.0]})
    rules = [alt.Chart(zero).mark_rule(strokeDash=[2, 3], opacity=0.5).encode(x="x:Q"),
             alt.Chart(zero).mark_rule(strokeDash=[2, 3], opacity=0.5).encode(y="x:Q")]  # fmt: skip
    moved = {
        effect: heads["moves"].isin([effect, "both"]).sum() for effect in ("repetition", "place")
    }
    by_name, by_place = (counted(int(count), len(heads), "heads") for count in moved.values())
    top = heads["name"].iloc[heads["repetition"].abs().argmax()]
    title = (
        f"Which name is repeated moves the attention of {by_name} (most: head {top}), which name "
        f"comes first that of {by_place}"
    )
    description = (
        "Scatter chart, one point a head. Upwards: how much more attention the last token gives to "
        "the name that is not repeated; to the right: to the name that comes first. Shapes and "
        f"colours say which of the two is clearly not zero. {title}."
    )
    return finish(alt.layer(*rules, dots, text), title, description)


def _by_layer(chart: alt.Chart, table: pd.DataFrame) -> alt.Chart:
    """Heads side by side within their layer."""
    angle = 0 if table["layer"].nunique() <= 12 else -60
    return chart.encode(
        alt.X("layer:O").title("layer (its heads side by side)").axis(labelAngle=angle),
        xOffset=alt.XOffset("head:O"),
    )
