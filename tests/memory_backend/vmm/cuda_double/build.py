"""Build the double of libcuda with the system's compilers; as a script: `build.py FOLDER`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent
DEVICE_SOURCE = SOURCES.parents[3] / "memory_backend" / "vmm" / "device.cu"
LIBRARY = "libcuda.so.1"

_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_SHARED = ("-O2", "-fPIC", "-pthread", "-fvisibility=hidden", *_WARNINGS)


def missing_compiler() -> str | None:
    """Why the double cannot be built here, None if it can."""
    absent = [name for name in ("cc", "c++") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} to build the double of libcuda" if absent else None


def build(folder: Path) -> Path:
    """Write `libcuda.so.1` into `folder` and return its path; CalledProcessError carries the compiler's words."""
    objects = [_compile_c(source, folder) for source in sorted(SOURCES.glob("*.c"))]
    objects.append(_compile_kernels(folder))
    library = folder / LIBRARY
    _run("cc", "-shared", "-pthread", f"-Wl,-soname,{LIBRARY}", "-o", str(library), *objects, "-ldl")
    return library


def _compile_c(source: Path, folder: Path) -> str:
    return _compile(folder, source, "cc", "-std=c11", "-D_GNU_SOURCE")


def _compile_kernels(folder: Path) -> str:
    """Kernels are named by the PTX, so that an entry without source does not compile."""
    names = re.findall(r"\.entry\s+(\w+)", DEVICE_SOURCE.with_suffix(".ptx").read_text())
    table = "".join(f"KERNEL({name}) " for name in names)
    definitions = (f"-DKERNELS={table}", f'-DDEVICE_SOURCE="{DEVICE_SOURCE}"')
    return _compile(folder, SOURCES / "kernels.cpp", "c++", "-std=c++11", "-fno-exceptions", "-fno-rtti", *definitions)


def _compile(folder: Path, source: Path, compiler: str, *options: str) -> str:
    target = folder / f"{source.stem}.o"
    _run(compiler, *_SHARED, *options, "-c", str(source), "-o", str(target))
    return str(target)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print(build(folder))
