"""A filter of system calls that a process puts on itself and can never take off.

Why it exists: limits on memory and time do not keep a taken-over decoder from reading files or calling home. The filter
answers EPERM to every call that opens, connects, starts or signals; what is open already can be read and written.
Containers that allow no filters are no error: the caller is told that there is none.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys

_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_ALLOW, _DENY = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data

# Files, sockets, programs and processes, other processes' memory, and the doors of many kernel holes: bpf, io_uring,
# userfaultfd, keys, mounts.
_SHARED = (425, 434, 435, 437, 438)  # io_uring_setup, pidfd_open, clone3, openat2, pidfd_getfd
_X86_64 = (
    2, 85, 257, 41, 42, 43, 44, 46, 49, 50, 288, 56, 57, 58, 59, 322, 62, 101, 200, 234, 310, 311, 76, 77, 82, 83, 84,
    86, 87, 88, 90, 92, 165, 166, 248, 250, 258, 263, 264, 265, 266, 268, 316, 319, 321, 323,
)  # fmt: skip
_AARCH64 = (
    56, 198, 200, 201, 202, 203, 206, 211, 242, 220, 221, 281, 117, 129, 130, 131, 270, 271, 34, 35, 36, 37, 38, 40, 39,
    45, 46, 53, 54, 217, 219, 276, 279, 280, 282,
)  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def renounce() -> bool:
    """Give up opening, connecting and starting for good. False where the kernel or the machine offers no filter."""
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or struct.calcsize("P") != 8:
        return False
    code = _program(*machine)
    program = _Program(len(code) // 8, ctypes.cast(ctypes.create_string_buffer(code, len(code)), ctypes.c_void_p))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    if prctl(_NO_NEW_PRIVS, 1, None, 0, 0) != 0:
        return False
    return bool(prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program), 0, 0) == 0)


def _program(architecture: int, denied: tuple[int, ...]) -> bytes:
    """Classic BPF: another architecture and every number above the table (x32) are denied, then the list."""
    numbers = sorted({*denied, *_SHARED})
    lines = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 0, len(numbers) + 2, architecture), (_LOAD, 0, 0, _NUMBER),
             (_AT_LEAST, len(numbers), 0, 0x40000000)]  # fmt: skip
    lines += [(_EQUAL, len(numbers) - 1 - place, 0, number) for place, number in enumerate(numbers)]
    # Falling through the list means allowed; a jump from it lands on the last line.
    allow_at = len(lines)
    lines.append((_RETURN, 0, 0, _ALLOW))
    lines.append((_RETURN, 0, 0, _DENY))
    fixed = []
    for place, (kind, yes, no, value) in enumerate(lines):
        if kind == _EQUAL and place >= 4 or kind == _AT_LEAST:
            yes, no = allow_at - place, 0
        elif kind == _EQUAL:
            yes, no = 0, allow_at - place
        fixed.append(struct.pack("<HBBI", kind, yes, no, value))
    return b"".join(fixed)
