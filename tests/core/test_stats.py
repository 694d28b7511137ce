"""One bootstrap for all chapters: it is the sum of its draws, and its intervals are honest."""

import numpy as np
import pandas as pd
import pytest

from sparse_signals.core.stats import (
    bootstrap,
    bounds,
    false_discovery,
    group_bootstrap,
    resample,
    sign_flip,
)


def interval(table, clusters, **options):
    found = bootstrap(table, clusters, **options).set_index("measure")
    return found["value"], found["low"], found["high"]


@pytest.fixture
def rows():
    """300 rows of 40 prompts, with a weight each."""
    rng = np.random.default_rng(3)
    table = pd.DataFrame(rng.normal(size=(300, 2)), columns=["a", "b"])
    return table, rng.integers(40, size=300), rng.uniform(1, 3, 300)


# --- draws ---------------------------------------------------------------------------------------


def test_every_draw_has_as_many_clusters_as_the_data():
    times = resample(30, draws=50, seed=1)
    assert times.shape == (51, 30) and (times[0] == 1).all()
    assert (times.sum(1) == 30).all() and (times[1:] == 0).any()
    assert np.array_equal(times, resample(30, 50, 1))
    assert not np.array_equal(times, resample(30, 50, 2))


# --- the quantile rule ---------------------------------------------------------------------------


def test_bounds_are_the_samples_nearest_the_quantiles():
    samples = np.random.default_rng(0).permutation(1000.0 * np.arange(1000))
    assert bounds(samples) == (25_000, 974_000)
    both = bounds(np.stack([samples, -samples]), axis=1)
    assert np.array_equal(both, [[25_000, -974_000], [974_000, -25_000]])


def test_bounds_of_one_row_of_samples_are_numbers():
    assert all(isinstance(x, float) for x in bounds(range(9)))  # rounded by `fmt`, unlike arrays


def test_bounds_cut_both_ends_alike():
    for size in range(1, 200):
        low, high = bounds(np.arange(size))
        assert low == size - 1 - high


def test_infinite_samples_count_and_nan_is_left_out():
    samples = np.arange(200.0)
    samples[180:] = np.inf
    low, high = bounds(samples)
    assert low == 5 and high == np.inf
    samples[180:] = np.nan
    assert bounds(samples) == bounds(samples[:180])
    samples[:20] = -np.inf
    assert bounds(samples)[0] == -np.inf
    assert np.isnan(bounds(np.full(9, np.nan))).all()


# --- the bootstrap -------------------------------------------------------------------------------


def test_bootstrap_covers_the_mean_and_resamples_prompts():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(50), 20)
    table = pd.DataFrame({"a": rng.normal(size=50)[prompts], "b": 2.0})
    by_prompt = bootstrap(table, prompts).set_index("measure")
    by_row = bootstrap(table, np.arange(1000)).set_index("measure")
    assert by_prompt.loc["a", "value"] == pytest.approx(table["a"].mean())
    assert by_prompt.loc["a", "low"] < by_prompt.loc["a", "value"] < by_prompt.loc["a", "high"]
    width = by_prompt["high"] - by_prompt["low"]
    assert width["a"] > 3 * (by_row["high"] - by_row["low"])["a"] and width["b"] == 0


def test_it_is_what_a_loop_over_draws_gives(rows):
    """Every draw with its rows written out, prompt after prompt."""
    table, prompts, weights = rows
    samples = []
    for times in resample(40, draws=200, seed=5)[1:].astype(int):
        picked = np.concatenate(
            [np.flatnonzero(prompts == p) for p in range(40) for _ in range(times[p])]
        )
        samples.append(table.to_numpy()[picked].sum(0) / weights[picked].sum())
    value, low, high = interval(table, prompts, weights=weights, draws=200, seed=5)
    np.testing.assert_allclose(value, table.sum() / weights.sum())
    np.testing.assert_allclose([low, high], bounds(samples))


def test_weights_of_one_give_the_mean(rows):
    table, prompts, _ = rows
    mean = bootstrap(table, prompts)
    pd.testing.assert_frame_equal(mean, bootstrap(table, prompts, weights=np.ones(300)))
    pd.testing.assert_frame_equal(mean, bootstrap(table, prompts, weights=np.ones((300, 2))))
    np.testing.assert_allclose(mean["value"], table.mean())


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    table, weights = pd.DataFrame({"a": [1.0, 9.0]}), [1.0, 3.0]
    found = bootstrap(table, [0, 1], weights).iloc[0]
    assert found["value"] == 10 / 4 and (found["low"], found["high"]) == (1, 3)


def test_a_table_of_weights_has_one_for_every_entry(rows):
    table, prompts, weights = rows
    both = bootstrap(table, prompts, np.column_stack([weights, np.ones(300)]))
    pd.testing.assert_series_equal(both.loc[0], bootstrap(table, prompts, weights).loc[0])
    pd.testing.assert_series_equal(both.loc[1], bootstrap(table, prompts).loc[1])


def test_clusters_are_names_and_their_order_does_not_matter(rows):
    table, prompts, weights = rows
    found = bootstrap(table, prompts, weights)
    names = np.array([f"prompt {p:02}" for p in prompts])
    order = np.random.default_rng(0).permutation(300)
    other = bootstrap(table.iloc[order], names[order], weights[order])
    pd.testing.assert_frame_equal(found, other)


