"""A browser of another machine, such as a phone's: where it finds the page, told as an address and as a QR code (L4).

Browsers give WebGPU, threads and SHA-256 to pages of encrypted origins alone. So the server signs a certificate for its
own address, which the browser warns about once: its fingerprint is shown to compare with.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import sys
from pathlib import Path

from edgeq.errors import RuntimeUnavailableError

VALID_DAYS = 1
ELSEWHERE = ("192.0.2.1", 9)  # of no host (RFC 5737): the system says by which of its addresses it would go there


def own_address() -> str:
    """This machine's address on its network; loopback's without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def certified(host: str, folder: Path) -> tuple[ssl.SSLContext, str]:
    """What a server at the IP address ``host`` encrypts with, made anew, and its certificate's SHA-256 fingerprint."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise RuntimeUnavailableError("browser=phone needs cryptography", hint="pip install 'edgeq[device]'") from error
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edgeq")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=VALID_DAYS))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "tls.pem"
    path.touch(0o600)
    path.write_bytes(private + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context, certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def announce(url: str, fingerprint: str) -> None:
    """Tell on stderr where to go."""
    try:
        import segno
    except ImportError as error:
        raise RuntimeUnavailableError("browser=phone needs segno", hint="pip install 'edgeq[device]'") from error
    sys.stderr.write(f"open on the phone: {url}\nits certificate is this machine's own, SHA-256 {fingerprint}\n")
    segno.make(url).terminal(out=sys.stderr, compact=True)
    sys.stderr.flush()
