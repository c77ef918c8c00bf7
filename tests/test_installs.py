"""However it is installed, the package is whole, and no folder hides it."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
pytestmark = pytest.mark.install

ROOT = Path(__file__).parents[1]
ROOMS = ("controllers", "envs", "eval", "memory_backend", "train")
USE = """
import gymnasium

env = gymnasium.make("hbmgym:hbmgym/HbmPartition-v0", serving={"hbm_gib": 2.0})
env.reset(seed=0)
assert env.step(env.action_space.sample())[1] <= 1.0

import hbmgym.eval.compare

print(hbmgym.__file__)
"""


class Environment:
    """A virtual environment in `folder` that has all that hbmgym needs, but not hbmgym."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/*/site-packages")
        # A path in a .pth file is searched, but its own .pth files, such as ours of an editable install, are not read.
        (self.packages / "needs.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # Kernels would be compiled anew for each place that they are installed in.
        environment = {**kept, "NUMBA_DISABLE_JIT": "1"}
        return subprocess.run([self.python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)

    def install(self, *what: str | Path) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index", "--no-deps"]
        flags = ["--no-build-isolation", "--ignore-installed", "--no-compile"]
        return subprocess.run([*pip, *flags, *what], capture_output=True, text=True)

    def installed(self) -> set[str]:
        (record,) = self.packages.glob("hbmgym-*.dist-info/RECORD")
        names = {line.split(",")[0] for line in record.read_text().splitlines()}
        return {name for name in names if not name.startswith(record.parent.name)}


def succeeded(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.strip()


def git(*arguments: str | Path) -> str:
    return succeeded(subprocess.run(["git", *arguments], capture_output=True, text=True))


def clone(folder: Path, *settings: str) -> Path:
    """The last commit as a checkout in `folder`."""
    if not (ROOT / ".git").exists():
        pytest.skip("there is no Git repository around the tests")
    git(*settings, "clone", "--quiet", ROOT, folder)
    return folder


def clone_without_links(folder: Path) -> Path:
    """As Git makes it where there are no symlinks: a text file instead of each."""
    checkout = clone(folder, "-c", "core.symlinks=false")
    assert not any((checkout / "src" / "hbmgym" / room).is_dir() for room in ROOMS)
    return checkout


def sdist(checkout: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", checkout / "dist"]
    succeeded(subprocess.run(command, cwd=checkout, capture_output=True, text=True))
    (made,) = (checkout / "dist").iterdir()
    return made


def wheel(checkout: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    succeeded(subprocess.run([*command, "-w", checkout / "dist", checkout], capture_output=True, text=True))
    (made,) = (checkout / "dist").iterdir()
    return made


def archive(checkout: Path) -> Path:
    made = checkout.with_suffix(".zip")
    git("-C", checkout, "archive", "--format=zip", "--prefix=hbmgym-main/", "-o", made, "HEAD")
    return made


WAYS = {
    "checkout": clone,
    "checkout without links": clone_without_links,
    "wheel": lambda folder: wheel(clone(folder)),
    "wheel without links": lambda folder: wheel(clone_without_links(folder)),
    "sdist": lambda folder: sdist(clone(folder)),
    "zip of git archive": lambda folder: archive(clone(folder)),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_installation_is_whole(way, tmp_path):
    environment = Environment(tmp_path / "venv")
    succeeded(environment.install(WAYS[way](tmp_path / "source")))
    tracked = git("-C", tmp_path / "source", "ls-files", "src/hbmgym", *ROOMS).split()
    links = {f"src/hbmgym/{room}" for room in ROOMS}
    assert environment.installed() == {f"hbmgym/{path.removeprefix('src/hbmgym/')}" for path in {*tracked} - links}
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert succeeded(environment.run("-c", USE, cwd=elsewhere)) == str(environment.packages / "hbmgym" / "__init__.py")


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> tuple[Environment, Path]:
    folder = tmp_path_factory.mktemp("editable")
    environment = Environment(folder / "venv")
    succeeded(environment.install("-e", clone(folder / "hbmgym")))
    return environment, folder / "hbmgym"


def test_no_folder_hides_an_editable_install(editable, tmp_path):
    environment, checkout = editable
    (tmp_path / "hbmgym" / "eval").mkdir(parents=True)
    (tmp_path / "own_script.py").write_text(USE)
    found = str(checkout / "src" / "hbmgym" / "__init__.py")
    assert succeeded(environment.run(str(tmp_path / "own_script.py"), cwd=checkout)) == found
    for folder in (checkout, checkout.parent, tmp_path):
        assert succeeded(environment.run("-c", "import hbmgym.eval; print(hbmgym.__file__)", cwd=folder)) == found
        assert "--controllers" in succeeded(environment.run("-m", "hbmgym.eval.compare", "--help", cwd=folder))


def test_compiled_kernels_are_the_same_however_their_sources_are_reached(editable, tmp_path):
    name = "from hbmgym.memory_backend.jit import KERNEL_CACHE as folder; import os; print(os.path.basename(folder))"
    linked, checkout = editable
    copied = Environment(tmp_path / "venv")
    succeeded(copied.install(checkout))
    names = {succeeded(environment.run("-c", name, cwd=tmp_path)) for environment in (linked, copied)}
    assert len(names) == 1 and names.pop().startswith("kernels-")


@pytest.mark.parametrize("script", ["train/ppo.py", "eval/compare.py"])
def test_scripts_of_a_checkout_run_from_everywhere(script, editable):
    environment, checkout = editable
    assert "--scenario" in succeeded(environment.run(script, "--help", cwd=checkout))
    assert "--scenario" in succeeded(environment.run(str(checkout / script), "--help", cwd=checkout.parent))


def test_an_editable_install_makes_links_where_git_made_none(tmp_path):
    environment, checkout = Environment(tmp_path / "venv"), clone_without_links(tmp_path / "hbmgym")
    succeeded(environment.install("-e", checkout))
    assert succeeded(environment.run("-c", USE, cwd=tmp_path)) == str(checkout / "src" / "hbmgym" / "__init__.py")
    assert git("-C", checkout, "status", "--porcelain") == ""


def test_an_editable_install_that_can_make_no_links_says_so(tmp_path):
    environment, checkout = Environment(tmp_path / "venv"), clone(tmp_path / "hbmgym")
    link = checkout / "src" / "hbmgym" / "envs"
    link.unlink()
    link.mkdir()
    ended = environment.install("-e", checkout)
    assert ended.returncode != 0
    (line,) = [line.strip() for line in ended.stderr.splitlines() if str(link) in line]
    assert line.startswith("hbmgym cannot be installed as editable: ") and line.endswith("or install without -e")
    assert not list(environment.packages.glob("*hbmgym*"))


def test_nothing_is_built_of_a_part_of_the_package(tmp_path):
    environment, checkout = Environment(tmp_path / "venv"), clone(tmp_path / "hbmgym")
    shutil.rmtree(checkout / "eval")
    ended = environment.install(checkout)
    assert ended.returncode != 0
    assert f"hbmgym cannot be built: the folder {checkout / 'eval'} is missing" in ended.stderr


def test_mypy_finds_the_types_of_an_editable_install(editable, tmp_path):
    environment, _ = editable
    (tmp_path / "own.py").write_text("from hbmgym.files import write_atomically\n\nreveal_type(write_atomically)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(environment.python), "own.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "(path: pathlib.Path, content: bytes)" in succeeded(ended)


def test_checkers_that_run_no_code_find_an_editable_install(editable):
    """They read paths out of .pth files, but no hooks that a .pth file imports."""
    environment, checkout = editable
    lines = [path.read_text().strip() for path in environment.packages.glob("*hbmgym*.pth")]
    assert lines == [str(checkout / "src")]
