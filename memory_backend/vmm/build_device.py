"""Make device.ptx from device.cu: `python -m hbmgym.memory_backend.vmm.build_device` (needs nvcc of CUDA 13).

The PTX is committed, so that neither users nor tests need the CUDA toolkit; its first line names the source it is of.
"""

import hashlib
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cu")
PTX = SOURCE.with_suffix(".ptx")


def first_line() -> str:
    """What the first line of PTX made from the present source says."""
    return f"// device.cu, sha256 {hashlib.sha256(SOURCE.read_bytes()).hexdigest()}\n"


def main() -> None:
    """Compile the source and write the PTX beside it."""
    command = ["nvcc", "-ptx", "-arch=compute_75", "-o", "/dev/stdout", SOURCE.name]
    result = subprocess.run(command, cwd=SOURCE.parent, check=True, stdout=subprocess.PIPE, text=True)
    PTX.write_text(first_line() + result.stdout)


if __name__ == "__main__":
    main()
