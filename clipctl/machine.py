"""What the operating system grants this process: cores, memory, file systems; the control groups of containers and Slurm
included. No torch.

Sources: cgroup v2 and v1 of the kernel's documentation. `root` is where `proc` and `sys` are looked for.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORK = {
    "nfs", "nfs3", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs",
    "smb3", "smbfs", "afs", "9p", "panfs", "wekafs", "orangefs", "pvfs2",
    "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "fuse.gcsfuse", "fuse.s3fs", "fuse.juicefs",
}  # fmt: skip
"""File systems whose disk is on another machine."""
NO_LIMIT = 2**60
"""Version 1 of control groups writes no limit as a number near 2^63."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. total, available: of the machine. limit: of the narrowest control group, None without one; used: what counts
    against it, without the cache that the kernel gives back."""

    total: int
    available: int
    limit: int | None
    used: int

    @property
    def usable(self) -> int:
        """What this process could have of an idle machine."""
        return self.total if self.limit is None else min(self.total, self.limit)

    @property
    def free(self) -> int:
        """What it can have now."""
        return self.available if self.limit is None else max(0, min(self.available, self.limit - self.used))


def memory(root: Path = Path("/")) -> Memory:
    """The machine's memory, and what a control group leaves of it."""
    import psutil

    machine = psutil.virtual_memory()
    limits = [
        (limit, used)
        for group in control_groups("memory", root)
        if (limit := _number(group, "memory.max", "memory.limit_in_bytes")) is not None and limit < NO_LIMIT
        for used in [_used(group)]
    ]
    narrowest = min(limits, key=lambda pair: pair[0] - pair[1], default=(None, 0))
    return Memory(int(machine.total), int(machine.available), *narrowest)


def _used(group: Path) -> int:
    """Bytes in use, but for the page cache that was not touched for a while."""
    used = _number(group, "memory.current", "memory.usage_in_bytes") or 0
    lines = _text(group / "memory.stat").splitlines()
    cache = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdecimal()}
    return used - cache.get("total_inactive_file", cache.get("inactive_file", 0))


@dataclass(frozen=True, slots=True)
class Cores:
    """Logical processors of the machine; those that this process may run on; how many a control group pays for, None
    without a quota."""

    machine: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> float:
        """How many can be busy at once."""
        return self.allowed if self.quota is None else min(float(self.allowed), self.quota)


def cores(root: Path = Path("/")) -> Cores:
    """The processors that this process has."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quotas = [quota for group in control_groups("cpu", root) if (quota := _quota(group)) is not None]
    return Cores(machine, allowed, min(quotas, default=None))


def _quota(group: Path) -> float | None:
    words = _text(group / "cpu.max").split()
    if len(words) != 2:
        words = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    return int(words[0]) / int(words[1]) if all(word.isdecimal() for word in words) else None


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the control groups of this process that have the controller, innermost first."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if not names:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in names.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controller, names))]
        else:
            continue
        for mount in mounts:
            # Inside a container the group's path is that of the host, and its own group is the mount itself.
            place = mount / path.lstrip("/")
            yield from (group for group in (place, *place.parents) if group.is_relative_to(mount) and group.is_dir())


def _number(group: Path, *names: str) -> int | None:
    texts = (_text(group / name).strip() for name in names)
    return next((int(text) for text in texts if text.isdecimal()), None)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Disk:
    """Where a folder lies or would lie. Bytes; mount: the mount point; kind: of the file system; writable: by this user."""

    mount: str
    kind: str
    total: int
    free: int
    writable: bool

    @property
    def network(self) -> bool:
        return self.kind in NETWORK


def disk(folder: Path) -> Disk:
    """The file system of a folder, or of the nearest one above it that exists."""
    import psutil

    place = folder.expanduser().absolute()
    here = next(path for path in (place, *place.parents) if path.is_dir()).resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if here.is_relative_to(part.mountpoint)]
    # Of several mounts on one point the last one is seen.
    mounted = max(reversed(mounts), key=lambda part: len(part.mountpoint), default=None)
    sizes = os.statvfs(here)
    return Disk(
        mounted.mountpoint if mounted else "/",
        mounted.fstype if mounted else "unknown",
        sizes.f_blocks * sizes.f_frsize,
        sizes.f_bavail * sizes.f_frsize,
        os.access(here, os.W_OK | os.X_OK),
    )
