"""One encrypted file with what must not be lost: keys, certificates, signed metadata, and every row of the database.

    magic 18 | salt 16 | nonce prefix 7 | pieces, each AES-256-GCM over at most PIECE_BYTES, the last one marked

The key comes from a passphrase by scrypt. Pieces are numbered and the last is marked in the nonce (the STREAM
construction), so that a file that was cut, reordered or changed is refused. Inside is a tar archive. Blobs in the
object store are not in it: they are immutable and named by digest, so any copy of that folder or bucket will do.
"""

from __future__ import annotations

import secrets
import struct
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from sqlalchemy import Connection, Engine, Table, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from cloud.store import load_tables, open_engine, upgrade
from shared.errors import ConfigError, PeerError, StateError, TrustError
from shared.files import atomic_write, read_limited

MAGIC = b"radfleet backup 1\n"
PIECE_BYTES = 1024 * 1024
MEMBER_LIMIT_BYTES = 512 * 1024 * 1024
ROW_LIMIT_BYTES = 64 * 1024 * 1024
PASSPHRASE_MIN_BYTES = 12
FOLDERS = ("pki", "keys", "registry", "director")  # of the state folder
_SALT, _PREFIX, _TAG = 16, 7, 16
_SCRYPT = {"n": 2**17, "r": 8, "p": 1}  # 128 MiB, about half a second
_TABLE_MOMENT = "moment"


def write_backup(state: Path, engine: Engine, file: Path, passphrase_file: Path) -> int:
    """Writes the backup and returns how many files and tables are in it.

    Raises:
        ConfigError: the passphrase is too short.
        StateError: the state or the database cannot be read, or `file` cannot be written.
    """
    salt, prefix = secrets.token_bytes(_SALT), secrets.token_bytes(_PREFIX)
    cipher = AESGCM(_key(passphrase_file, salt))
    with tempfile.TemporaryFile(dir=state) as archive:
        count = _write_archive(state, engine, archive)
        archive.seek(0)
        atomic_write(file, [MAGIC + salt + prefix, *_encrypted(archive, cipher, prefix)], mode=0o600)
    return count


def read_backup(file: Path, passphrase_file: Path, state: Path, database_url: str) -> int:
    """Restores a backup into an empty state folder and an empty database; returns how many files and tables.

    Raises:
        ConfigError: there is a cloud in `state` already, or the passphrase is too short.
        TrustError: the passphrase is another one, or the file was changed or cut.
    """
    if (state / "pki" / "ca.key").exists():
        raise ConfigError(f"There is a cloud in {state}.", cure="Restore into an empty folder.")
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file.open("rb") as source, tempfile.TemporaryFile(dir=state) as archive:
        head = source.read(len(MAGIC) + _SALT + _PREFIX)
        if len(head) != len(MAGIC) + _SALT + _PREFIX or not head.startswith(MAGIC):
            raise PeerError(f"{file} is not a backup of this version.")
        salt, prefix = head[len(MAGIC) : -_PREFIX], head[-_PREFIX:]
        cipher = AESGCM(_key(passphrase_file, salt))
        # All of it is proved before any of it is used.
        for piece in _decrypted(source, cipher, prefix):
            archive.write(piece)
        archive.seek(0)
        return _read_archive(archive, state, database_url)


def _key(passphrase_file: Path, salt: bytes) -> bytes:
    passphrase = read_limited(passphrase_file, 10_000).strip()
    if len(passphrase) < PASSPHRASE_MIN_BYTES:
        raise ConfigError(
            f"The passphrase in {passphrase_file} is too short.", cure=f"Use {PASSPHRASE_MIN_BYTES} bytes or more."
        )
    return Scrypt(salt=salt, length=32, **_SCRYPT).derive(passphrase)


def _nonce(prefix: bytes, number: int, last: bool) -> bytes:
    return prefix + struct.pack(">IB", number, last)


def _encrypted(source: IO[bytes], cipher: AESGCM, prefix: bytes) -> Iterator[bytes]:
    piece = source.read(PIECE_BYTES)
    for number in range(2**32):
        following = source.read(PIECE_BYTES)
        yield cipher.encrypt(_nonce(prefix, number, not following), piece, MAGIC)
        if not following:
            return
        piece = following


