"""Files from the cloud's node port over HTTPS: resumed, limited, verified, whole under their name."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx

from shared.errors import LinkError, TrustError
from shared.files import fsync_folder, sha256_file, translate_os_error

LENGTH_LIMIT_BYTES = 512 * 1024 * 1024
_PIECE_BYTES = 256 * 1024
_TIMEOUT = httpx.Timeout(20.0, connect=5.0)


class NodePort:
    """The cloud's HTTPS port for nodes, spoken to with the device certificate (TLS 1.3)."""

    def __init__(self, url: str, *, ca: Path, certificate: Path, key: Path) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate, key)
        self._client = httpx.Client(base_url=url, verify=context, timeout=_TIMEOUT)

    def get(self, path: str, max_length: int) -> bytes | None:
        """Returns the body of GET `path`, or None when the cloud has no such file.

        Raises:
            LinkError: the cloud cannot be reached or answers an error.
            TrustError: the body is longer than `max_length` bytes.
        """
        with self._stream(path, 0) as response:
            if response.status_code == httpx.codes.NOT_FOUND:
                return None
            _expect(response, httpx.codes.OK)
            body = bytearray()
            for piece in response.iter_raw(_PIECE_BYTES):
                body += piece
                if len(body) > max_length:
                    raise TrustError(f"{path} is longer than {max_length} bytes.")
            return bytes(body)

    def download(self, path: str, target: Path, sha256: str, length: int) -> None:
        """Brings GET `path` to `target`; nothing happens when it is there; a part is resumed.

        Raises:
            LinkError: the cloud went away; what came so far is kept and resumed by the next call.
            TrustError: the bytes are not those named; the part is removed.
            RoomError: the disk is full; the part is kept.
            StateError: any other failure of the disk.
        """
        if not 0 <= length <= LENGTH_LIMIT_BYTES:
            raise TrustError(f"{path} claims {length} bytes; the limit is {LENGTH_LIMIT_BYTES}.")
        if target.exists():
            return
        part = target.with_name(f"{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fill(path, part, length)
            if part.stat().st_size != length or sha256_file(part) != sha256:
                part.unlink()
                raise TrustError(f"{path} is not the file that was named ({sha256[:12]}, {length} bytes).")
            part.replace(target)
            fsync_folder(target.parent)
        except OSError as exc:
            raise translate_os_error(exc, str(target)) from exc

    def close(self) -> None:
        self._client.close()

    def _fill(self, path: str, part: Path, length: int) -> None:
        have = part.stat().st_size if part.exists() else 0
        if have > length:
            part.unlink()
            have = 0
        if have == length and part.exists():
            return
        with self._stream(path, have) as response:
            _expect(response, httpx.codes.OK, httpx.codes.PARTIAL_CONTENT)
            if response.status_code == httpx.codes.OK:
                have = 0  # the server ignores Range and starts over
            elif not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
                raise LinkError(f"{path}: the answer is another range than the one asked for.")
            with part.open("r+b" if part.exists() else "w+b") as file:
                file.truncate(have)
                file.seek(have)
                try:
                    for piece in response.iter_raw(_PIECE_BYTES):
                        have += len(piece)
                        if have > length:
                            file.truncate(0)
                            raise TrustError(f"{path} is longer than the {length} bytes named.")
                        file.write(piece)
                finally:
                    file.flush()
                    os.fsync(file.fileno())

    @contextlib.contextmanager
    def _stream(self, path: str, start: int) -> Iterator[httpx.Response]:
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        try:
            with self._client.stream("GET", path, headers=headers) as response:
                yield response
        except httpx.HTTPError as exc:
            raise LinkError(f"{path}: {exc or type(exc).__name__}.", cure="Is the cloud running?") from exc


def _expect(response: httpx.Response, *codes: int) -> None:
    if response.status_code not in codes:
        raise LinkError(f"{response.url.path}: the cloud answers {response.status_code}.")
