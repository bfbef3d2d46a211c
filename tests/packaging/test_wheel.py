"""The wheel alone: every command runs from it, without CrypTen, beside another project's `kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FOLDERS = ("mpcache", "parties", "kernels", "protos")  # of the checkout, whose files are installed
OURS = ("mpcache", "mpcache_parties", "mpcache_kernels", "mpcache_protos")  # import names, no others


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and an sdist, built from the files that git knows, in a folder that no checkout stands in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if name.startswith((*(f"{folder}/" for folder in FOLDERS), "pyproject", "README", "LICENSE")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    for what in ("wheel", "sdist"):  # each in a process of its own: a build changes its process's arguments
        build = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel and its dependencies: no CrypTen, and a stranger's `kernels`."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (here,) = (Path(p) for p in sys.path if p.endswith("site-packages"))
    for entry in here.iterdir():
        known = (site / entry.name).exists()
        if not known and not entry.name.lower().startswith(("crypten", "mpcache", "__editable__", "_pytest")):
            (site / entry.name).symlink_to(entry)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text('MINE = "another project"\n')
    (wheel,) = dist.glob("*.whl")
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([str(folder / "bin" / "python"), *pip], check=True, capture_output=True)
    return folder / "bin"


def run(
    bin_: Path, cwd: Path, *words: str, code: int = 0, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [bin_ / words[0], *words[1:]],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done


def test_wheel_and_sdist_hold_what_is_needed_under_names_of_our_own(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(OURS)
    with tarfile.open(sdist) as tar:
        inside = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    for needed in ("mpcache/demo/model/model.safetensors", "mpcache/audit/page.html", "mpcache/py.typed"):
        assert needed in names and needed in inside, needed
    assert "kernels/mpcache_kernels/__init__.py" in inside


def test_every_command_runs(installed: Path, tmp_path: Path) -> None:
    version = run(installed, tmp_path, "mpcache", "--version").stdout
    assert run(installed, tmp_path, "mpcache-party", "--version").stdout.split()[-1] == version.split()[-1]
    assert run(installed, tmp_path, "python", "-m", "mpcache", "--version").stdout == version
    for command in ("generate", "compare", "audit", "eval", "policies"):
        run(installed, tmp_path, "mpcache", command, "--help")
    for command in ("keygen", "pin"):
        run(installed, tmp_path, "mpcache-party", command, "--help")
    assert "snapkv" in run(installed, tmp_path, "mpcache", "policies").stdout


def test_fast_answers_without_crypten_and_stock_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    answer = run(installed, tmp_path, "mpcache", "generate", "--max-new-tokens", "2", "--policy", "full")
    assert "100 %" in answer.stdout
    refused = run(installed, tmp_path, "mpcache", "generate", "--protocol", "stock", code=2)
    (line,) = refused.stderr.splitlines()
    assert "CrypTen is not installed" in line and "pip install" in line


def test_another_projects_kernels_is_left_alone(installed: Path, tmp_path: Path) -> None:
    theirs = "import mpcache, mpcache_kernels, kernels; print(kernels.MINE)"
    assert run(installed, tmp_path, "python", "-c", theirs).stdout == "another project\n"


def test_fast_never_imports_crypten() -> None:
    """Where CrypTen is installed, too: a session of three parties by `fast` leaves it alone."""
    program = (
        "import sys, torch; from mpcache.engines.threads import run_threads; import mpcache.cli; "
        "import mpcache_parties.main; from mpcache.cost.pricing import price; "
        "from mpcache.model import demo_model_dir, load_shape; "
        "run_threads(lambda ops, party, rank: ops.name); "
        "price(load_shape(demo_model_dir()), 'mpcache', 64); "
        "print([m for m in sys.modules if m.startswith('crypten')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