def test_the_same_seed_gives_the_same_interval(rows):
    table, prompts, _ = rows
    pd.testing.assert_frame_equal(bootstrap(table, prompts), bootstrap(table, prompts))
    assert (bootstrap(table, prompts)["low"] != bootstrap(table, prompts, seed=1)["low"]).all()


def test_missing_entries_are_left_out(rows):
    table, prompts, _ = rows
    holes = table.copy()
    holes.loc[::3, "a"] = np.nan
    found = bootstrap(holes, prompts).set_index("measure")
    assert found.loc["a", "value"] == pytest.approx(holes["a"].mean())
    whole = bootstrap(table, prompts).set_index("measure")
    pd.testing.assert_series_equal(found.loc["b"], whole.loc["b"])
    nothing = bootstrap(holes.assign(a=np.nan), prompts).set_index("measure")
    assert nothing.loc["a"].isna().all() and nothing.loc["b"].notna().all()


def test_draws_without_weight_are_left_out():
    """Only one of two prompts has a value: half of the draws miss it or have nothing else."""
    found = bootstrap(pd.DataFrame({"a": [5.0, np.nan]}), [0, 1]).iloc[0]
    assert found["value"] == found["low"] == found["high"] == 5


def test_templates_are_wider_than_prompts_where_prompts_of_one_are_alike():
    rng = np.random.default_rng(2)
    template = np.repeat(np.arange(15), 40)
    table = pd.DataFrame({"alike": rng.normal(size=15)[template], "apart": rng.normal(size=600)})
    table["alike"] += rng.normal(size=600)
    widths = [
        high - low for _, low, high in (interval(table, x) for x in (np.arange(600), template))
    ]
    assert widths[1]["alike"] > 2.5 * widths[0]["alike"]
    assert widths[1]["apart"] == pytest.approx(widths[0]["apart"], rel=0.5)


@pytest.mark.parametrize("ratio", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(ratio):
    """1,500 experiments of 80 prompts with 1 to 5 correlated rows each; the truth is 2."""
    rng = np.random.default_rng(7)
    prompts = np.repeat(np.arange(80), rng.integers(1, 6, 80))
    shape = (len(prompts), 1500)
    table = 2 + rng.normal(size=(80, 1500))[prompts] + rng.normal(size=shape)
    weights = rng.uniform(0.5, 1.5, shape) if ratio else np.ones(shape)
    _, low, high = interval(pd.DataFrame(table * weights), prompts, weights=weights)
    assert 0.925 < ((low <= 2) & (high >= 2)).mean() < 0.96


# --- many groups ---------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [2**21, 1, 101 * 3])
def test_groups_are_bootstraps_of_a_wide_table(rows, entries, monkeypatch):
    """Whatever the number of groups at once; a group need not have all clusters, or any."""
    monkeypatch.setattr("sparse_signals.core.stats.ENTRIES", entries)
    table, prompts, weights = rows
    values, group = table["a"].to_numpy(), np.random.default_rng(1).permutation(300) % 7
    times = resample(40, draws=100)
    found = group_bootstrap(values, group, prompts, times, 8, weights)
    here = group[:, None] == np.arange(8)
    wide = pd.DataFrame(np.where(here, values[:, None], np.nan))
    expected = bootstrap(wide, prompts, weights, draws=100)
    np.testing.assert_allclose(found.T, expected[["value", "low", "high"]].to_numpy(float))
    assert np.isnan(found[:, 7]).all()
    sums = group_bootstrap(values, group, prompts, times, 8)
    np.testing.assert_allclose(sums[0], np.where(here, values[:, None], 0).sum(0))
    assert (sums[1] < sums[0])[:7].all() and (sums[0] < sums[2])[:7].all() and sums[0, 7] == 0


def test_no_rows_have_no_groups():
    none = np.zeros(0, dtype=int)
    assert group_bootstrap(none * 1.0, none, none, resample(5), 0, none * 1.0).shape == (3, 0)


def test_flipped_signs_give_the_exact_p():
    """Of the 2⁵ sign patterns of equal values, two have sums as large: p = 1/16."""
    values = np.ones((1, 5))
    assert sign_flip(values, draws=20_000)[0] == pytest.approx(1 / 16, abs=0.006)
    assert sign_flip(np.array([[1.0, -1.0, 2.0, -2.0]]))[0] == 1


def test_missing_clusters_do_not_count():
    values = np.array([[1.0, 1, 1, 1, 1, np.nan, np.nan]])
    assert sign_flip(values, draws=20_000)[0] == pytest.approx(1 / 16, abs=0.006)


def test_false_discoveries_are_those_of_benjamini_and_hochberg():
    """By hand: 5 tests, and the second-smallest p is carried by the third."""
    p = np.array([0.9, 0.01, 0.03, 0.027, 0.5])
    np.testing.assert_allclose(false_discovery(p), [0.9, 0.05, 0.05, 0.05, 0.625])


def test_few_of_many_true_nulls_are_discovered():
    p = np.random.default_rng(0).uniform(size=(200, 50))
    any_found = np.array([(false_discovery(row) <= 0.05).any() for row in p])
    assert 0.01 <= any_found.mean() <= 0.09
