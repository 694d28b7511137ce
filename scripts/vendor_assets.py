"""Put the scripts of the site into book/_static/vendor, so that its pages need no other host.

MathJax comes from the npm registry (its checksum is checked), Vega from the vl-convert wheel.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import vl_convert

from sparse_signals.mime import VEGA_LITE

VENDOR = Path(__file__).parents[1] / "book" / "_static" / "vendor"
MATHJAX = "3.2.2"
MATHJAX_SHA512 = (
    "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw=="
)
MATHJAX_PARTS = ("es5/tex-mml-chtml.js", "es5/output/chtml/fonts/woff-v2/", "LICENSE")
NO_MATHJAX = """\
MathJax is not there: {reason}.
  The book builds all the same; its formulas will show as TeX source.
  To typeset them, install Node.js (https://nodejs.org, or: sudo apt install nodejs npm),
  make sure the npm registry can be reached, and run `make book` again."""


def vendor_vega(target: Path) -> None:
    """Write Vega, Vega-Lite and vega-embed as one script that defines only `vegaEmbed`."""
    snippet = "window.vegaEmbed = vegaEmbed;"
    bundle = vl_convert.javascript_bundle(snippet, vl_version=VEGA_LITE)
    target.write_text(f"(() => {{{bundle}}})();\n", encoding="utf-8")


def vendor_mathjax(target: Path) -> None:
    """Fetch the MathJax package and keep the parts that pages load.

    Raises OSError or CalledProcessError when npm or its registry is missing, ValueError when the
    package is not the expected one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("Node.js (npm) is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"mathjax@{MATHJAX}", "--silent"]
        subprocess.run(command, cwd=folder, check=True, timeout=300, stdout=subprocess.DEVNULL)
        archive = Path(folder, f"mathjax-{MATHJAX}.tgz")
        checksum = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if checksum != MATHJAX_SHA512:
            raise ValueError(f"mathjax@{MATHJAX} has an unexpected checksum {checksum}")
        with tarfile.open(archive) as package:
            parts = tuple(f"package/{part}" for part in MATHJAX_PARTS)
            wanted = [member for member in package if member.name.startswith(parts)]
            package.extractall(folder, members=wanted, filter="data")
        shutil.move(Path(folder, "package"), target)


def main() -> int:
    """Vendor what is missing. Without npm: say so, and leave the formulas as TeX."""
    VENDOR.mkdir(parents=True, exist_ok=True)
    vendor_vega(VENDOR / "vega.js")
    if (VENDOR / "mathjax").is_dir():
        return 0
    try:
        vendor_mathjax(VENDOR / "mathjax")
    except (OSError, subprocess.SubprocessError) as error:
        failed = isinstance(error, subprocess.SubprocessError)
        reason = "npm could not fetch it" if failed else error
        print(NO_MATHJAX.format(reason=reason), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
