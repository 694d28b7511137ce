"""The scripts behind make: refreshing notebooks, building the site, fetching its assets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from transformers import AutoTokenizer

import build_book
import check
import processors
import random_gpt2_small
import refresh
import vendor_assets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def notebook(tmp_path):
    cells = [
        new_code_cell(
            "import altair as alt\nfrom sparse_signals.app.notebook import glue", id="one"
        ),
        new_code_cell(
            "print('hello')\nglue('x', 0.12345)\n1 + 1", id="two", metadata={"tags": ["a"]}
        ),
    ]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.mark.slow
def test_refresh_twice_gives_the_same_bytes(notebook):
    assert refresh.main([notebook]) == 0
    first = notebook.read_bytes()
    assert refresh.main([notebook]) == 0
    assert notebook.read_bytes() == first
    assert b'"hello\\n"' in first and b"0.123" in first and b"iopub" not in first


@pytest.mark.slow
def test_refresh_leaves_a_failing_notebook_as_it_was(notebook, capsys):
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(new_code_cell("1 / 0", id="three"))
    nbformat.write(content, notebook)
    before = notebook.read_bytes()
    assert refresh.main([notebook]) == 1
    assert notebook.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_that_hangs_on_the_processor_is_found(tmp_path, monkeypatch, capsys):
    cells = [
        new_code_cell("import os\nprint('the same')", id="one"),
        new_code_cell("os.environ.get('MKL_CBWR', 'fast')", id="two"),
    ]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    assert refresh.main([path]) == 0
    monkeypatch.setattr(processors, "SETTINGS", {"own": {}, "MKL": {"MKL_CBWR": "COMPATIBLE"}})
    capsys.readouterr()
    assert processors.main([path]) == 1
    said = capsys.readouterr().out
    assert re.search(r"own +2 cells +0 differ", said) and re.search(r"MKL +2 cells +1 differ", said)
    assert said.count("cell two") == 1 and "-'fast'" in said and "+'COMPATIBLE'" in said


def test_outputs_of_every_kind_are_compared():
    def cell(**output):
        return {"id": "one", "cell_type": "code", "outputs": [output]}

    def lines(old, new):
        sides = [SimpleNamespace(cells=[side]) for side in (old, new)]
        return [line for _, more in processors.differences(*sides) for line in more]

    chart = cell(data={"application/vnd.vegalite.v6+json": {"mark": "bar", "data": [1, 2]}})
    other = cell(data={"application/vnd.vegalite.v6+json": {"mark": "bar", "data": [1, 3]}})
    assert lines(chart, chart) == []
    assert {"-  2", "+  3"} < set(lines(chart, other))
    printed = cell(name="stdout", text="0.1\n0.2")
    assert lines(printed, cell(name="stdout", text="0.1\n0.3"))[-2:] == ["-0.2", "+0.3"]
    assert lines(printed, cell(ename="ValueError", evalue="no"))[0] == "(error)"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A book of two editions with a good old site; jupyter-book is a stand-in that may fail."""
    chapter = new_notebook(cells=[new_code_cell('m = open_chapter("01-x", "a")', id="one")])
    for path in ("book/01-x.ipynb", "editions/b/01-x.ipynb"):
        (tmp_path / path).parent.mkdir(parents=True)
        nbformat.write(chapter, tmp_path / path)
    for path in ("_config.yml", "_toc.yml", build_book.CARD):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    site = tmp_path / "_build" / "html"
    site.mkdir(parents=True)
    (site / "index.html").write_text("old")
    for module, name in ((build_book, "ROOT"), (refresh, "ROOT")):
        monkeypatch.setattr(module, name, tmp_path)
    monkeypatch.setattr(build_book, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(build_book, "SITE", site)
    monkeypatch.setattr(refresh, "BOOK", tmp_path / "book")
    monkeypatch.setattr(refresh, "EDITIONS", tmp_path / "editions")
    monkeypatch.delenv("MODEL", raising=False)

    def behave(error=None):
        def run(command, **_):
            source, html = command[2], command[4] / "_build" / "html"
            model = "a" if source == tmp_path else "b"
            for name in ("index.html", "book/01-x.html"):
                (html / name).parent.mkdir(parents=True, exist_ok=True)
                (html / name).write_text(f'{model} <a href="../_sources/book/01-x.ipynb">')
            for name in ("_sources/book/01-x.ipynb", f"_images/{model}.png"):
                (html / name).parent.mkdir(parents=True, exist_ok=True)
                (html / name).write_text(model)
            if error:
                raise error

        monkeypatch.setattr(subprocess, "run", run)
        return site / "index.html"

    return behave


def test_a_good_build_replaces_the_site(house, capsys):
    page = house()
    assert build_book.main() == 0
    assert page.read_text().startswith("a ")
    assert "make serve" in capsys.readouterr().out
    assert [path.name for path in page.parents[1].iterdir()] == ["html"]


def test_pages_of_other_editions_stand_beside_their_chapters(house):
    site = house().parent
    assert build_book.main() == 0
    pages = {path.name: path.read_text()[0] for path in (site / "book").iterdir()}
    assert pages == {"01-x.html": "a", "01-x-on-b.html": "b"}
    assert "_sources/book/01-x-on-b.ipynb" in (site / "book" / "01-x-on-b.html").read_text()
    assert (site / "_sources" / "book" / "01-x-on-b.ipynb").read_text() == "b"
    assert {path.name for path in (site / "_images").iterdir()} == {"a.png", "b.png"}


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "x"), KeyboardInterrupt()])
def test_a_failed_or_interrupted_build_keeps_the_old_site(house, error, capsys):
    page = house(error)
    assert build_book.main() == 1
    assert page.read_text() == "old"
    assert "last good site" in capsys.readouterr().err


