"""TLS of the DICOM door by PS3.15's profiles: BCP 195 RFC 8996, 9325 (B.12) and the non-downgrading kind (B.13)."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path
from typing import Literal

from shared.errors import ConfigError
from shared.log import get_logger

Profile = Literal["bcp195", "non-downgrading"]

# RFC 9325 section 4.2; TLS 1.3's own suites are always on. The server's order wins.
_RECOMMENDED = (
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
)
# What B.12 still lets older equipment negotiate: finite-field ephemeral keys of at least 2048 bits.
_TOLERATED = ("DHE-RSA-AES256-GCM-SHA384", "DHE-RSA-AES128-GCM-SHA256")
_GROUP = Path(__file__).with_name("ffdhe3072.txt")  # RFC 7919
SUITES: dict[Profile, tuple[str, ...]] = {"bcp195": _RECOMMENDED + _TOLERATED, "non-downgrading": _RECOMMENDED}


class Tls:
    """Certificate, key and client CA by path; read again when one of the files changes, without a restart.

    Every client needs a certificate of `ca`. A changed file that cannot be used leaves the last good one in service.
    """

    def __init__(self, certificate: Path, key: Path, ca: Path, profile: Profile = "bcp195") -> None:
        self._files = (certificate, key, ca)
        self._profile = profile
        self._lock = threading.Lock()
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """Returns the context for the next connection.

        Raises:
            ConfigError: the files cannot be used and never could since the start.
        """
        with self._lock:
            try:
                stamp = tuple((s.st_mtime_ns, s.st_ino) for s in (path.stat() for path in self._files))
                if self._context is None or stamp != self._stamp:
                    self._context, self._stamp = self._build(), stamp
            except (OSError, ssl.SSLError) as exc:
                if self._context is None:
                    raise ConfigError(
                        f"The DICOM door's certificate cannot be used: {exc}.",
                        cure="Set dicom.tls.certificate, key and ca to PEM files that belong together.",
                    ) from exc
                get_logger().error("intake.certificate_unusable", error=type(exc).__name__)
            return self._context

    def calling(self) -> ssl.SSLContext:
        """Returns the context for a connection of ours to one of those clients; made anew, it is seldom needed.

        Names are not compared: a peer is called at the address that it called from, under a CA that has no others.

        Raises:
            ConfigError: the files cannot be used.
        """
        try:
            return self._build(ssl.PROTOCOL_TLS_CLIENT)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"The DICOM door's certificate cannot be used: {exc}.") from exc

    def _build(self, role: int = ssl.PROTOCOL_TLS_SERVER) -> ssl.SSLContext:
        certificate, key, ca = self._files
        context = ssl.SSLContext(role)
        context.check_hostname = False
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(":".join(SUITES[self._profile]))
        context.load_dh_params(str(_GROUP))
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.load_cert_chain(certificate, key)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca)
        return context
