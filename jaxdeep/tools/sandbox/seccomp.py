"""The filter of system calls, as a BPF program that the kernel or bubblewrap takes.

What it refuses, a program that computes has no use for: tracing other processes, new namespaces,
mounts, kernel interfaces with a history of holes. The strict form, for the level without a network
namespace, refuses the network as well: there is no socket but a pair, or a stream of the local
kind, and nothing can be connected or sent to an address.
"""

from __future__ import annotations

import errno
import platform
import struct

# system calls by number: x86-64, and the list that arm64 and riscv64 share
_NUMBERS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "personality": (135, 92),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "vmsplice": (278, 75),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_SOCKET, _SOCKETPAIR = (41, 198), (53, 199)
_CONNECT, _SENDMMSG = (42, 203), (307, 269)
_ARCHES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_NAMESPACES = 0x7E020080  # CLONE_NEW* in the flags of clone
_OWN_FAMILIES = (1, 2, 10, 16)  # local, IPv4, IPv6, netlink: what a network namespace keeps apart
_AF_UNIX, _STREAM, _SEQPACKET, _TYPE = 1, 1, 5, 0xF

_LOAD, _JEQ, _JGE, _JSET, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARGS = 0, 4, 16


def supported() -> bool:
    """Whether there is a filter for this machine's architecture."""
    return platform.machine() in _ARCHES


def program(*, network: bool) -> bytes:
    """The filter as instructions of 8 bytes. `network`: sockets are allowed, for a program that has
    a network namespace of its own."""
    arch, column = _ARCHES[platform.machine()]
    code: list[bytes] = []

    def add(op: int, k: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append(struct.pack("=HBBI", op, if_true, if_false, k))

    def refuse(number: int, error: int = errno.EPERM) -> None:
        add(_JEQ, number, 0, 1)
        add(_RETURN, _ERRNO | error)

    add(_LOAD, _ARCH)
    add(_JEQ, arch, 1, 0)
    add(_RETURN, _KILL)
    add(_LOAD, _NR)
    if column == 0:
        add(_JGE, 0x40000000, 0, 1)  # the x32 calls, other numbers for the same things
        add(_RETURN, _ERRNO | errno.ENOSYS)
    for numbers in _NUMBERS.values():
        refuse(numbers[column])
    # its flags lie in memory, where a filter cannot look; libraries then use clone
    refuse(_CLONE3[column], errno.ENOSYS)
    add(_JEQ, _CLONE[column], 0, 4)
    add(_LOAD, _ARGS)
    add(_JSET, _NAMESPACES, 0, 1)
    add(_RETURN, _ERRNO | errno.EPERM)
    add(_RETURN, _ALLOW)
    if network:
        add(_JEQ, _SOCKET[column], 0, 3 + len(_OWN_FAMILIES))
        add(_LOAD, _ARGS)
        for left, family in reversed(list(enumerate(_OWN_FAMILIES))):
            add(_JEQ, family, left + 1, 0)
        add(_RETURN, _ERRNO | errno.EACCES)
        add(_RETURN, _ALLOW)
    else:
        refuse(_CONNECT[column], errno.EACCES)
        refuse(_SENDMMSG[column], errno.EACCES)
        for number, kinds in ((_SOCKET, (_STREAM,)), (_SOCKETPAIR, (_STREAM, _SEQPACKET))):
            add(_JEQ, number[column], 0, 7 + len(kinds))
            add(_LOAD, _ARGS)
            add(_JEQ, _AF_UNIX, 1, 0)
            add(_RETURN, _ERRNO | errno.EACCES)
            add(_LOAD, _ARGS + 8)
            add(_AND, _TYPE)
            for left, kind in reversed(list(enumerate(kinds))):
                add(_JEQ, kind, left + 1, 0)
            add(_RETURN, _ERRNO | errno.EACCES)
            add(_RETURN, _ALLOW)
    add(_RETURN, _ALLOW)
    return b"".join(code)