def test_editions_that_are_stored_and_those_of_another_model(house, monkeypatch):
    house()
    monkeypatch.setattr(refresh, "STORED", ("a", "b"))
    found = [(x.path.parent.name, x.model) for x in refresh.stored()]
    assert found == [("book", "a"), ("b", "b")]
    assert [(x.path.parent.name, x.model) for x in refresh.stored("c")] == [("c", "c")]
    assert [(x.path.parent.name, x.model) for x in refresh.stored("a")] == [("book", "a")]


NPM = """\
#!/bin/sh
# stands in for npm: notes its arguments; installs what package.json names, or fails
echo "$@" >> npm.log
[ -e broken ] && { printf '%s' '{"error": {"summary": "no answer\\nfrom there"}}'; exit 1; }
version=$(sed -n 's/.*"mathjax": "\\(.*\\)".*/\\1/p' package.json)
for part in es5/tex-mml-chtml.js es5/unused.js es5/output/chtml/fonts/woff-v2/a.woff LICENSE; do
  mkdir -p "node_modules/mathjax/$(dirname $part)"
  echo "$version" > "node_modules/mathjax/$part"
done
echo "{\\"version\\": \\"$version\\"}" > node_modules/mathjax/package.json
[ -e cut-off ] && exit 1
echo "{\\"packages\\": {\\"node_modules/mathjax\\": {\\"version\\": \\"$version\\"}}}" \\
  > node_modules/.package-lock.json
"""


@pytest.fixture
def pantry(tmp_path, monkeypatch):
    """A project that wants MathJax 1.0, with a stand-in for npm in its folder."""
    monkeypatch.setattr(vendor_assets, "ROOT", tmp_path)
    monkeypatch.setattr(vendor_assets, "VENDOR", tmp_path / "vendor")
    monkeypatch.setattr(vendor_assets, "vendor_vega", lambda target: None)
    (tmp_path / "npm").write_text(NPM)
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    want(tmp_path, "1.0")
    return tmp_path


def want(project, version):
    text = json.dumps({"devDependencies": {"mathjax": version}}, indent=1)
    (project / "package.json").write_text(text)


def calls(project):
    return (project / "npm.log").read_text().splitlines()


def script(project):
    return (project / "vendor" / "mathjax" / "es5" / "tex-mml-chtml.js").read_text().strip()


def test_mathjax_is_fetched_once_and_only_what_the_site_needs_is_copied(pantry, capsys):
    assert vendor_assets.main() == vendor_assets.main() == 0
    assert len(calls(pantry)) == 1 and calls(pantry)[0].startswith("ci --ignore-scripts ")
    folder = pantry / "vendor" / "mathjax"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    font = "es5/output/chtml/fonts/woff-v2/a.woff"
    assert files == {"LICENSE", "package.json", "es5/tex-mml-chtml.js", font}
    assert capsys.readouterr().err == ""


def test_another_version_in_package_json_is_fetched(pantry):
    vendor_assets.main()
    want(pantry, "1.1")
    vendor_assets.main()
    assert script(pantry) == "1.1" and len(calls(pantry)) == 2


