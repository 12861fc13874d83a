"""The way over SSH, by paramiko: keys only, and only to hosts whose key is known (L4)."""

from __future__ import annotations

import getpass
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeq.errors import DeviceError, RuntimeUnavailableError
from edgeq.run.device.link import Done, LinkCutError

CONNECT_SECONDS, QUIET_SECONDS = 30.0, 120.0
BLOCK = 1 << 18


class SshLink:
    """See ``link.Link``. Host, user, port and key may be those of ~/.ssh/config."""

    def __init__(self, address: str, host: str, user: str | None, port: int | None) -> None:
        try:
            import paramiko
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"devices over SSH need paramiko: {error}", hint="pip install 'edgeq[device]'"
            ) from error
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # what it logs is raised here as well
        self._paramiko = paramiko
        self._address = address
        config = _config(host)
        self._host = str(config.get("hostname", host))
        self._settings = {
            "port": port or int(config.get("port", 22)),
            "username": user or config.get("user") or getpass.getuser(),
            "key_filename": config.get("identityfile"),
        }
        self._client: Any = None
        self._files: Any = None
        try:
            self.reconnect()
        except LinkCutError as error:
            raise DeviceError(
                f"can't reach {address}: {error}", hint="is it on, in this network, and its sshd running?"
            ) from error

    def reconnect(self) -> None:
        """A new connection. DeviceError for what trying again can't mend: the host's key, or ours."""
        self.close()
        paramiko, client = self._paramiko, self._paramiko.SSHClient()
        client.set_missing_host_key_policy(_refusing(paramiko, self._address))
        try:
            client.load_system_host_keys()
            client.connect(
                self._host, **self._settings, timeout=CONNECT_SECONDS, banner_timeout=CONNECT_SECONDS,
                auth_timeout=CONNECT_SECONDS,
            )  # fmt: skip
            client.get_transport().set_keepalive(15)
            self._files = client.open_sftp()
            self._files.get_channel().settimeout(QUIET_SECONDS)
        except paramiko.BadHostKeyException as error:
            client.close()
            raise DeviceError(
                f"the host key of {self._address} has changed: it shows {_print_of(error.key)}, known is "
                f"{_print_of(error.expected_key)}",
                hint="somebody may be in between. If it was installed anew, remove the old key with "
                f"ssh-keygen -R '{error.hostname}' and accept the new one by ssh",
            ) from error
        except (paramiko.AuthenticationException, paramiko.SSHException) as error:
            client.close()
            if not isinstance(error, paramiko.AuthenticationException) and "No authentication" not in str(error):
                raise LinkCutError(str(error)) from error
            raise DeviceError(
                f"{self._address} takes none of this machine's keys for {self._settings['username']}",
                hint="give it one: ssh-copy-id, or IdentityFile in ~/.ssh/config; passwords aren't asked for",
            ) from error
        except (OSError, EOFError) as error:
            client.close()
            raise LinkCutError(str(error) or type(error).__name__) from error
        self._client = client

    def execute(self, command: str) -> Done:
        with self._wire():
            _, out, error = self._client.exec_command(command, timeout=QUIET_SECONDS)
            texts = out.read().decode(errors="replace"), error.read().decode(errors="replace")
            status = out.channel.recv_exit_status()
        if status < 0:  # the connection ended before the command did
            raise LinkCutError("the connection was closed")
        return Done(status, *texts)

    def put(self, path: Path, name: str) -> None:
        with self._wire():
            size, begun = path.stat().st_size, self._size(f"{name}.part")
            with path.open("rb") as source, self._files.open(f"{name}.part", "ab" if begun else "wb") as sink:
                source.seek(min(begun, size))
                sink.set_pipelined(True)
                while block := source.read(BLOCK):
                    sink.write(block)
            if self._size(f"{name}.part") != size:
                self._files.remove(f"{name}.part")
                raise OSError(f"{name} is not whole")
            self._files.posix_rename(f"{name}.part", name)

    def get(self, name: str, path: Path) -> None:
        with self._wire():
            self._files.get(name, str(path))

    def exists(self, name: str) -> bool:
        with self._wire():
            try:
                self._files.stat(name)
            except FileNotFoundError:
                return False
            return True

    def touch(self, name: str) -> None:
        with self._wire(), self._files.open(name, "w") as file:
            file.write(b".")  # nothing but a change of its contents moves a file's time by the device's clock

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = self._files = None

    def _size(self, name: str) -> int:
        """Bytes there; 0 when there is none."""
        try:
            return int(self._files.stat(name).st_size)
        except FileNotFoundError:
            return 0

    @contextmanager
    def _wire(self) -> Iterator[None]:
        """Tells errors of the link from those of the device, which are OSErrors too."""
        if self._client is None:
            raise LinkCutError("not connected")
        try:
            yield
        except (EOFError, ConnectionError, TimeoutError, self._paramiko.SSHException) as error:
            raise LinkCutError(str(error) or type(error).__name__) from error
        except OSError as error:
            transport = self._client.get_transport()
            if transport is None or not transport.is_active() or "Socket is closed" in str(error):
                raise LinkCutError(str(error)) from error
            raise


def _config(host: str) -> dict[str, Any]:
    """What ~/.ssh/config says of ``host``."""
    import paramiko

    path = Path.home() / ".ssh/config"
    return dict(paramiko.SSHConfig.from_path(str(path)).lookup(host)) if path.is_file() else {}


def _refusing(paramiko: Any, address: str) -> Any:
    """What to do with a host whose key isn't known: nothing, ever."""

    class Refusing(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            client.close()
            port = hostname.rpartition("]:")[2] if hostname.startswith("[") else "22"
            raise DeviceError(
                f"the host key of {address} isn't known: it shows {_print_of(key)}",
                hint="compare it with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints on the device, "
                f"then accept it once: ssh -p {port} {hostname.strip('[').partition(']')[0]}",
            )

    return Refusing()


def _print_of(key: Any) -> str:
    return f"{key.get_name()} {key.fingerprint}"
