"""SIGKILL for the door at a chosen system call, and what is left afterwards.

strace attaches to a running door and kills it when one of its threads is about to make the N-th call of a kind; each
association has a thread of its own, and the counting starts with it. Nothing in the door knows of this.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from scripts.lab.door import DoorProcess, Doors, alive

SIDES = (64, 160, 400)  # of the objects of one sender, pixels: one PDU, a few, many
_IDLE = {"futex", "gettid", "getpid", "sched_yield", "rt_sigprocmask", "madvise", "mprotect", "clock_nanosleep", "exit"}


@dataclass(frozen=True)
class Step:
    """The `count`-th call of `name` in an association's thread."""

    name: str
    count: int


@dataclass(frozen=True)
class Sending:
    """What one sender sends: files in order, and for each SOP Instance UID the bytes of its data set."""

    folder: Path
    files: tuple[Path, ...]
    data: dict[str, bytes]


@dataclass(frozen=True)
class Killed:
    """What one kill did. `faults` is empty when every promise was kept."""

    step: Step
    senders: int
    hit: bool  # the step was reached: the door died there
    acknowledged: int
    faults: tuple[str, ...]


def write_sending(folder: Path, number: int) -> Sending:
    """Writes the objects of one sender; the same number makes the same objects."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    files, data = [], {}
    for place, side in enumerate(SIDES):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.826.0.1.3680043.2.1143.{number + 1}.{place + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.3.{number + 1}", f"1.2.3.{number + 1}.1"
        ds.Modality, ds.PatientID, ds.PatientName = "CT", f"K{number}", "Kill^Test"
        ds.Rows = ds.Columns = side
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = rng.integers(0, 4096, (side, side), dtype=np.uint16).tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        files.append(folder / f"{place}.dcm")
        ds.save_as(files[-1], enforce_file_format=True)
        out = DicomBytesIO()
        out.is_little_endian, out.is_implicit_VR = True, False
        del ds.file_meta
        write_dataset(out, ds)
        data[str(ds.SOPInstanceUID)] = out.getvalue()
    return Sending(folder, tuple(files), data)


def steps(doors: Doors, folder: Path) -> list[Step]:
    """Returns every call of the association that takes one sender's objects, in order, from its first byte to the
    answer to the last, and the call after that."""
    state = _fresh(folder / "steps")
    sending = write_sending(folder / "sending-steps", 0)
    door = doors.start(state)
    trace = folder / "steps.trace"
    tracer = attach(door, "-o", str(trace))
    sent = _send(door, [sending])
    doors.kill(door)
    tracer.wait(10)
    if sum(sent) != len(SIDES):
        raise RuntimeError("The door does not take the objects that it is to be killed over.")
    calls = [m.groups() for m in map(re.compile(r"^(\d+) +(\w+)\((.*)$").match, trace.read_text().splitlines()) if m]
    thread = next(who for who, name, rest in calls if name == "openat" and ".part" in rest)
    counts: Counter[str] = Counter()
    found = []
    for who, name, rest in calls:
        if who != thread or name in _IDLE:
            continue
        counts[name] += 1
        found.append(Step(name, counts[name]))
        if name == "sendto" and rest.partition(", ")[2].startswith('"\\6'):
            break  # the association is released
    return found


def kill_at(doors: Doors, folder: Path, step: Step, senders: Sequence[Sending]) -> Killed:
    """Kills a door at a step while everybody sends, starts it again, sends again, and looks."""
    state = _fresh(folder / "state")
    door = doors.start(state)
    tracer = attach(door, "-o", "/dev/null", "-e", f"trace={step.name}", "-e", _inject(step))
    acknowledged = _send(door, senders)
    hit = not alive(door)
    doors.kill(door)
    tracer.wait(10)
    answered = {uid for one, count in zip(senders, acknowledged, strict=True) for uid in list(one.data)[:count]}
    everything = {uid: data for one in senders for uid, data in one.data.items()}
    again = doors.start(state)
    try:
        faults = [f"{uid} was acknowledged and is lost" for uid in sorted(answered - set(kept(state, everything)))]
        faults += [f"{path.name} was left over" for path in (state / "spool").glob(".*")]
        if _send(again, senders) != [len(SIDES)] * len(senders):
            faults.append("not everything was taken at the second time")
        found = kept(state, everything)
        faults += [f"{uid} is not there after it was sent again" for uid in sorted(set(everything) - set(found))]
        faults += [f"{uid} is there {count} times" for uid, count in found.items() if count != 1]
    except ValueError as exc:
        faults = [str(exc)]
    finally:
        doors.kill(again)
    return Killed(step, len(senders), hit, sum(acknowledged), tuple(faults))


def attach(door: DoorProcess, *options: str, thread: int = 0) -> subprocess.Popen[str]:
    """Starts strace on a running door, or on one thread of it, and returns when it has it; `terminate` lets go."""
    tracer = subprocess.Popen(
        ["strace", *(["-p", str(thread)] if thread else ["-f", "-p", str(door.pid)]), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if "attached" not in line:
        tracer.kill()
        raise RuntimeError(f"strace cannot attach: {line.strip()}")
    return tracer


def kept(state: Path, expected: dict[str, bytes]) -> dict[str, int]:
    """Returns how often each instance is in the spool.

    Raises:
        ValueError: something half is visible, or something that nobody sent.
    """
    database = sqlite3.connect(state / "intake.sqlite")
    try:
        rows = database.execute(
            "SELECT sop_instance, file, offset, digest FROM objects WHERE state = 'kept'"
        ).fetchall()
    finally:
        database.close()
    for uid, file, offset, digest in rows:
        data = (state / "spool" / file).read_bytes()[offset:]
        if (
            data != expected.get(uid)
            or hashlib.sha256(ExplicitVRLittleEndian.encode() + b"\0" + data).hexdigest() != digest
        ):
            raise ValueError(f"{uid} is visible and not whole")
    return dict(Counter(uid for uid, *_ in rows))


def choose(every: Sequence[Step], seed: int) -> tuple[Step, int]:
    """Returns the step and the number of senders of a seed: the steps in turn, each with one and with four."""
    order = list(every)
    random.Random(0).shuffle(order)
    return order[seed % len(order)], (1, 4)[seed // len(order) % 2]


def _inject(step: Step) -> str:
    return f"inject={step.name}:signal=KILL:when={step.count}"


def _send(door: DoorProcess, senders: Sequence[Sending]) -> list[int]:
    """Sends everything, each sender on an association of its own, all at once; how many were acknowledged to each."""
    command = ["storescu", "-v", "-R", "-aet", "MODALITY", "-aec", "RADFLEET", "127.0.0.1", str(door.port)]
    running = [
        subprocess.Popen(
            [*command, *map(str, one.files)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/bin:/bin", "TCP_NODELAY": "1"},
        )
        for one in senders
    ]
    return [one.communicate(timeout=60)[0].count(b"Received Store Response (Success)") for one in running]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