def _decrypted(source: IO[bytes], cipher: AESGCM, prefix: bytes) -> Iterator[bytes]:
    piece = source.read(PIECE_BYTES + _TAG)
    for number in range(2**32):
        following = source.read(PIECE_BYTES + _TAG)
        try:
            yield cipher.decrypt(_nonce(prefix, number, not following), piece, MAGIC)
        except InvalidTag as exc:
            raise TrustError(
                "The backup does not open: another passphrase, or the file was changed or cut.",
                cure="Try the right passphrase, then another copy.",
            ) from exc
        if not following:
            return
        piece = following


def _write_archive(state: Path, engine: Engine, archive: IO[bytes]) -> int:
    count = 0
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(p for folder in FOLDERS for p in (state / folder).rglob("*") if p.is_file()):
            tar.add(path, arcname=str(path.relative_to(state)))
            count += 1
        with engine.connect().execution_options(read_only=True) as conn:
            if conn.dialect.name == "postgresql":
                conn.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            for table in load_tables().sorted_tables:
                with tempfile.TemporaryFile(dir=state) as rows:
                    for row in conn.execute(select(table)).yield_per(200):
                        body = msgspec.msgpack.encode([_plain(value) for value in row])
                        rows.write(struct.pack(">I", len(body)) + body)
                    _add(tar, f"sql/{table.name}", rows)
                count += 1
    return count


def _plain(value: Any) -> Any:
    return {_TABLE_MOMENT: value.isoformat()} if isinstance(value, datetime) else value


def _add(tar: tarfile.TarFile, name: str, rows: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size = rows.tell()
    rows.seek(0)
    tar.addfile(member, rows)


def _read_archive(archive: IO[bytes], state: Path, database_url: str) -> int:
    count = 0
    upgrade(database_url)
    engine = open_engine(database_url)
    tables = load_tables().tables
    try:
        with tarfile.open(fileobj=archive) as tar, engine.begin() as conn:
            for member in tar:
                content = tar.extractfile(member)
                if content is None or member.size > MEMBER_LIMIT_BYTES:
                    raise TrustError(f"The backup holds {member.name!r}, which no backup holds.")
                folder, name = PurePosixPath(member.name).parts[0], PurePosixPath(member.name).name
                if folder == "sql":
                    _fill(conn, tables[name], content)
                else:
                    _place(state, member, content.read())
                count += 1
    except SQLAlchemyError as exc:
        raise StateError(f"The database cannot be filled: {exc}.", cure="Restore into an empty database.") from exc
    finally:
        engine.dispose()
    return count


def _place(state: Path, member: tarfile.TarInfo, data: bytes) -> None:
    path = PurePosixPath(member.name)
    if path.parts[0] not in FOLDERS or ".." in path.parts:
        raise TrustError(f"The backup holds {member.name!r}, which no backup holds.")
    target = state.joinpath(*path.parts)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    atomic_write(target, data, mode=member.mode & 0o777)


def _fill(conn: Connection, table: Table, rows: IO[bytes]) -> None:
    names = [column.name for column in table.columns]
    for values in _rows(rows):
        conn.execute(insert(table).values(dict(zip(names, values, strict=True))))
    identity = table.autoincrement_column
    if conn.dialect.name == "postgresql" and identity is not None:
        newest = conn.execute(select(func.max(identity))).scalar()
        if newest:
            sequence = func.pg_get_serial_sequence(table.name, identity.name)
            conn.execute(select(func.setval(sequence, newest)))


def _rows(source: IO[bytes]) -> Iterable[list[Any]]:
    while head := source.read(4):
        (length,) = struct.unpack(">I", head)
        if length > ROW_LIMIT_BYTES:
            raise TrustError(f"A row of {length} bytes is refused.")
        yield [_rich(value) for value in msgspec.msgpack.decode(source.read(length), type=list[Any])]


def _rich(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {_TABLE_MOMENT}:
        return datetime.fromisoformat(value[_TABLE_MOMENT])
    return value
