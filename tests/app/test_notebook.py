import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_signals.app.notebook import (
    check,
    glue,
    html_table,
    open_chapter,
    published,
    show,
    start,
)


def test_show_rounds_escapes_and_keeps_named_indices():
    table = pd.DataFrame({"head": ["<9.9>"], "share": [0.123456]}).set_index("head")
    shown = show(table, caption="a < b")
    page = shown._repr_html_()
    assert "&lt;9.9&gt;" in page and '<td class="number">0.123</td>' in page
    assert "<caption>a &lt; b</caption>" in page and 'scope="col">head<' in page
    assert repr(shown).splitlines() == ["a < b", " head share", "<9.9> 0.123"]


def test_tables_carry_no_style_and_only_numbers_are_numbers():
    table = pd.DataFrame({"<a>": [1.5, np.nan], "b": [True, None], "c": ["<i>", "2"]}, index=[7, 7])
    page = html_table(table, caption="")
    assert page == html_table(table.copy())
    assert page.splitlines() == [
        (
            '<table><thead><tr><th scope="col">&lt;a&gt;</th><th scope="col">b</th>'
            '<th scope="col">c</th></tr></thead>'
        ),
        "<tbody>",
        '<tr><td class="number">1.50</td><td>True</td><td>&lt;i&gt;</td></tr>',
        '<tr><td class="number">–</td><td>None</td><td>2</td></tr>',
        "</tbody></table>",
    ]
    assert "<td" not in html_table(pd.DataFrame())


def test_show_hides_row_numbers():
    assert repr(show(pd.DataFrame({"a": [1, 2]}))).split() == ["a", "1", "2"]


def test_glue_keeps_the_rounded_text(monkeypatch):
    kept = {}
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: kept.update({name: value}))
    glue("ratio", 0.123456)
    glue("head", "9.9")
    assert kept == {"ratio": "0.123", "head": "9.9"}


def test_check_tells_right_from_wrong(capsys):
    check(torch.tensor(True), "yes", "no")
    check(1 == 2, "yes", "no")
    assert capsys.readouterr().out == "Right: yes\nNot yet: no\n"


def test_published_facts_name_their_source():
    assert "arXiv 2410.00340" in published()["about"]


@pytest.fixture
def stub_models(monkeypatch):
    """A models module that loads nothing and tells what it was asked for."""
    calls = []
    load = lambda *args, **kwargs: calls.append((args, kwargs)) or "model"  # noqa: E731
    monkeypatch.setitem(sys.modules, "sparse_signals.core.model", SimpleNamespace(load_model=load))
    for name in ("MODEL", "HF_HUB_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")
    yield calls
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)


def test_a_chapter_opens_on_its_model_in_float64(stub_models):
    assert open_chapter("01-attention-math", "gpt2-ioi") == "model"
    assert stub_models == [(("gpt2-ioi",), {"dtype": torch.float64})]
    assert torch.are_deterministic_algorithms_enabled()


def test_the_environment_names_another_model(stub_models, monkeypatch):
    monkeypatch.setenv("MODEL", "gpt2-small")
    open_chapter("01-attention-math", "gpt2-ioi")
    assert stub_models[0][0] == ("gpt2-small",)


def test_each_chapter_has_its_own_random_numbers(stub_models):
    draws = []
    for chapter in ("01-attention-math", "01-attention-math", "02-head-svd"):
        start(chapter)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] != draws[2]