def test_a_failing_npm_is_named_and_keeps_the_mathjax_that_was_there(pantry, capsys):
    vendor_assets.main()
    want(pantry, "1.1")
    (pantry / "broken").touch()
    assert vendor_assets.main() == 0
    message = capsys.readouterr().err
    reason = "npm could not fetch the packages: no answer"
    assert f"Formulas will be typeset by MathJax 1.0, as before: {reason}." in message
    assert script(pantry) == "1.0"


def test_an_installation_that_was_cut_off_is_repeated(pantry):
    (pantry / "cut-off").touch()
    vendor_assets.main()
    assert not (pantry / "vendor" / "mathjax").exists()
    (pantry / "cut-off").unlink()
    vendor_assets.main()
    assert script(pantry) == "1.0" and len(calls(pantry)) == 2


def test_a_copy_that_was_cut_off_is_repeated(pantry, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut)  # the fonts, after the script
        with pytest.raises(KeyboardInterrupt):
            vendor_assets.main()
    assert not (pantry / "vendor" / "mathjax").exists()
    vendor_assets.main()
    assert script(pantry) == "1.0"
    assert [path.name for path in (pantry / "vendor").iterdir()] == ["mathjax"]


def test_the_lock_has_a_checksum_for_each_package_and_names_no_host():
    text = (ROOT / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    named = packages.pop("")["devDependencies"]
    assert named == vendor_assets.wanted()
    needed = {name for name, package in packages.items() if not package.get("optional")}
    assert needed == {f"node_modules/{name}" for name in named}
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert "resolved" not in text and "://" not in text


@pytest.mark.slow
def test_without_npm_the_message_says_what_is_missing_and_what_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vendor_assets, "VENDOR", tmp_path / "vendor")
    monkeypatch.setattr(vendor_assets, "installed", dict)
    monkeypatch.setenv("PATH", "")
    assert vendor_assets.main() == 0
    assert (tmp_path / "vendor" / "vega.js").stat().st_size > 500_000
    message = capsys.readouterr().err
    assert "show as TeX source: Node.js (npm) is not installed" in message
    assert "Everything else works" in message


def test_check_runs_every_part_times_it_and_fails_where_one_failed(capfd):
    def part(name, *codes):
        program = "import sys; print('code', sys.argv[1]); sys.exit(int(sys.argv[1]))"
        return check.Part(name, tuple((sys.executable, "-c", program, code) for code in codes))

    assert check.main((part("first", "0", "0"), part("second", "3", "4"), part("third", "0"))) == 1
    printed = capfd.readouterr().out
    assert re.findall(r"code (\d)", printed) == ["0", "0", "3", "0"]
    lines = printed.split("what was checked")[1]
    outcome = re.findall(r"(\w+) +\d+ s   (\w+)", lines)
    assert outcome == [("first", "good"), ("second", "FAILED"), ("third", "good")]
    assert check.main((part("only", "0"),)) == 0


def test_parts_of_one_core_run_beside_each_other_and_speak_in_turn(tmp_path, capfd):
    """Each waits for the other to have begun."""
    program = """if True:
        import pathlib, sys, time
        mine, other, code = sys.argv[1:]
        print(mine, "begins", flush=True)
        pathlib.Path(mine).touch()
        end = time.monotonic() + 60
        while not pathlib.Path(other).exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        print(mine, "ends", file=sys.stderr)
        sys.exit(int(code))"""

    def part(name, mine, other, code):
        names = (str(tmp_path / mine), str(tmp_path / other))
        return check.Part(name, ((sys.executable, "-c", program, *names, code),), one=True)

    last = check.Part("last", ((sys.executable, "-c", "print('after both')"),))
    assert check.main((part("slow", "a", "b", "1"), part("quick", "b", "a", "0"), last)) == 1
    printed = capfd.readouterr().out
    said = re.findall(r"(?:── |/)(\w+(?: begins| ends)?)$", printed, re.MULTILINE)
    assert said[:7] == ["slow", "a begins", "a ends", "quick", "b begins", "b ends", "last"]
    assert printed.index("── last") < printed.index("after both")
    assert re.findall(r"(\w+) +\d+ s   (\w+)", printed) == [
        ("slow", "FAILED"), ("quick", "good"), ("last", "good")
    ]  # fmt: skip


MARK = re.compile(r"^(pytestmark = .*|@)pytest\.mark\.site", re.MULTILINE)


