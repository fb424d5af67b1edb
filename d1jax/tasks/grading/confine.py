"""Confines the process that runs untrusted programs: Linux namespaces, a root directory of its own, limits.

Imported by `fork_server.py` alone, in a Python without site-packages. Nothing here imports d1jax or any library.
"""

import ctypes
import os
import resource
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
# A user without a name for each server: limits of processes are a user's. systemd keeps this range for such users.
STRANGER = 61184 + os.getpid() % 4096
SCRATCH = "/tmp/program"  # inside the private root

_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 4096, 16384, 1 << 18, 2, 4
_DETACH = 2
_MOUNT_SETATTR = 442  # the same number on every architecture, Linux 5.12 and newer
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_READ_ONLY_NOSUID_NODEV = 1 | 2 | 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
# What programs may read besides Python itself: the libraries of the system.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# Events that a program may not cause where the kernel does not confine it.
_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.startfile",
)
_CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move",
)  # fmt: skip


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare(flags: int) -> None:
    _check(LIBC.unshare(ctypes.c_int(flags)), "unshare")


def set_namespace(fd: int) -> None:
    _check(LIBC.setns(ctypes.c_int(fd), ctypes.c_int(_NEW_PIDS)), "setns")


def process_control(option: int, value: int) -> None:
    _check(LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), 0, 0, 0), "prctl")


def die_with_parent() -> None:
    """The kernel kills this process when the one that forked it ends."""
    process_control(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Processes that programs leave behind become children of this one, so that it finds and kills them."""
    process_control(_PR_SET_SUBREAPER, 1)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    _check(
        LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {source} on {target}",
    )


def fresh_scratch(megabytes: int) -> None:
    """An empty file system in memory at SCRATCH, over what was there."""
    mount("scratch", SCRATCH, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={megabytes}m,nr_inodes=4096,mode=0777")


def drop_scratch() -> None:
    _check(LIBC.umount2(SCRATCH.encode(), _DETACH), "umount scratch")


def enter_namespaces() -> None:
    """Moves this process into namespaces of its own: users (unless it is root), mounts, network, IPC, host name.

    The next process that it forks is the first of a new process namespace. Raises OSError where the machine forbids it.
    """
    uid, gid = os.getuid(), os.getgid()
    rest = _NEW_MOUNTS | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_PIDS
    try:
        if uid != 0:
            raise PermissionError("only root needs no namespace of users")
        unshare(rest)
    except OSError:  # not root, or a root without the right, as in many containers
        unshare(_NEW_USER | rest)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def private_root(readable: list[str]) -> None:
    """The root becomes a file system in memory: `readable` directories and the system's libraries, all read-only, and
    the place of the scratch directory.
    """
    mount("none", "/", flags=_MS_REC | _MS_PRIVATE)  # what is mounted from here on is seen by nobody else
    root = "/proc"  # there on every Linux, and no Python is installed in it
    mount("root", root, "tmpfs", _MS_NOSUID, "size=4m,mode=0755")
    shown: list[str] = []
    for path in (*_SYSTEM, *readable):
        if os.path.islink(path) and path in _SYSTEM:
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not any(path == other or path.startswith(other + "/") for other in shown):
            _show(path, root)
            attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
            target = ctypes.c_char_p((root + path).encode())
            # -100 is the working directory, 0x8000 all mounts below
            _check(LIBC.syscall(_MOUNT_SETATTR, -100, target, 0x8000, attributes, 32), f"make {path} read-only")
            shown.append(path)
    for path in _DEVICES:
        _show(path, root)
    os.makedirs(root + SCRATCH)
    os.chdir(root)
    # The old root is put on top of the new one, and taken away.
    _check(LIBC.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(LIBC.umount2(b".", _DETACH), "umount the old root")
    os.chdir("/")
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # the root itself; only what is mounted at SCRATCH can be written
    _check(LIBC.syscall(_MOUNT_SETATTR, -100, ctypes.c_char_p(b"/"), 0, read_only, 32), "make the root read-only")


def _show(path: str, root: str) -> None:
    target = root + path
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.isdir(path):
        open(target, "w").close()
    mount(path, target, flags=_MS_BIND | _MS_REC)


def new_process_namespace() -> None:
    """The next process that is forked is the first of a process namespace: when it ends, all of them are killed."""
    unshare(_NEW_PIDS)


def give_up_rights(other_user: bool) -> None:
    """No root (with `other_user`: it becomes a user without a name), no capabilities, and none to be had again by executing anything."""
    if other_user and os.getuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
        except OSError:  # root of a user namespace that knows no other user
            pass
    for capability in range(64):
        LIBC.prctl(ctypes.c_int(_PR_CAPBSET_DROP), ctypes.c_ulong(capability), 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    LIBC.capset(header, none)
    process_control(_PR_SET_NO_NEW_PRIVS, 1)
    process_control(_PR_SET_DUMPABLE, 0)


def limit(seconds: float, megabytes: int, file_megabytes: int, processes: int) -> None:
    """Limits of this process and its children, each on its own; only the number of processes is shared by them."""
    cpu = int(seconds) + 2
    for name, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, file_megabytes << 20),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def forbid_by_audit_hook(scratch: str) -> None:
    """The weaker wall, inside of Python: no sockets, no programs, no ctypes, no change to files outside of `scratch`.

    An audit hook cannot be taken away again by Python code; code that is not Python, once loaded, is not stopped by it.
    """
    inside = os.path.realpath(scratch)
    real, write, null = os.path.realpath, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, os.devnull

    def outside(path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return isinstance(path, os.PathLike)
        return path != null and not (real(path) + "/").startswith(inside + "/")

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"sandbox: {event} is not allowed")
        if event == "open":
            path, mode, flags = arguments
            wanted = isinstance(flags, int) and flags & write or isinstance(mode, str) and set(mode) & set("wax+")
            if wanted and outside(path):
                raise PermissionError("sandbox: files outside of the scratch directory cannot be written")
        elif event in _CHANGES:
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink", "shutil.move") else arguments[:1]
            if any(outside(path) for path in paths):
                raise PermissionError(f"sandbox: {event} outside of the scratch directory is not allowed")

    sys.addaudithook(hook)
