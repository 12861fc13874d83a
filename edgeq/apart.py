"""Where two runs of a model part: on this machine and on a device, or of a model and a changed copy (L10)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from edgeq.analyse.divergence import Diverging, here, there
from edgeq.analyse.divergence import divergence as compared
from edgeq.devices import facts_of, fitting
from edgeq.errors import UsageError
from edgeq.facts import environment, samples_facts
from edgeq.given import preprocessing_of, samples_spec
from edgeq.ir import io
from edgeq.packaging import read_directory
from edgeq.report.progress import Progress
from edgeq.report.record import Check, Report
from edgeq.report.recorder import Recorder
from edgeq.run.device import Device, open_device, registry
from edgeq.run.record import Feed
from edgeq.run.samples import load_samples
from edgeq.target.record import CPU, Provider

SAMPLES = 2  # a kernel that is wrong is wrong on any sample; a rare value may want more


def divergence(
    first: str | Path,
    second: str | Path | None = None,
    *,
    calibration: str | None = None,
    on: str | None = None,
    limit: int = SAMPLES,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """The nodes of ``second``, by default the same file, that compute otherwise ``on`` a device, by default here, than
    those of ``first`` do here from equal inputs. Files or packages; ``limit``: samples used.

    UsageError when that is one file on one machine."""
    if second is None and on is None:
        raise UsageError("one model on one machine can't differ", hint="add a second model, or --on DEVICE")
    recorder, spec = Recorder(progress), samples_spec(calibration, synthetic, "sample", "-c")
    with ExitStack() as stack:
        device = stack.enter_context(open_device(registry.address_of(on))) if on else None
        path, provider = _file(Path(first), None)
        other, provider_there = _file(Path(second or first), device)
        mine = io.read(path)
        theirs = mine if other == path else io.read(other)
        shipped = read_directory(Path(first)).preprocessing if Path(first).is_dir() else None
        samples = load_samples(
            spec, mine, preprocessing=preprocessing_of(preprocessing, shipped), model_folder=path.parent, limit=limit
        )
        run = there(device, provider_there) if device else here(provider_there)
        with recorder.step("divergence", len(samples)) as facts:
            found = compared(mine, theirs, list(samples), run, provider=provider)
            facts.update(tensors=found.compared, differ=len(found.rows))
        told = {"device": facts_of(device)} if device else {}
    return Report(
        source={"origin": [str(first), *([str(second)] if second else [])]}, target={}, recipe="divergence",
        steps=tuple(recorder.steps), checks=(check(found),), divergence=found.rows, notices=tuple(recorder.notices),
        environment=environment() | told, samples={"evaluation": samples_facts(samples)},
    )  # fmt: skip


def on_device(device: Device, model: Path, provider: Provider, feeds: Sequence[Feed]) -> Diverging:
    """Where a file parts between this machine and ``device``."""
    read = io.read(model)
    own = replace(CPU, session=dict(provider.session))
    return compared(read, read, feeds, there(device, provider), provider=own)


def check(found: Diverging) -> Check:
    """``diverging_nodes``: how many compute otherwise by more than rounding (none may), and which is the first."""
    beyond = found.beyond
    words = [f"of {found.compared} tensors", f"{len(found.rows) - len(beyond)} more differ by rounding"]
    words += [f"first {beyond[0].node}: {beyond[0].cause}"] if beyond else []
    return Check("diverging_nodes", float(len(beyond)), limit=0.0, passed=not beyond, note="; ".join(words))


def _file(path: Path, device: Device | None) -> tuple[Path, Provider]:
    """The model file of a path, and how it is opened; of a package the variant that fits the device."""
    if not path.is_dir():
        return path, CPU
    if device is not None:
        variant, provider = fitting(path, device)
        return variant.only, provider
    variant = read_directory(path).variants[0]
    return variant.only, replace(CPU, session=dict(variant.report.target.get("session", {})))
