"""The user's own certificates: only certificates are accepted, and nothing else of the file is passed on."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

from x07_sandbox.errors import UsageError
from x07_sandbox.network.settings import read_certificates

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority."""
    return trustme.CA()


def test_certificates_are_passed_on_without_their_comments(tmp_path: Path, authority: trustme.CA) -> None:
    """Comments around the certificates, and the file's form of line ends, are dropped."""
    pem = authority.cert_pem.bytes()
    path = tmp_path / "ca.pem"
    path.write_bytes(b"# the company's\r\n" + pem.replace(b"\n", b"\r\n") + b"\nsubject=x\n" + pem)
    assert read_certificates(path) == pem * 2


def test_anything_else_is_refused(tmp_path: Path, authority: trustme.CA) -> None:
    """A file with a key, another PEM object, a malformed certificate, no certificate or too many bytes is refused."""
    pem, path = authority.cert_pem.bytes(), tmp_path / "ca.pem"
    leaf = authority.issue_cert("a.example")
    malformed = b"-----BEGIN CERTIFICATE-----\nMAAA\n-----END CERTIFICATE-----\n"
    cases = {
        leaf.private_key_and_cert_chain_pem.bytes(): "a private key",
        pem + b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n": "a private key",
        pem + b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n": "something else in PEM",
        ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pem.decode()) + b"more").encode(): "malformed",
        pem[:-20]: "something else in PEM",
        b"": "no certificates",
        pem + malformed: "malformed",
        pem + b"#" * (256 << 10): "more than 262144 bytes",
    }
    for data, why in cases.items():
        path.write_bytes(data)
        with pytest.raises(UsageError, match=why):
            read_certificates(path)
    with pytest.raises(UsageError, match="No such file"):
        read_certificates(tmp_path / "missing")
