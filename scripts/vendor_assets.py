"""Put the scripts of the site into book/_static/vendor, so that its pages need no other host.

MathJax is one of the npm packages that package.json names and package-lock.json holds checksums
for; Vega comes from the vl-convert wheel.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from sparse_signals.app.page import vega_script

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "book" / "_static" / "vendor"
MATHJAX = ("LICENSE", "package.json", "es5/tex-mml-chtml.js", "es5/output/chtml/fonts/woff-v2")
NO_MATHJAX = """\
\nFormulas will {what}: {reason}.
Everything else works. To typeset the formulas, install Node.js (https://nodejs.org, or
`sudo apt install nodejs npm`), make sure that `npm view mathjax` works, and run `make book` again.
"""


def vendor_vega(target: Path) -> None:
    """Write Vega, Vega-Lite and vega-embed as one script that defines only `vegaEmbed`."""
    target.write_text(vega_script(), encoding="utf-8")


def wanted() -> dict[str, str]:
    """The npm packages of this project and their versions."""
    return json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["devDependencies"]


def installed() -> dict[str, str]:
    """The npm packages in node_modules and their versions; none after a broken installation."""
    record = ROOT / "node_modules" / ".package-lock.json"  # npm writes it last
    if not record.exists():
        return {}
    packages = json.loads(record.read_text(encoding="utf-8"))["packages"]
    return {name.removeprefix("node_modules/"): x["version"] for name, x in packages.items()}


def npm_packages() -> Path:
    """The folder node_modules, fetched with npm where a wanted package is missing.

    Raises OSError in one line when npm is missing or cannot fetch what the lock file names.
    """
    if not wanted().items() <= installed().items():
        npm = shutil.which("npm")
        if npm is None:
            raise OSError("Node.js (npm) is not installed")
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
        try:
            done = subprocess.run(
                [*command, "--json"], cwd=ROOT, capture_output=True, timeout=300, text=True
            )
        except subprocess.TimeoutExpired as error:
            raise OSError("npm did not answer in five minutes") from error
        if done.returncode:
            raise OSError(f"npm could not fetch the packages: {failure(done.stdout)}")
    return ROOT / "node_modules"


def failure(output: str) -> str:
    """Why npm failed, in one line, from what it wrote with --json."""
    try:
        return json.loads(output)["error"]["summary"].splitlines()[0]
    except (ValueError, LookupError):
        return "npm ci gives no reason"


def version(package: Path) -> str | None:
    """The version of a package that was copied to this folder."""
    path = package / "package.json"
    return json.loads(path.read_text(encoding="utf-8"))["version"] if path.exists() else None


def vendor_mathjax(source: Path, target: Path) -> None:
    """Copy what the site needs of MathJax, unless this version of it is there."""
    if version(target) == version(source):
        return
    aside = target.with_name("mathjax.new")
    shutil.rmtree(aside, ignore_errors=True)
    for part in MATHJAX:
        (aside / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (source / part).is_dir() else shutil.copyfile
        copy(source / part, aside / part)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def main() -> int:
    """Vendor what is missing. Without npm: say what becomes of the formulas, and go on."""
    VENDOR.mkdir(parents=True, exist_ok=True)
    vendor_vega(VENDOR / "vega.js")
    mathjax = VENDOR / "mathjax"
    try:
        vendor_mathjax(npm_packages() / "mathjax", mathjax)
    except OSError as error:
        old = version(mathjax)
        if old != wanted()["mathjax"]:
            what = f"be typeset by MathJax {old}, as before" if old else "show as TeX source"
            print(NO_MATHJAX.format(what=what, reason=error), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
