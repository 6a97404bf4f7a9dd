"""Checks of torch and of the accelerators it is to compute on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ckptd.cli.doctor.finding import Finding, failed, ok, skipped, warning

SLOW_IMPORT_S = 6.0
"""torch from cached bytecode takes 2 to 3 s of an ordinary core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """What a process of its own said after importing torch and computing a little."""

    error: str | None = None
    """Why it could not be imported, or does not compute; the rest is empty then."""
    version: str = ""
    cuda_build: str | None = None
    """The CUDA version it was built for; None for a build without."""
    devices: tuple[str, ...] = ()
    """Names of the accelerators that it sees."""
    cuda_error: str | None = None
    import_s: float = 0.0


def torch(found: Torch, *, computes: bool) -> Finding:
    """Check that torch computes on the CPU; `computes` says whether a definition needs it."""
    if found.error is not None:
        hint = (
            "install torch in this environment; where a convolution fails, MemoryDenyWriteExecute "
            "is set in the unit: take it out"
        )
        report = failed if computes else warning
        return report("torch", f"does not work: {found.error}", hint)
    if found.import_s > SLOW_IMPORT_S:
        return warning(
            "torch",
            f"{found.version} takes {found.import_s:.1f} s to import",
            "see that its bytecode is cached and its disk is not a slow network file system",
        )
    return ok("torch", f"{found.version}, imported in {found.import_s:.1f} s")


def gpu(found: Torch, *, files: Collection[str], asked: Collection[str]) -> list[Finding]:
    """Check the accelerators: `files` have device files here, `asked` are named by definitions."""
    name = "gpu"
    if found.error is not None:
        return [skipped(name, "torch does not work")]
    if found.devices:
        return _missing(found, asked) or [ok(name, ", ".join(found.devices))]
    wanted = sorted(device for device in asked if device.startswith("cuda"))
    report = failed if wanted else warning
    if files and found.cuda_build is None:
        return [
            report(
                name,
                f"{len(files)} accelerators, but torch {found.version} is built without CUDA",
                "install torch from its CUDA index, or say `device: cpu` in the definitions",
            )
        ]
    if files:
        return [
            report(
                name,
                f"{len(files)} accelerators, but torch cannot use them: "
                f"{found.cuda_error or 'it says no more'}",
                "is /dev/nvidia-uvm there (nvidia-persistenced, `nvidia-modprobe -u`), and does the "
                "unit allow the devices (DeviceAllow=char-nvidia, no PrivateDevices)?",
            )
        ]
    if wanted:
        return [
            failed(
                name,
                f"definitions ask for {', '.join(wanted)}, and there is no accelerator",
                "say `device: auto` or `device: cpu`; under systemd, see that the unit allows it",
            )
        ]
    return [skipped(name, "no accelerator here: stages compute on the CPU")]


def _missing(found: Torch, asked: Collection[str]) -> list[Finding]:
    """Return a finding for each device that is asked for beyond those there are."""
    numbers = {device: device.partition(":")[2] for device in asked if device.startswith("cuda:")}
    return [
        failed(
            "gpu",
            f"definitions ask for {device}, there are {len(found.devices)} accelerators",
            "name another one in `device`",
        )
        for device, number in sorted(numbers.items())
        if int(number) >= len(found.devices)
    ]
