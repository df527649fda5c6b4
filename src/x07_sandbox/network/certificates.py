"""The user's own certificate authorities, which programs in the guest trust in addition to those of the image."""

import base64
import re
import textwrap
from pathlib import Path
from typing import Final

from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import read_bounded

_MAX_BYTES: Final = 256 * 1024
_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")


def read_certificates(path: Path) -> bytes:
    """Return the certificates of a PEM file, without the text around them. Raises UsageError for any other content."""
    import ssl  # slow to import, and few runs need it

    what, fix = f"cannot use the certificates in {path}", "Use a PEM file that contains only certificates"
    text = read_bounded(path, "certificates", _MAX_BYTES).decode("utf-8", "replace")
    found = _CERTIFICATE.findall(text)
    if "PRIVATE KEY" in text:
        raise UsageError(what, "the file contains a private key", fix)
    if not found or "-----" in _CERTIFICATE.sub("", text):
        raise UsageError(what, "the file has no certificates, or also something else in PEM format", fix)
    lines = ("\n".join(textwrap.wrap("".join(one.split()), 64)) for one in found)
    pem = "".join(f"-----BEGIN CERTIFICATE-----\n{one}\n-----END CERTIFICATE-----\n" for one in lines)
    try:
        whole = all(map(_is_one_sequence, map(base64.b64decode, found)))
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as exc:
        raise UsageError(what, "a certificate is malformed", fix) from exc
    if not whole:
        raise UsageError(what, "a certificate is malformed", fix)
    return pem.encode()


def _is_one_sequence(der: bytes) -> bool:
    """Return whether *der* is one SEQUENCE and nothing more, since OpenSSL ignores what follows it (X.690, 8.1.3)."""
    head = 2 + (der[1] & 0x7F if der[1:2] >= b"\x80" else 0)
    return len(der) == head + int.from_bytes(der[2:head] or der[1:2])
