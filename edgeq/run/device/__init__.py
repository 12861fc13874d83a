"""Devices by address: ``local``, ``ssh://user@host[:port]``, ``adb://SERIAL``, ``web://wasm``, ``web://webgpu`` (L4).

Options come behind a question mark: ``?python=/path/to/python3`` names the device's interpreter, ``?folder=/path``
where its disk has room, ``?runner=`` what does the jobs there (python, cpp), ``?library=/path`` ONNX Runtime's library
here, which goes along with the C++ runner.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from urllib.parse import parse_qsl, urlsplit

from edgeq.errors import UsageError, did_you_mean
from edgeq.run.device.link import Link, LocalLink
from edgeq.run.device.record import Device, Facts
from edgeq.run.device.remote import Remote

__all__ = ["DEVICES", "Device", "Facts", "open_device"]


def open_device(address: str) -> Device:
    """The device at ``address``, ready for jobs; use it as a context. UsageError for an address that can't be read,
    DeviceError or RuntimeUnavailableError when the device can't be had."""
    scheme, separator, _ = address.partition("?")[0].partition("://")
    if scheme not in DEVICES or not (separator or scheme == "local"):
        hint = "write local, ssh://user@host or adb://SERIAL"
        raise UsageError(f"{address!r} is no address of a device", hint=did_you_mean(scheme, list(DEVICES), hint))
    return DEVICES[scheme](address)


def _options(address: str, known: tuple[str, ...]) -> dict[str, str]:
    found = dict(parse_qsl(urlsplit(address).query, keep_blank_values=True))
    for key, value in found.items():
        if key not in known or not value:
            raise UsageError(f"{address!r} has an option {key}={value}", hint=did_you_mean(key, list(known)))
    return found


def _remote(address: str, link: Callable[[str], Link], **usual: str) -> Device:
    """The machine behind a link to ``address`` without its options; ``usual``: options it has without being told."""
    options = _options(address, ("python", "folder", "runner", "library"))
    if options.get("runner", "cpp") not in ("python", "cpp"):
        raise UsageError(f"{address!r} names a runner that isn't known", hint="runner=python or runner=cpp")
    if "python" in options or usual.get("python"):
        options = {"runner": "python", **options}
    plain = address.partition("?")[0]
    return Remote(plain, link(plain), **{**usual, **options})


def _local(address: str) -> Device:
    """This machine, in processes of their own."""
    return _remote(address, lambda _: LocalLink(), python=sys.executable, folder=tempfile.gettempdir())


def _ssh(address: str) -> Device:
    """A machine over SSH: ssh://user@host[:port]."""
    from edgeq.run.device.ssh import SshLink

    parts = urlsplit(address)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{address!r}: {error}", hint="write ssh://user@host:port") from error
    if not host:
        raise UsageError(f"{address!r} names no host", hint="write ssh://user@host[:port]")
    return _remote(address, lambda plain: SshLink(plain, host, parts.username, port))


def _adb(address: str) -> Device:
    """An Android device as ``adb devices`` lists it, or by its network address: adb://SERIAL, adb://host:port."""
    from edgeq.run.device.adb import FOLDER, AdbLink

    serial = urlsplit(address).netloc
    if not serial:
        raise UsageError(f"{address!r} names no device", hint="write adb://SERIAL, as `adb devices` lists it")
    return _remote(address, lambda plain: AdbLink(plain, serial), folder=FOLDER)


def _web(address: str) -> Device:
    """A browser with onnxruntime-web from npm: web://wasm, web://webgpu."""
    from edgeq.run.device.web import BUILDS, Browser

    options, provider = _options(address, ("build", "ort", "adapter", "browser")), urlsplit(address).netloc
    if provider not in BUILDS:
        raise UsageError(f"{address!r} names no provider", hint="write web://wasm or web://webgpu")
    return Browser(address.partition("?")[0], provider, **options)


DEVICES: dict[str, Callable[[str], Device]] = {"local": _local, "ssh": _ssh, "adb": _adb, "web": _web}
