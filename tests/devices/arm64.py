"""A 64-bit ARM board made of QEMU: a Debian of its own with Python, ONNX Runtime's wheel for ARM and sshd on loopback.

``build`` makes its file system once, in ``~/.cache/edgeq-devices``, without running any of it. ``board`` starts one in
namespaces of its own: a clean layer over those files, its own processes, the CPU it claims to be in /proc/cpuinfo. It
needs root. Emulation is 10 to 50 times slower than a board, so nothing here tells how fast anything is.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("python3-minimal", "python3", "libstdc++6", "openssh-server", "openssh-sftp-server", "coreutils", "dash",
            "sed", "grep", "libc-bin")  # fmt: skip
WHEELS = ("numpy", "onnxruntime")
PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 27, 28, 31, 34, 35))
TOOLS = ("mmdebstrap", "qemu-aarch64-static", "ssh-keygen", "unshare", "chroot")
CACHE = Path.home() / ".cache/edgeq-devices"  # told now: tests give clients homes of their own
BINFMT = Path("/proc/sys/fs/binfmt_misc")


@dataclass(frozen=True)
class Core:
    """A kind of core: QEMU's model, and what Linux says of it. ``part`` names it to the runtime's CPU detection."""

    qemu: str
    part: int
    features: str


_V8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CORES = {
    "a72": Core("cortex-a72", 0xD08, "fp asimd evtstrm crc32 cpuid"),  # Raspberry Pi 4: no dot product
    "a76": Core("cortex-a76", 0xD0B, _V8_2),  # Raspberry Pi 5, RK3588: dot product
    "a715": Core(
        "max,sve=off,sme=off", 0xD4D, f"{_V8_2} jscvt fcma sha3 sha512 asimdfhm dit uscat ilrcpc flagm i8mm bf16"
    ),
}


@dataclass(frozen=True)
class Board:
    """A running board. ``files``: its root directory, as this machine sees it; ``home``: a client's, whose key it
    takes and whose known_hosts knows it; ``inside``: a process in its namespaces; ``environment``: of its programs."""

    port: int
    files: Path
    home: Path
    inside: int = field(repr=False)
    environment: dict[str, str] = field(repr=False)

    @property
    def address(self) -> str:
        return f"ssh://root@127.0.0.1:{self.port}"


def lacking() -> str:
    """Why no board can be built on this machine, "" where one can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "boards need Linux and root"
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(tools)} missing" if tools else ""


def missing() -> str:
    """Why no board can run on this machine, "" where one can."""
    return lacking() or ("" if (_folder() / "built").is_file() else f"{_folder()} isn't built")


