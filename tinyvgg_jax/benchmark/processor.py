"""The processor: its model, its cores and the instruction sets on which its speed depends."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

# The names by which Linux knows instruction sets, on x86 and on ARM, and the usual ones.
_LINUX = {
    "avx2": "AVX2",
    "avx512f": "AVX-512F",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "avx512_fp16": "AVX512_FP16",
    "amx_int8": "AMX_INT8",
    "amx_bf16": "AMX_BF16",
    "neon": "NEON",
    "asimd": "NEON",
    "sve": "SVE",
    "sve2": "SVE2",
    "bf16": "BF16",
    "sme": "SME",
}
# The same for macOS, whose `sysctl` answers 1 or 0 for each.
_MACOS = {
    "hw.optional.avx2_0": "AVX2",
    "hw.optional.avx512f": "AVX-512F",
    "hw.optional.neon": "NEON",
    "hw.optional.arm.FEAT_BF16": "BF16",
    "hw.optional.arm.FEAT_SME": "SME",
}
# Each of them multiplies bfloat16 numbers.
_BFLOAT16 = {"AVX512_BF16", "AMX_BF16", "BF16"}


class Processor(NamedTuple):
    """A processor.

    Attributes:
        model: its model, as the system names it.
        cores: number of cores that this process may use.
        instructions: those of its instruction sets that matter for training, like "AVX2".
    """

    model: str
    cores: int
    instructions: tuple[str, ...]

    @property
    def has_bfloat16(self) -> bool:
        """True if it multiplies bfloat16 numbers itself; otherwise software imitates that."""
        return bool(_BFLOAT16.intersection(self.instructions))

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        known = ", ".join(self.instructions) or "no instruction sets known"
        return f"{cores} of {self.model} ({known})"


def find_processor() -> Processor:
    """Finds the processor on which this process runs."""
    # A container or `taskset` may allow fewer cores than there are.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    fallback = platform.processor() or platform.machine() or "an unknown processor"
    if platform.system() == "Darwin":
        model, instructions = _from_sysctl(_sysctl())
    else:
        try:
            model, instructions = from_cpuinfo(Path("/proc/cpuinfo").read_text())
        except OSError:
            model, instructions = "", ()
    return Processor(model or fallback, cores, instructions)


def from_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Reads the model and the instruction sets from Linux's /proc/cpuinfo.

    Args:
        text: its content.

    Returns:
        The model, empty if it is not there, as on ARM; and the instruction sets that are there.
    """
    # The first processor's lines come first, and all are alike.
    fields: dict[str, str] = {}
    for name, value in re.findall(r"^([^\t:\n]+?)[ \t]*:[ \t]*(.*)$", text, re.MULTILINE):
        fields.setdefault(name, value.strip())
    model = fields.get("model name", "")
    if model and "cpu family" in fields:
        # Virtual machines may hide which EPYC or Xeon it is; its family and model still tell.
        model += f", family {fields['cpu family']} model {fields.get('model')}"
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return model, tuple(dict.fromkeys(word for flag, word in _LINUX.items() if flag in flags))


def _from_sysctl(values: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    """Reads the model and the instruction sets from the values of macOS's sysctl."""
    found = tuple(word for name, word in _MACOS.items() if values.get(name) == "1")
    return values.get("machdep.cpu.brand_string", ""), found


def _sysctl() -> dict[str, str]:
    """Asks macOS's sysctl for what is known of the processor; empty if it does not answer."""
    command = ["sysctl", "machdep.cpu.brand_string", *_MACOS]
    try:
        # Names that the processor does not know are errors on standard error, and no lines.
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = (line.partition(": ") for line in done.stdout.splitlines())
    return {name: value for name, _, value in lines}
