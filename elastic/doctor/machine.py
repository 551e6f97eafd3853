"""Looks at this machine: reads, and changes nothing. Knows Linux; elsewhere most of it is simply not known."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import platform
import resource
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from collectives.sockets import LinkOptions, check_congestion_control

from ..config import ENVIRONMENT, JoinToken, check_endpoint, check_name, environment, switched
from ..messages import PROTOCOL
from .facts import CONTROL, RECEIVE, SEND, SYSCTLS, Clock, Disk, Interface, Machine, Side, last_number

PACKAGES = ("elastic-diloco", "torch", "ray", "pyzmq", "numpy", "msgpack", "xxhash", "safetensors")
CONTROLS = ("cubic", "bbr", "reno")
_SIOCGIFCONF, _SIOCGIFFLAGS, _SIOCGIFMTU = 0x8912, 0x8913, 0x8921
_IFREQ = struct.Struct("16sHH4s16x")  # of a 64-bit system: name, family, port, IPv4 address
_TIMEX = struct.Struct("@I4x4qi")  # modes, offset, frequency, greatest and estimated error (us), status
_UNSYNCHRONISED = 0x40


def look(folder: Path, environ: Mapping[str, str] = os.environ, *, gpus: bool = False) -> Machine:
    """folder: where this machine would write. gpus: torch is loaded to look for them, which takes seconds."""
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        protocol=PROTOCOL,
        packages={name: installed(name) for name in PACKAGES},
        variables=tuple(sorted(name for name in environ if name in ENVIRONMENT)),
        flaws=flaws(environ),
        listen=environ.get("ELASTIC_LISTEN"),
        advertise=environ.get("ELASTIC_ADVERTISE"),
        interfaces=tuple(interfaces()),
        sysctl=sysctl(),
        usable=tuple(name for name in CONTROLS if _usable(name)),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm_free=_shared_memory(),
        disk=disk(folder),
        clock=clock(),
        pidfd=_works(lambda: os.close(os.pidfd_open(os.getpid()))),
        memfd=_works(lambda: os.close(os.memfd_create("elastic-doctor"))),
        gpus=_gpus() if gpus else None,
    )


def side(machine: Machine) -> Side:
    """What a doctor elsewhere is told."""
    return Side(
        version=machine.packages.get("elastic-diloco") or "unknown",
        protocol=machine.protocol,
        control=machine.sysctl.get(CONTROL, ""),
        usable=machine.usable,
        receive=last_number(machine.sysctl.get(RECEIVE, "")),
        send=last_number(machine.sysctl.get(SEND, "")),
    )


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except (OSError, AttributeError):  # no such call in this kernel, or in this Python
        return False
    return True


# --- the environment --------------------------------------------------------------------------------------------------


def flaws(environ: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with which ELASTIC_* variable, in words."""
    found = {}
    for name in sorted(each for each in environ if each.startswith("ELASTIC_")):
        try:
            environment({name: environ[name]})
            CHECKS[name](environ[name])
        except (ValueError, OSError) as error:
            found[name] = str(error)
    return found


def _check_endpoints(what: str, text: str) -> None:
    for each in text.split(",") if text else ():
        check_endpoint(what, each.strip())


def _check_stripes(text: str) -> None:
    LinkOptions(stripes=int(text) if text.isdecimal() else text)


def _check_rounds(text: str) -> None:
    if not text.isdecimal():
        raise ValueError(f"{text!r} must be a number of rounds, or 0")


def _check_folder(text: str) -> None:
    """Events are written there; it may yet have to be made."""
    near = Path(text).absolute()
    while not near.exists():
        near = near.parent
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        raise OSError(f"cannot write to {near}: choose another folder")


CHECKS: dict[str, Callable[[str], object]] = {
    "ELASTIC_JOIN": JoinToken.parse,
    "ELASTIC_RUN": partial(check_name, "run"),
    "ELASTIC_NAME": partial(check_name, "peer"),
    "ELASTIC_SITE": partial(check_name, "site"),
    "ELASTIC_LISTEN": partial(_check_endpoints, "listen"),
    "ELASTIC_ADVERTISE": partial(_check_endpoints, "advertise"),
    "ELASTIC_STRIPES": _check_stripes,
    "ELASTIC_LANES": lambda text: switched("ELASTIC_LANES", {"ELASTIC_LANES": text}),
    "ELASTIC_WITNESS": lambda text: switched("ELASTIC_WITNESS", {"ELASTIC_WITNESS": text}),
    "ELASTIC_EVENTS_DIR": _check_folder,
    "ELASTIC_CHAOS": _check_folder,
    "ELASTIC_RECORD": _check_rounds,
}


# --- the network ------------------------------------------------------------------------------------------------------


def interfaces() -> Iterator[Interface]:
    """Those of this network namespace, as far as they have addresses."""
    addresses: dict[str, list[str]] = {}
    for name, address in [*_version_4(), *_version_6()]:
        addresses.setdefault(name, []).append(address)
    for name, found in addresses.items():
        try:
            mtu, up = _link(name)
        except OSError:  # it is gone again
            continue
        yield Interface(name=name, mtu=mtu, up=up, addresses=tuple(found))


def _link(name: str) -> tuple[int, bool]:
    """Asks a socket and not /sys, which may show another network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16s24x", name.encode())
        (mtu,) = struct.unpack_from("i", fcntl.ioctl(sock, _SIOCGIFMTU, request), 16)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
    return mtu, bool(flags & 1)


def _version_4() -> Iterator[tuple[str, str]]:
    buffer = ctypes.create_string_buffer(_IFREQ.size * 256)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("iP", len(buffer), ctypes.addressof(buffer))
            (size,) = struct.unpack_from("i", fcntl.ioctl(sock, _SIOCGIFCONF, request))
    except OSError:
        return
    for name, family, _, address in _IFREQ.iter_unpack(buffer.raw[: size - size % _IFREQ.size]):
        if family == socket.AF_INET:
            yield name.split(b"\0")[0].split(b":")[0].decode(), socket.inet_ntoa(address)


def _version_6() -> Iterator[tuple[str, str]]:
    """Those that are good beyond one cable."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines():
            address = ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))
            if not address.is_link_local:
                yield line.split()[-1], str(address)


def sysctl() -> dict[str, str]:
    found = {}
    for name in SYSCTLS:
        with contextlib.suppress(OSError):  # another kernel, or not shown in a container
            found[name] = " ".join(Path("/proc/sys", *name.split(".")).read_text().split())
    return found


def _usable(control: str) -> bool:
    try:
        check_congestion_control(control)
    except ValueError:
        return False
    return True


# --- the rest ---------------------------------------------------------------------------------------------------------


def _shared_memory() -> int | None:
    found = disk(Path("/dev/shm"))
    return found.free if found else None


def disk(folder: Path) -> Disk | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return Disk(folder=str(folder), free=found.f_bavail * found.f_frsize, size=found.f_blocks * found.f_frsize)


def clock() -> Clock | None:
    """What the kernel knows of its own time; it is asked, and told nothing."""
    adjtimex = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    buffer = ctypes.create_string_buffer(512)  # modes 0: nothing is set
    if adjtimex is None or adjtimex(buffer) < 0:
        return None
    _, _, _, greatest, _, status = _TIMEX.unpack_from(buffer)
    return Clock(synchronised=not status & _UNSYNCHRONISED, error=greatest / 1e6)


def _gpus() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(f"{each.name} with {each.total_memory / 2**30:.0f} GiB" for each in found)
