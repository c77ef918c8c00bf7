"""Limits of memory control groups, read from a tree of files as /proc and /sys have them."""

from pathlib import Path

import pytest

pytest.importorskip("fcntl")

from hbmgym.memory_backend.vmm.linux import free_memory
from hbmgym.memory_backend.vmm.protocol import VmmRefused

MIB = 1 << 20
AVAILABLE = 8192 * MIB
V1_MOUNT = "35 31 0:32 {top} {mount} rw - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 {top} {mount} rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER_MOUNTS = "23 1 0:1 / / rw - ext4 /dev/memory rw\n33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
UNLIMITED_V1 = 9223372036854771712


def write(root: Path, files: dict[str, object]) -> Path:
    everything = {"proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {AVAILABLE // 1024} kB\n", **files}
    for name, content in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def v1(folder: str, limit: object, used: int = 0, stat: str = "") -> dict[str, object]:
    facts = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{folder}/{name}": value for name, value in facts.items()}


def v2(folder: str, limit: object, used: int = 0, stat: str = "", high: object = "max") -> dict[str, object]:
    facts = {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}
    return {f"{folder}/{name}": value for name, value in facts.items()}


def own(groups: str, mounts: str = "") -> dict[str, object]:
    return {"proc/self/cgroup": groups, "proc/self/mountinfo": OTHER_MOUNTS + mounts}


V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"
SLURM = own("9:cpu:/other\n4:hugetlb,memory:/slurm/job/step\n0::/x", V1_MOUNT.format(top="/", mount=f"/{V1}"))
NESTED = own("0::/a/b/c", V2_MOUNT.format(top="/", mount=f"/{V2}"))
HYBRID = own(
    "4:memory:/m\n0::/u",
    V1_MOUNT.format(top="/", mount=f"/{V1}") + V2_MOUNT.format(top="/", mount="/sys/fs/cgroup/unified"),
)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, AVAILABLE),
        ({**NESTED, **v2(V2, "max"), **v2(f"{V2}/a/b/c", "max", 5 * MIB)}, AVAILABLE),
        ({**SLURM, **v1(V1, UNLIMITED_V1, 3 * MIB), **v1(f"{V1}/slurm/job/step", UNLIMITED_V1)}, AVAILABLE),
        # A group of one's own, a group above, the least of both.
        ({**NESTED, **v2(f"{V2}/a/b/c", 600 * MIB, 100 * MIB)}, 500 * MIB),
        ({**NESTED, **v2(f"{V2}/a", 600 * MIB, 250 * MIB), **v2(f"{V2}/a/b/c", "max")}, 350 * MIB),
        ({**NESTED, **v2(f"{V2}/a", 600 * MIB, 550 * MIB), **v2(f"{V2}/a/b/c", 300 * MIB)}, 50 * MIB),
        ({**SLURM, **v1(f"{V1}/slurm/job/step", 600 * MIB, 100 * MIB)}, 500 * MIB),
        ({**SLURM, **v1(f"{V1}/slurm", 600 * MIB, 100 * MIB), **v1(f"{V1}/slurm/job", UNLIMITED_V1)}, 500 * MIB),
        # Of groups beside it nothing is taken.
        ({**NESTED, **v2(f"{V2}/a/b/other", MIB), **v2(f"{V2}/c", MIB)}, AVAILABLE),
        # Where the kernel throttles is an end as well.
        ({**NESTED, **v2(f"{V2}/a/b", 600 * MIB, 100 * MIB, high=400 * MIB)}, 300 * MIB),
        # Both versions beside each other.
        ({**HYBRID, **v1(f"{V1}/m", 600 * MIB, MIB)}, 599 * MIB),
        # Mounted elsewhere, at a name with a space.
        (
            {**own("4:memory:/g", V1_MOUNT.format(top="/", mount="/my\\040groups")), **v1("my groups/g", 70 * MIB)},
            70 * MIB,
        ),
        # containerd's names hold colons.
        ({**own("0::/pod:x:y", V2_MOUNT.format(top="/", mount=f"/{V2}")), **v2(f"{V2}/pod:x:y", 70 * MIB)}, 70 * MIB),
        # In a container: the mount shows a part, by name or not, or the process's name says nothing.
        ({**own("0::/pod/me", V2_MOUNT.format(top="/pod", mount=f"/{V2}")), **v2(f"{V2}/me", 70 * MIB)}, 70 * MIB),
        ({**own("4:memory:/docker/x", V1_MOUNT.format(top="/elsewhere", mount=f"/{V1}")), **v1(V1, MIB)}, MIB),
        ({**own("0::/../../x", V2_MOUNT.format(top="/", mount=f"/{V2}")), **v2(V2, 70 * MIB)}, 70 * MIB),
        ({**SLURM, **v1(V1, UNLIMITED_V1, 0, f"hierarchical_memory_limit {70 * MIB}")}, 70 * MIB),
        # Where neither file of /proc says anything.
        (v1(V1, 600 * MIB, 100 * MIB), 500 * MIB),
        (v2(V2, 600 * MIB, 100 * MIB), 500 * MIB),
        # Pages of files that nobody has asked for lately can be had.
        ({**NESTED, **v2(f"{V2}/a", 600 * MIB, 550 * MIB, f"file 9\ninactive_file {200 * MIB}")}, 250 * MIB),
        ({**SLURM, **v1(f"{V1}/slurm", MIB, MIB, f"inactive_file 1\ntotal_inactive_file {MIB}")}, MIB),
        ({**NESTED, **v2(f"{V2}/a", 600 * MIB, 700 * MIB)}, 0),
        # What cannot be read says nothing.
        ({**NESTED, f"{V2}/a/memory.max": "", f"{V2}/memory.max": "many"}, AVAILABLE),
        ({**own("nonsense\n\n4:memory\n", "35\n - \n1 2 3 - cgroup"), **v1(V1, 70 * MIB)}, 70 * MIB),
        ({**NESTED, f"{V2}/a/memory.max": 70 * MIB}, 70 * MIB),
        ({**NESTED, **v2(f"{V2}/a", 70 * MIB, 0, "inactive_file\nanon many words")}, 70 * MIB),
    ],
)
def test_the_least_limit_of_a_group_and_those_above_it_holds(files, free, tmp_path):
    assert free_memory(write(tmp_path, files))[0] == free


def test_the_figure_says_where_it_comes_from(tmp_path):
    write(tmp_path, {**SLURM, **v1(f"{V1}/slurm", 70 * MIB)})
    assert free_memory(tmp_path)[1] == f"{tmp_path / V1}/slurm/memory.limit_in_bytes less what is in use"


def test_without_a_figure_of_the_system_memory_is_refused(tmp_path):
    with pytest.raises(VmmRefused, match="meminfo"):
        free_memory(write(tmp_path, {"proc/meminfo": "MemTotal: 5 kB"}))


def test_this_system_has_memory():
    assert free_memory()[0] > 0
