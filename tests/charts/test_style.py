import json

import altair as alt
import numpy as np
import pandas as pd
import pytest
import vl_convert

from sparse_signals.charts import style as base


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"x": range(8), "y": rng.normal(size=8), "kind": list("abcdabcd")})


def chart_of(table, with_selection=True):
    marks = alt.Chart(table).mark_point()
    chart = marks.encode(x="x:Q", y="y:Q", **base.colour_and_shape("kind:N", "kind"))
    if with_selection:
        pick = alt.selection_point(fields=["kind"])
        chart = (chart.add_params(pick) | chart.transform_filter(pick)).properties()
    return base.finish(chart, "What we found", "Points of four kinds")


def test_finish_wraps_long_titles(table):
    chart = base.finish(chart_of(table, False), "word " * 40, "Points", subtitle="note " * 40)
    title = chart.to_dict()["title"]
    assert len(title["text"]) > 1 and max(map(len, title["text"])) <= 70
    assert len(title["subtitle"]) > 1


@pytest.mark.parametrize(("title", "description"), [("", "x"), ("x", " ")])
def test_finish_refuses_charts_without_words(table, title, description):
    with pytest.raises(ValueError, match="title"):
        base.finish(alt.Chart(table).mark_point(), title, description)


def test_diverging_scale_is_centred_at_zero():
    assert base.diverging([-1.0, 3.0, 0.5]).domain == [-3.0, 3.0]
    assert base.diverging([0.0]).domain == [-1, 1]


def numbers(chart):
    """All values of y, in all data of a chart."""
    sets = base.specification(chart)["datasets"].values()
    return [row["y"] for rows in sets for row in rows if "y" in row]


def test_every_part_of_a_chart_is_rounded_as_it_asks():
    table = pd.DataFrame({"y": [1.23456, -1e-15, np.nan]})
    marks = [alt.Chart(table.assign(n=n)).mark_point().encode(y="y:Q") for n in range(4)]
    rows = alt.Chart(table.assign(n=4)).mark_point().encode(y="y:Q").facet("n:N")
    chart = alt.vconcat(alt.hconcat(marks[0] + marks[1], marks[2]), marks[3], rows)
    assert numbers(base.finish(chart, "Title", "Words")) == [1.235, 0.0, None] * 5
    assert numbers(base.finish(chart, "Title", "Words", digits=2)) == [1.2, 0.0, None] * 5
    assert "digits" not in table.attrs


def test_data_that_a_chart_looks_up_are_rounded():
    table = pd.DataFrame({"key": ["a"], "y": [2 / 3]})
    looked = alt.LookupData(table, "key", ["y"])
    chart = alt.Chart(table[["key"]]).mark_point().transform_lookup("key", looked).encode(y="y:Q")
    assert numbers(chart) == [0.6667]


def test_menus_give_values_names_and_need_a_choice():
    def made(*args, **options):
        return base.menu("m", *args, **options).param.to_dict()

    pick = made({"a": "first", "b": "second"}, "Measure", start="b")
    assert pick["value"] == "b"
    assert pick["bind"] == {"input": "select", "name": "Measure ", "options": ["a", "b"],
                            "labels": ["first", "second"]}  # fmt: skip
    assert made(["a", "b"], radio=True)["bind"]["input"] == "radio"
    assert made(["a"]) == {"name": "m", "value": "a"}


def test_spec_does_not_depend_on_charts_drawn_before(table):
    first = base.specification(chart_of(table))
    chart_of(table)
    assert base.specification(chart_of(table)) == first
    assert [p["name"] for p in first["params"]] == ["param_1"]
    assert list(first["datasets"]) == ["table_1"]


def test_spec_does_not_depend_on_the_last_bits_of_the_data(table):
    noisy = table.assign(y=table["y"] * (1 + 1e-15))
    assert not noisy.equals(table)
    specs = [base.specification(chart_of(data)) for data in (table, noisy)]
    assert json.dumps(specs[0]) == json.dumps(specs[1])


def test_output_has_the_spec_and_the_description(table):
    base.use_book_renderer()
    bundle, metadata = chart_of(table)._repr_mimebundle_()
    assert set(bundle) == {base.MIME, "text/plain"}
    assert bundle["text/plain"] == "Points of four kinds"
    assert metadata[base.MIME]["embed_options"]["renderer"] == "svg"
    assert bundle[base.MIME] == base.specification(chart_of(table))


@pytest.mark.parametrize("version", ["5.8", "6.4"])
def test_jupyterlab_and_the_site_draw_the_same_spec(table, version):
    spec = base.specification(chart_of(table))
    svg = vl_convert.vegalite_to_svg(spec, vl_version=version)
    assert svg.count('aria-roledescription="point"') >= 16
    assert "currentColor" in svg and "What we found" in svg


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("colour", [*base.COLOURS, base.HIGHLIGHT])
@pytest.mark.parametrize("background", ["#FFFFFF", "#121212"])
def test_colours_stand_out_on_light_and_dark_pages(colour, background):
    dark, light = sorted([luminance(colour), luminance(background)])
    assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11


def test_spec_does_not_depend_on_the_last_bits_of_a_scale(table):
    def spec(limit):
        scale = alt.Scale(domain=[-limit, limit])
        return base.specification(alt.Chart(table).mark_bar().encode(alt.X("x:Q", scale=scale)))

    assert spec(6.025038672963486) == spec(6.025038672963485)
