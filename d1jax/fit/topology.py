"""The devices that a run is planned for, and what one of them can do. None of them need be here.

TPUs are described by libtpu, whose compiler then compiles for them on any machine. GPUs are stood for by virtual CPU devices.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from d1jax.config import UserError

GIB = 2**30
MAX_DEVICES = 4096
FORMS = "v5e:2x4, v6e:2x4, v5p:2x2x2 (the chips along each axis), gpu:8x80GiB, cpu:8"


@dataclass(frozen=True)
class Part:
    """One device. bfloat16 products, memory, and all links of a device to others in one direction; None where it is not known."""

    name: str
    memory: int  # bytes
    flops: float | None = None  # per second
    bandwidth: float | None = None  # bytes per second
    links: float | None = None  # bytes per second
    share: float = 1.0  # of the memory that a program may have

    @property
    def usable(self) -> int:
        """Bytes."""
        return int(self.share * self.memory)


# The TPU compiler keeps 0.25 of 16 GiB for itself; a GPU has a context, and JAX is commonly given 0.95 of it.
TPU_SHARE, GPU_SHARE = 0.98, 0.95
# Sources: TPUs https://cloud.google.com/tpu/docs/v5e, /v6e, /v5p (system architecture); GPUs: NVIDIA's data sheets of H100 and H200 SXM
# (dense bfloat16; NVLink in one direction).
PARTS = {
    "v5e": Part("TPU v5e", 16 * GIB, 197e12, 819e9, 200e9, TPU_SHARE),
    "v6e": Part("TPU v6e", 32 * GIB, 918e12, 1640e9, 400e9, TPU_SHARE),
    "v5p": Part("TPU v5p", 95 * GIB, 459e12, 2765e9, 600e9, TPU_SHARE),
}
GPUS = {
    80: Part("H100 80 GiB", 80 * GIB, 989e12, 3350e9, 450e9, GPU_SHARE),
    141: Part("H200 141 GiB", 141 * GIB, 989e12, 4800e9, 450e9, GPU_SHARE),
}
KINDS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p", "TPU v5p": "v5p"}  # as JAX calls them
# No question to the metadata server of a machine that is no cloud machine, and no lock on a TPU that a run may hold. The last two
# are what libtpu would complain about; the topology is another.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
AXES_OF = {"v5e": 2, "v6e": 2, "v5p": 3}


@dataclass(frozen=True)
class Topology:
    """What a program is compiled for."""

    text: str
    platform: str  # cpu, gpu, tpu
    part: Part
    shape: tuple[int, ...]
    is_here: bool = False  # the devices of this machine

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def has_compiler(self) -> bool:
        """Whether programs are compiled by the compiler of what they will run on, so that its temporaries are known."""
        return self.platform != "gpu" or self.is_here

    @property
    def doubled(self) -> Topology | None:
        """Twice the devices of the same kind."""
        if self.is_here:
            return None
        axis = self.shape.index(min(self.shape))
        shape = tuple(size * (2 if index == axis else 1) for index, size in enumerate(self.shape))
        name = self.text.partition(":")[0]
        sizes = "x".join(map(str, shape))
        if name == "gpu":
            sizes += f"x{self.part.memory / GIB:g}GiB"
        return parse_topology(f"{name}:{sizes}")


def parse_topology(text: str) -> Topology:
    """`v5e:2x4`, `gpu:8x80GiB`, `cpu:8`. Raises UserError that names the known ones."""
    name, _, sizes = text.partition(":")
    gpu = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)GiB", sizes)
    if name == "gpu" and gpu:
        count, memory = int(gpu[1]), float(gpu[2])
        part = GPUS.get(round(memory), Part(f"GPU of {memory:g} GiB", round(memory * GIB), share=GPU_SHARE))
        return _checked(Topology(text, "gpu", part, (count,)))
    shape = tuple(int(size) for size in sizes.split("x")) if re.fullmatch(r"\d+(x\d+)*", sizes) else ()
    if name == "cpu" and len(shape) == 1:
        return _checked(Topology(text, "cpu", cpu_part(shape[0]), shape))
    if name in AXES_OF and len(shape) == AXES_OF[name]:
        return _checked(Topology(text, "tpu", PARTS[name], shape))
    if name in AXES_OF and shape:
        raise UserError(f"--topology {text!r}: a {name} has {AXES_OF[name]} axes, as in {FORMS}")
    raise UserError(f"--topology {text!r} is not known; write one of {FORMS}")


def _checked(topology: Topology) -> Topology:
    if not 0 < topology.count <= MAX_DEVICES or topology.part.memory <= 0:
        raise UserError(f"--topology {topology.text!r} has {topology.count} devices; write from 1 to {MAX_DEVICES}")
    return topology


def cpu_part(devices: int) -> Part:
    """A share of this machine's memory: virtual devices have no other."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Part(f"1/{devices} of this machine" if devices > 1 else "this machine", memory // max(devices, 1))


def of_this_machine() -> Topology:
    """The devices that JAX finds here."""
    devices = jax.devices()
    kind, platform = devices[0].device_kind, devices[0].platform
    shape = (len(devices),)
    if platform == "tpu":
        part = PARTS.get(KINDS.get(kind, ""), Part(kind, _limit(devices[0])))
    elif platform == "cpu":
        part = cpu_part(len(devices))
    else:
        limit = _limit(devices[0])
        known = [gpu for name, gpu in GPUS.items() if {80: "H100", 141: "H200"}[name] in kind]
        part = Part(kind, limit, *((known[0].flops, known[0].bandwidth, known[0].links) if known else ()))
    return Topology(f"{len(devices)} x {kind}", "gpu" if platform in ("cuda", "rocm") else platform, part, shape, True)


def _limit(device: jax.Device) -> int:
    """What JAX lets a program have of a device's memory."""
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def prepare(topology: Topology | None) -> None:
    """Settings of JAX that must be made before anything touches a device. None: the devices of this machine."""
    if topology is None:
        return
    jax.config.update("jax_platforms", "cpu")  # a planner takes no accelerator
    if topology.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology {topology.text!r} is compiled by libtpu, which is not installed: pip install 'd1jax[tpu]' (200 MB; it needs "
                f"no TPU), or take --topology cpu:{topology.count}, which gives exact sizes of weights, optimizer and reference, "
                "but not the temporaries of the accelerator"
            )
        for name, value in LIBTPU.items():
            os.environ.setdefault(name, value)
        return
    try:
        jax.config.update("jax_num_cpu_devices", topology.count)
    except RuntimeError:  # a backend has started: what it has must do
        pass


def devices_of(topology: Topology) -> Sequence[jax.Device]:
    """Devices to make a mesh of. Raises UserError for a layout that there is not."""
    if topology.is_here:
        return jax.devices()
    if topology.platform != "tpu":
        found = jax.devices("cpu")
        if len(found) < topology.count:
            raise UserError(
                f"--topology {topology.text!r} needs {topology.count} virtual CPU devices, and this process has started with {len(found)}"
            )
        return found[: topology.count]
    from jax.experimental import topologies

    chips_per_host = (*(min(2, size) for size in topology.shape[:2]), 1)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.text, chips_per_host_bounds=chips_per_host
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology {topology.text!r}: libtpu knows no such layout ({str(error).partition(chr(10))[0]}); "
            f"take even numbers, as in {FORMS}"
        ) from None
    return found.devices
