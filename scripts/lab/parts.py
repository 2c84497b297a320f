"""The real parts: Mosquitto, Redis, Orthanc and PostgreSQL, each on a free loopback port in a folder of its own."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from scripts.lab.child import Child, free_port, listens


@dataclass
class Redis:
    child: Child
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def start_redis(folder: Path) -> Redis:
    """Starts a Redis that keeps nothing on disk: losing it must lose nothing acknowledged."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    child = Child("redis", [*command, "--dir", folder], log=folder / "redis.log")
    child.wait_ready("redis", lambda: listens(port))
    return Redis(child, port)


def start_mosquitto(config: Path) -> Child:
    """Starts Mosquitto with a finished configuration file; the caller knows the port it wrote there."""
    binary = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    return Child("mosquitto", [binary, "-c", config], log=config.with_name("mosquitto.log"))


@dataclass(frozen=True)
class Instance:
    """What a PACS holds, as far as a reader of the demo cares."""

    id: str
    tags: dict[str, str]


@dataclass
class Orthanc:
    """A PACS that is not ours. `aet` and `dicom_port` are for C-STORE, the REST port is for looking inside."""

    child: Child
    aet: str
    dicom_port: int
    http_port: int

    def instances(self, **query: str) -> list[Instance]:
        """Returns the instances whose DICOM keywords match, e.g. `Modality="SR", StudyInstanceUID=...`."""
        rest = f"http://127.0.0.1:{self.http_port}"
        answer = httpx.post(f"{rest}/tools/find", json={"Level": "Instance", "Query": query}, timeout=30)
        ids = answer.raise_for_status().json()
        return [Instance(i, httpx.get(f"{rest}/instances/{i}/simplified-tags", timeout=30).json()) for i in ids]

    def file(self, instance: Instance) -> bytes:
        """Returns the stored DICOM file."""
        return httpx.get(f"http://127.0.0.1:{self.http_port}/instances/{instance.id}/file", timeout=30).content

    def count(self) -> int:
        """Returns how many instances the PACS holds."""
        answer = httpx.get(f"http://127.0.0.1:{self.http_port}/statistics", timeout=30)
        return int(answer.json()["CountInstances"])


def start_orthanc(
    folder: Path,
    *,
    aet: str = "PACS",
    peers: Sequence[tuple[str, int]] = (),
    tls: tuple[Path, Path, Path] | None = None,
    **more: object,
) -> Orthanc:
    """Starts Orthanc; `peers` are (AE title, DICOM port) on loopback that it may send to and move to.

    `tls` (certificate, key, CA of the clients) makes its DICOM port speak TLS with client certificates; `more` are
    settings by Orthanc's own names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dicom_port, http_port = free_port(), free_port()
    config: dict[str, object] = {
        "Name": aet,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "DicomAet": aet,
        "DicomPort": dicom_port,
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomCheckCalledAet": False,
        "DicomModalities": {aet_: [aet_, "127.0.0.1", port] for aet_, port in peers},
        "Plugins": [],
        "OverwriteInstances": False,
        "KeepAliveTimeout": 1,
        **more,
    }
    if tls:
        config |= {
            "DicomTlsEnabled": True,
            "DicomTlsCertificate": str(tls[0]),
            "DicomTlsPrivateKey": str(tls[1]),
            "DicomTlsTrustedCertificates": str(tls[2]),
        }
    path = folder / "orthanc.json"
    path.write_text(json.dumps(config, indent=2))
    binary = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    child = Child("orthanc", [binary, path], log=folder / "orthanc.log", env={"TCP_NODELAY": "1"})
    child.wait_ready("orthanc", lambda: listens(http_port) and listens(dicom_port), seconds=60)
    return Orthanc(child, aet, dicom_port, http_port)


@dataclass
class Postgres:
    child: Child
    port: int

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://radfleet@127.0.0.1:{self.port}/postgres"


def start_postgres(folder: Path) -> Postgres:
    """Starts a PostgreSQL cluster of its own; as root it runs as the package's user, because it refuses root."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    folder.mkdir(parents=True, exist_ok=True)
    user = "postgres" if os.geteuid() == 0 else None
    data = folder / "data"
    if user:
        account = pwd.getpwnam(user)
        os.chown(folder, account.pw_uid, account.pw_gid)
        for parent in folder.parents:  # pytest's temporary folders are 0700
            if parent.stat().st_uid == 0 and str(parent).startswith("/tmp/"):  # noqa: S108
                parent.chmod(parent.stat().st_mode | 0o011)
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "radfleet", "--auth=trust", "--no-sync"],
        check=True,
        stdout=subprocess.DEVNULL,
        user=user,
        group=user,
        cwd=folder,
    )
    port = free_port()
    command = [binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder]
    child = Child("postgres", command, log=folder / "postgres.log", user=user)
    child.wait_ready("postgres", lambda: listens(port))
    return Postgres(child, port)