def test_every_test_is_in_one_part_and_the_site_is_built_before_its_own():
    names = [part.name for part in check.PARTS]
    chosen = {part.name: part.commands[0][5:] for part in check.PARTS}
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if MARK.search(p.read_text())]
    assert chosen["unit tests"][:3] == ("tests", "-m", "not site and not slow")
    assert chosen["long tests"][:3] == ("tests", "-m", "slow and not site")
    assert chosen["site tests"][: len(check.SITE) + 2] == (*check.SITE, "-m", "site")
    assert sorted(str(path.relative_to(ROOT)) for path in marked) == sorted(check.SITE)
    assert names.index("site") < names.index("site tests")


PIP = """\
#!/bin/sh
# stands in for the Python of .venv: notes what pip is asked for, and fails where it is told to
echo "$@" >> pip.log
case "$*" in
  *--version*) ;;
  *download.pytorch.org*) echo noise >&2; exit $CPU ;;
  *) exit $REST ;;
esac
"""


@pytest.fixture
def installing(tmp_path):
    """Runs the installation of the Makefile with stand-ins for pip, uname and a GPU's program."""
    for name in ("Makefile", "constraints.txt", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / "programs"
    for path in (tmp_path / ".venv" / "bin" / "python", programs / "uname"):
        path.parent.mkdir(parents=True)
        path.write_text(PIP if path.name == "python" else "#!/bin/sh\necho $OS\n")
        path.chmod(0o755)

    def run(cpu=0, rest=0, os_name="Linux", gpu=False):
        if gpu:
            (programs / "nvidia-smi").symlink_to("uname")
        state = {"CPU": str(cpu), "REST": str(rest), "OS": os_name}
        environment = os.environ | state | {"PATH": f"{programs}:{os.environ['PATH']}"}
        command = ["make", ".venv/.ready", f"PYTHON={sys.executable}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        log = (tmp_path / "pip.log").read_text().splitlines()
        asked = [line for line in log if "--version" not in line]
        return done, asked, (tmp_path / ".venv" / ".ready").exists()

    return run


GPU = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")


@pytest.mark.skipif(bool(GPU), reason="this machine has a GPU")
@pytest.mark.parametrize("cpu", [0, 1])
def test_without_a_gpu_the_cpu_build_of_torch_is_tried_quickly_and_quietly(installing, cpu):
    done, (first, second), ready = installing(cpu=cpu)
    assert done.returncode == 0 and ready and "noise" not in done.stderr
    pinned = re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert first.endswith(f"--retries 0 --timeout 5 {pinned}")
    assert "-r requirements.txt" in second and "pytorch.org" not in second
    assert ("cannot be had" in done.stdout) == bool(cpu)


@pytest.mark.parametrize("machine", [{"gpu": True}, {"os_name": "Darwin"}])
def test_elsewhere_the_ordinary_build_is_installed(installing, machine):
    _, asked, ready = installing(**machine)
    assert ready and len(asked) == 1 and "pytorch.org" not in asked[0]


def test_an_installation_that_fails_is_not_taken_for_done(installing, tmp_path):
    assert installing()[2]
    os.utime(tmp_path / ".venv" / ".ready", (1, 1))  # the requirements have changed since then
    done, _, ready = installing(rest=1)
    assert done.returncode and not ready


@pytest.mark.slow
@pytest.mark.parametrize(("circuits", "kind"), [("edges", "flip"), ("nodes", "abc")])
def test_methods_are_compared_on_held_out_prompts(circuits, kind, tmp_path, capsys):
    import compare_methods

    small = ["--train", "8", "--test", "16", "--draws", "1", "--counterfactual", kind]
    assert compare_methods.main([*small, "--circuits", circuits, "--out", str(tmp_path)]) == 0
    assert "secant" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / ("curves.csv" if circuits == "edges" else "nodes.csv"))
    f = table.set_index(["method", "size"])["f"].sort_index()
    size = 0.2 if circuits == "edges" else 40
    assert (f.loc[("secant", size)] > 0.8).all() and (f.loc[("random", size)] < 0.3).all()
    assert f.groupby(level="method").last().eq(1).all()


def test_byte_pairs_are_read_as_they_were_published(tmp_path):
    vocabulary = [*"abĠ", "ab", "Ġab", "<|endoftext|>"]
    words = {word: number for number, word in enumerate(vocabulary)}
    (tmp_path / "encoder.json").write_text(json.dumps(words), encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\nĠ ab\n", encoding="utf-8")
    random_gpt2_small.byte_pairs(tmp_path).save_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab ab a")["input_ids"] == [3, 4, 2, 0]
    assert tokenizer.decode([3, 4, 2, 0]) == "ab ab a"
    assert tokenizer.bos_token_id == 5 and len(tokenizer) == 6