def build() -> Path:
    """The files of the board, built if need be: about half a minute."""
    folder = _folder()
    if (folder / "built").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    release = subprocess.run(
        ["sh", "-c", ". /etc/os-release; echo $VERSION_CODENAME"], capture_output=True, text=True, check=True
    ).stdout.strip()
    _must(
        "mmdebstrap",
        "--arch=arm64",
        "--variant=extract",
        "--mode=root",
        f"--include={','.join(PACKAGES)}",
        release,
        folder,
    )
    python = next((folder / "usr/bin").glob("python3.[0-9]*")).name  # the maintainer scripts that link it never ran
    (folder / "usr/bin/python3").unlink(missing_ok=True)
    (folder / "usr/bin/python3").symlink_to(python)
    (folder / "usr/lib/sftp-server").unlink(missing_ok=True)
    for name in ("proc", "dev", "tmp", "var/tmp", "run/sshd", "root/.ssh", "opt/site", "sys/devices/system/cpu"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present"):  # never the host's sysfs: ONNX Runtime's import crashes on it
        (folder / "sys/devices/system/cpu" / name).write_text("0-3\n")
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n")
    (folder / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    _must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "etc/ssh/ssh_host_ed25519_key")
    _must(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", python.removeprefix("python"),
        *(f"--platform={name}" for name in PLATFORMS), "--constraint", ROOT / "constraints.txt",
        "--target", folder / "opt/site", *WHEELS,
    )  # fmt: skip
    if python == f"python3.{sys.version_info.minor}":  # the board would compile each module anew, 20 times slower
        _must(
            sys.executable,
            "-m",
            "compileall",
            "-q",
            "--invalidation-mode",
            "unchecked-hash",
            folder / "usr/lib" / python,
        )
    (folder / "built").touch()
    return folder


def library() -> Path:
    """ONNX Runtime's library for the board."""
    return next(_folder().glob("opt/site/onnxruntime/capi/libonnxruntime.so.*"))


def _folder() -> Path:
    """Where the board's files lie; another place for other contents."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.split("==")[0] in WHEELS]
    key = hashlib.sha256(" ".join([*PACKAGES, *pins, inspect.getsource(build)]).encode()).hexdigest()[:12]
    return CACHE / f"arm64-{key}"


def _must(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words[0]}: {done.stderr[-2000:]}"


def register() -> None:
    """Let the kernel run ARM programs through QEMU, by the rule Debian ships for it."""
    if not (BINFMT / "register").exists():
        _must("mount", "-t", "binfmt_misc", "none", BINFMT)
    if not (BINFMT / "qemu-aarch64").exists():
        (BINFMT / "register").write_text(Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_text())


# $1 files, $2 folder for the layer, $3 cpuinfo, $4 command. /small is a disk that is soon full.
START = """
mkdir -p "$2/up" "$2/work" "$2/root" &&
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/up,workdir=$2/work" "$2/root" &&
mkdir -p "$2/root/small" && mount -t tmpfs -o size=1M tmpfs "$2/root/small" &&
mount -t proc proc "$2/root/proc" && mount --bind "$3" "$2/root/proc/cpuinfo" && mount --bind /dev "$2/root/dev" &&
exec chroot "$2/root" /bin/sh -c "$4"
"""


@contextmanager
def board(
    core: str, home: Path, *, port: int | None = None, environment: str = "PYTHONPATH=/opt/site"
) -> Iterator[Board]:
    """A board with ``core``, until the context ends. ``home`` gets a key and known_hosts unless it has them.

    ``environment``: what programs find there, in the form of sshd's SetEnv."""
    register()
    port = port or free_port()
    kind = CORES[core]
    _client(home, port)
    layer = home / f"board-{port}"
    layer.mkdir(exist_ok=True)
    cpuinfo = home / f"cpuinfo-{core}"
    cpuinfo.write_text("\n".join(_processor(index, kind) for index in range(4)))
    key = (home / ".ssh/id_ed25519.pub").read_text().strip()
    sshd = (
        f"mkdir -p /root/.ssh; echo '{key}' > /root/.ssh/authorized_keys; chmod 700 /root /root/.ssh; "
        f"exec /usr/sbin/sshd -D -e -p {port} -f /dev/null -o ListenAddress=127.0.0.1 -o UsePAM=no -o StrictModes=no "
        f"-o HostKey=/etc/ssh/ssh_host_ed25519_key -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password "
        f"-o 'Subsystem=sftp internal-sftp' -o PidFile=none -o 'SetEnv=QEMU_CPU={kind.qemu} {environment}'"
    )
    with (layer.parent / f"sshd-{port}.log").open("ab") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", START, "sh",
             str(_folder()), str(layer), str(cpuinfo), sshd],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "QEMU_CPU": kind.qemu},
        )  # fmt: skip
    try:
        _wait_for(port, process)
        inside = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        found = dict(word.split("=", 1) for word in (f"QEMU_CPU={kind.qemu}", *environment.split()))
        yield Board(port, Path(f"/proc/{inside}/root"), home, inside, {"PATH": "/usr/bin:/bin", **found})
    finally:
        process.kill()
        process.wait()


PLACES = ("var/tmp", "tmp", "small", "data/local/tmp")


def left(board: Board, seconds: float = 3.0) -> list[Path]:
    """What of ours lies on the board, once it has had the time to tidy up."""
    end = time.monotonic() + seconds
    places = [board.files / place for place in PLACES if (board.files / place).is_dir()]
    while found := [path for place in places for path in place.iterdir()]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return found


def _client(home: Path, port: int) -> None:
    """A key, and the board's in known_hosts."""
    folder = home / ".ssh"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / "id_ed25519").exists():
        _must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "id_ed25519")
    kind, key = (_folder() / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    with (folder / "known_hosts").open("a") as file:
        file.write(f"[127.0.0.1]:{port} {kind} {key}\n")


def _processor(index: int, core: Core) -> str:
    rows = {"processor": index, "BogoMIPS": "108.00", "Features": core.features, "CPU implementer": "0x41",
            "CPU architecture": 8, "CPU variant": "0x1", "CPU part": f"{core.part:#x}", "CPU revision": 1}  # fmt: skip
    return "".join(f"{key}\t: {value}\n" for key, value in rows.items())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the board ended: see sshd's log"
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.settimeout(5)
                if connection.recv(3) == b"SSH":
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"no sshd on port {port} after 30 s")
