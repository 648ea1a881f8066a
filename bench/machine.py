"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor with the instruction set torch uses of it, cores, compute threads, versions."""

    processor: str
    instructions: str
    cores: int
    threads: int
    python: str
    torch: str

    @classmethod
    def this(cls) -> Machine:
        """The machine and process that ask."""
        return cls(
            processor=_processor(),
            instructions=torch.backends.cpu.get_cpu_capability(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
        )

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.instructions}, {self.cores} cores, {self.threads} compute thread(s), "
            f"Python {self.python}, torch {self.torch}"
        )


def _processor() -> str:
    """Linux's name of it where there is one: platform.processor() is often empty."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
