"""A disk of its own for a run, which can be filled: a tmpfs, where this user may mount one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

BYTES = 2**28


class Disk:
    """A small disk, or a plain directory where none can be mounted.

    Attributes:
      place: its directory.
      reason: why it is none; "" if it is one.
    """

    def __init__(self, place: Path):
        self.place = place
        place.mkdir(parents=True)
        self.reason = ""
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={BYTES}", "soak", place],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                self.reason = f"no tmpfs can be mounted here ({done.stderr.strip()})"
        except OSError as error:
            self.reason = f"no tmpfs can be mounted here ({error.strerror})"

    def fill(self, spare: int) -> None:
        """Fills it, but for some bytes."""
        descriptor = os.open(self.place / "filler", os.O_CREAT | os.O_WRONLY)
        try:
            size, at = 2**24, 0
            while size >= 4096:
                held = os.statvfs(self.place)
                if held.f_bavail * held.f_frsize - size < spare:
                    size //= 2
                    continue
                try:
                    os.posix_fallocate(descriptor, at, size)
                    at += size
                except OSError:
                    size //= 2
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Gives the space back."""
        (self.place / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts it."""
        if not self.reason:
            subprocess.run(["umount", "-l", self.place], check=False)
