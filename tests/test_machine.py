"""What the system grants: control groups of both versions as files, real file systems."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from clipctl.machine import NETWORK, Cores, Disk, Memory, control_groups, cores, disk, memory


def write(root: Path, **files: str) -> Path:
    """Files by path, with `__` for `/` and `_DOT_` for a dot."""
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_version_2_and_the_narrowest_group_counts(tmp_path: Path) -> None:
    """The job has 4 GiB and the step, inside it, 6: what is left of the job's is less."""
    root = write(
        tmp_path,
        proc__self__cgroup="0::/job_7/step_0\n",
        sys__fs__cgroup__job_7__memory_DOT_max=f"{4 << 30}\n",
        sys__fs__cgroup__job_7__memory_DOT_current=f"{3 << 30}\n",
        sys__fs__cgroup__job_7__memory_DOT_stat=f"anon 5\ninactive_file {1 << 30}\n",
        sys__fs__cgroup__job_7__cpu_DOT_max="150000 100000\n",
        sys__fs__cgroup__job_7__step_0__memory_DOT_max=f"{6 << 30}\n",
        sys__fs__cgroup__job_7__step_0__memory_DOT_current=f"{1 << 30}\n",
        sys__fs__cgroup__job_7__step_0__cpu_DOT_max="max 100000\n",
    )
    found = memory(root)
    assert (found.limit, found.used) == (4 << 30, 2 << 30)
    assert found.usable == min(4 << 30, psutil.virtual_memory().total)
    assert cores(root).quota == 1.5
    assert [group.name for group in control_groups("memory", root)] == ["step_0", "job_7", "cgroup"]


def test_version_1_and_its_number_for_no_limit(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="4:memory:/user\n3:cpu,cpuacct:/user\n1:name=systemd:/x\n",
        sys__fs__cgroup__memory__user__memory_DOT_limit_in_bytes=f"{2**63 - 4096}\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes=f"{2 << 30}\n",
        sys__fs__cgroup__memory__memory_DOT_usage_in_bytes=f"{1 << 30}\n",
        sys__fs__cgroup__memory__memory_DOT_stat="inactive_file 1\ntotal_inactive_file 4096\n",
    )
    group = root / "sys/fs/cgroup/cpu,cpuacct/user"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert (memory(root).limit, memory(root).used) == (2 << 30, (1 << 30) - 4096)
    assert cores(root).quota is None
    (group / "cpu.cfs_quota_us").write_text("50000\n")
    assert cores(root).quota == 0.5


def test_in_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    """The path is the host's, and is not there."""
    root = write(
        tmp_path, proc__self__cgroup="0::/kubepods/pod9\n", sys__fs__cgroup__memory_DOT_max=f"{1 << 30}\n"
    )  # fmt: skip
    assert memory(root).limit == 1 << 30
    assert memory(tmp_path / "elsewhere").limit is None


def test_what_is_free_is_under_both_limits() -> None:
    assert Memory(100, 60, None, 0).free == 60
    assert Memory(100, 60, 50, 20).free == 30
    assert Memory(100, 10, 50, 20).free == 10
    assert Memory(100, 60, 50, 70).free == 0
    assert (Memory(100, 60, 50, 20).usable, Memory(100, 60, 500, 20).usable) == (50, 100)
    assert (Cores(64, 8, 2.5).usable, Cores(64, 2, 8.0).usable, Cores(64, 8, None).usable) == (2.5, 2, 8)


def test_cores_are_those_of_the_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from clipctl.machine import cores; "
        "print(cores().usable)"
    )
    assert float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) <= 1


def test_a_folder_that_is_not_there_yet_lies_where_its_parent_does(tmp_path: Path) -> None:
    found = disk(tmp_path / "a" / "b")
    assert found == disk(tmp_path)
    assert 0 < found.free <= found.total
    assert found.writable


def test_a_small_tmpfs_is_seen(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "clipctl-test", tmp_path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        (tmp_path / "file").write_bytes(os.urandom(1 << 20))
        found = disk(tmp_path / "runs")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert (found.mount, found.kind, found.total) == (str(tmp_path), "tmpfs", 3 << 20)
    assert found.free <= 2 << 20


def test_network_file_systems() -> None:
    kinds = ("nfs4", "lustre", "fuse.sshfs", "ext4", "tmpfs", "overlay")
    assert [Disk("/", kind, 1, 1, True).network for kind in kinds] == [True, True, True, False, False, False]
    assert len(NETWORK) > 20
