"""The DICOM door: C-ECHO and C-STORE for every storage SOP class, answered only from what is durable.

pynetdicom speaks the protocol. Three things are ours: the data set goes into the spool while it arrives
instead of into memory, the accept path is closed to unknown callers, and every read re-arms TCP_QUICKACK,
because DCMTK senders leave Nagle's algorithm on and would otherwise wait 40 ms for each of our
acknowledgements.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, Self

import pynetdicom
from msgspec import Struct
from pydicom._uid_dict import UID_dictionary
from pynetdicom import AE, evt
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.presentation import (
    AllStoragePresentationContexts,
    NonPatientObjectPresentationContexts,
    PresentationContext,
)
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import Verification, register_uid
from pynetdicom.transport import AssociationSocket, RequestHandler

from edge.intake.spool import IMPLEMENTATION_NAME, IMPLEMENTATION_UID, Arriving, Part, RefusedError, Spool
from edge.intake.status import KEPT, STATUS, Outcome
from shared.clock import Clock
from shared.errors import ConfigError, RadfleetError, RoomError
from shared.log import get_logger

# What the door takes, first choice first: a sender that offers several gets the one that costs it least.
TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.2",  # explicit VR big endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, selection value 1
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K lossless RPCL
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.53",  # JPEG spectral selection (retired)
    "1.2.840.10008.1.2.4.55",  # JPEG full progression (retired)
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.110",  # JPEG XL lossless, JPEG recompression, JPEG XL: kept, not decoded
    "1.2.840.10008.1.2.4.111",
    "1.2.840.10008.1.2.4.112",
)
MAX_ASSOCIATIONS = 64
ARTIM_S = 10.0  # a connection that says nothing for so long is closed
NETWORK_TIMEOUT_S = 60.0  # an association that stands still for so long is aborted
MAX_PDU_BYTES = 128 * 1024
_RECV_BYTES = 256 * 1024
_REJECT_CALLING_AE = (
    0x01,
    0x01,
    0x03,
)  # PS3.8 9.3.4: permanent, service user, calling AE title


class Peer(Struct, frozen=True):
    """Who may send: an AE title, and the address or network (`10.1.0.0/16`) it must come from; empty for
    any.
    """

    ae_title: str
    address: str = ""


class Door:
    """The node's DICOM listener; an empty allow-list lets nobody in.

    `nudge` is called after an object is durable and after an association has ended, from the
    association's thread.

    Raises:
        ConfigError: an address of the allow-list is no address or network.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        ae_title: str,
        host: str,
        port: int,
        allow: Sequence[Peer],
        nudge: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._spool = spool
        self._address = (host, port)
        self._allow = [(peer.ae_title.strip(), _network(peer)) for peer in allow]
        self._nudge = nudge
        self._clock = clock
        self._server: Any = None
        self._counts: dict[str, int] = {}
        self._counts_lock = threading.Lock()
        self._ae = AE(ae_title=ae_title)
        self._ae.implementation_class_uid = IMPLEMENTATION_UID
        self._ae.implementation_version_name = IMPLEMENTATION_NAME
        self._ae.maximum_associations = MAX_ASSOCIATIONS
        self._ae.maximum_pdu_size = MAX_PDU_BYTES
        self._ae.require_called_aet = True
        self._ae.acse_timeout = ARTIM_S
        self._ae.network_timeout = NETWORK_TIMEOUT_S

    @property
    def port(self) -> int:
        """The port that is listened on; the one chosen when 0 was asked for."""
        return int(self._server.server_address[1]) if self._server else self._address[1]

    def counts(self) -> dict[str, int]:
        """Returns associations, rejections and outcomes since this process started, by name."""
        with self._counts_lock:
            return dict(self._counts)

    def start(self) -> None:
        """Starts to listen and returns; associations run in threads.

        Raises:
            ConfigError: the port is taken or the host is none of this machine's.
        """
        pynetdicom._config.LOG_HANDLER_LEVEL = "none"  # the library would format every PDU for its log
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_CONN_CLOSE, self._on_closed),
            (evt.EVT_RELEASED, self._on_ended),
            (evt.EVT_ABORTED, self._on_ended),
        ]
        try:
            self._server = self._ae.make_server(
                self._address,
                evt_handlers=handlers,
                contexts=_contexts(),
                request_handler=_handler_for(self._spool),
            )
        except OSError as exc:
            raise ConfigError(
                f"The DICOM door cannot listen on {self._address[0]}:{self._address[1]}: {exc}.",
                cure="Set dicom.host and dicom.port to a free port of this machine.",
            ) from exc
        self._ae._servers.append(self._server)
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="dicom-door", daemon=True).start()
        get_logger().info("intake.listening", port=self.port)

    def stop(self) -> None:
        """Ends listening and every association; what was answered is on the disk already."""
        if self._server is not None:
            for association in self._server.active_associations:
                association.abort() if association.is_established else association.kill()
            self._server.shutdown()
            self._server = None

    def _count(self, name: str) -> None:
        with self._counts_lock:
            self._counts[name] = self._counts.get(name, 0) + 1

    def _on_requested(self, event: Any) -> None:
        association = event.assoc
        title = str(association.requestor.primitive.calling_ae_title).strip()
        address = str(association.requestor.address_info.address)
        known = any(title == allowed and _inside(address, network) for allowed, network in self._allow)
        if known:
            self._count("associations")
            return
        self._count("rejected")
        get_logger().warning("intake.rejected", calling_ae=title, address=address)
        association.acse.send_reject(*_REJECT_CALLING_AE)
        association.kill()

    def _on_echo(self, _event: Any) -> int:
        self._count("echoes")
        return 0x0000

    def _on_store(self, event: Any) -> int:
        """Returns the one status of this request; nothing raises through to the library."""
        arrival = event.request.DataSet
        try:
            outcome = arrival.finish() if isinstance(arrival, Arrival) else Outcome.CUT
        except Exception as exc:  # noqa: BLE001 an unanswered request would hang the sender
            get_logger().error("intake.fault", error=type(exc).__name__)  # the message may quote the data set
            outcome = Outcome.FAULT
        self._count(outcome.value)
        if outcome in KEPT:
            self._nudge()
        return STATUS[outcome]

    def _on_closed(self, event: Any) -> None:
        if isinstance(event.assoc.dimse, _SpoolingProvider):
            event.assoc.dimse.give_up()

    def _on_ended(self, event: Any) -> None:
        try:
            self._spool.association_ended(_association_id(event.assoc))
            self._nudge()
        except RadfleetError as exc:  # only a hint is lost: quiet time completes the series
            get_logger().warning("intake.hint_lost", error=exc.message)


class Arrival(BytesIO):
    """The data set of one C-STORE, written to the spool fragment by fragment.

    pynetdicom wants a BytesIO to collect fragments in; this one keeps none of them. The first fault is
    remembered, the rest of the data set is read from the network and dropped, and `finish` turns the
    fault into the answer.
    """

    def __init__(self, begin: Callable[[], Part], spool: Spool) -> None:
        super().__init__()
        self._begin = begin
        self._spool = spool
        self._part: Part | None = None
        self._refused: Outcome | None = None

    def write(self, data: Any, /) -> int:
        if self._refused is None:
            try:
                if self._part is None:
                    self._part = self._begin()
                self._part.write(bytes(data))
            except RadfleetError as exc:
                self._refused = _outcome_of(exc)
        return len(data)

    def finish(self) -> Outcome:
        """Returns what became of the object, after making it durable where it can be kept."""
        if self._refused is None and self._part is None:
            self._refused = Outcome.CUT  # a C-STORE with an empty data set
        if self._refused is None and self._part is not None:
            try:
                return self._spool.finish(self._part)
            except RadfleetError as exc:
                self._refused = _outcome_of(exc)
        refused = self._refused or Outcome.FAULT
        self._spool.count(refused)
        return refused

    def give_up(self) -> None:
        """Removes what arrived of an object that nobody will ask for."""
        if self._part is not None:
            self._part.discard()


class _SpoolingProvider(DIMSEServiceProvider):  # type: ignore[misc]
    """pynetdicom's DIMSE provider, with data sets collected in the spool."""

    def __init__(self, association: Any, spool: Spool) -> None:
        super().__init__(association)
        self._spool = spool
        self._arrivals: list[Arrival] = []

    def receive_primitive(self, primitive: Any) -> None:
        if self.message is None:  # type: ignore[has-type]
            message = DIMSEMessage()
            arrival = Arrival(lambda: self._begin(message), self._spool)
            message.data_set = arrival
            self.message = message
            self._arrivals = [arrival]
        super().receive_primitive(primitive)

    def give_up(self) -> None:
        for arrival in self._arrivals:
            arrival.give_up()

    def _begin(self, message: Any) -> Part:
        command = message.command_set
        context = self.assoc._accepted_cx.get(message.context_id)
        if context is None:
            raise RefusedError(Outcome.MISMATCH, "The presentation context was not accepted.")
        return self._spool.begin(
            Arriving(
                sop_class=str(command.get("AffectedSOPClassUID", "")),
                sop_instance=str(command.get("AffectedSOPInstanceUID", "")),
                transfer_syntax=str(context.transfer_syntax[0]),
                calling_ae=str(self.assoc.requestor.ae_title).strip()[:16],
                address=str(self.assoc.requestor.address_info.address),
                association=_association_id(self.assoc),
            )
        )


class _QuickSocket(AssociationSocket):  # type: ignore[misc]
    """pynetdicom's socket with large reads and an acknowledgement after each of them."""

    def recv(self, nr_bytes: int) -> bytearray:
        buffer = bytearray(nr_bytes)
        view = memoryview(buffer)
        have = 0
        while have < nr_bytes:
            count = self.socket.recv_into(view[have : have + _RECV_BYTES])
            if not count:
                view.release()
                return buffer[:have]
            have += count
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        view.release()
        return buffer


class _Contexts(list[PresentationContext]):
    """Presentation contexts shared by all associations: copying 4,000 transfer syntaxes for each costs 80
    ms.
    """

    def __deepcopy__(self, _memo: object) -> Self:
        return self


def _handler_for(spool: Spool) -> type:
    class Handler(RequestHandler):  # type: ignore[misc]
        def _create_association(self) -> Any:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            association = super()._create_association()
            # The library's own socket object announced the connection already: ours takes its place
            # silently.
            association.dul.socket.__class__ = _QuickSocket
            association.dimse = _SpoolingProvider(association, spool)
            return association

    return Handler


def _contexts() -> list[PresentationContext]:
    """Returns every storage SOP class that pynetdicom or pydicom knows, retired ones too, and C-ECHO."""
    known = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
    known |= {str(context.abstract_syntax) for context in NonPatientObjectPresentationContexts}
    for uid, (name, kind, _, _, keyword) in UID_dictionary.items():
        if kind == "SOP Class" and "Storage" in name and uid.startswith("1.2.840.10008.5.1.4.") and uid not in known:
            register_uid(uid, keyword, StorageServiceClass)
            known.add(uid)
    contexts = _Contexts()
    for uid in (*sorted(known), str(Verification)):
        context = PresentationContext()
        context.abstract_syntax = uid
        context.transfer_syntax = list(TRANSFER_SYNTAXES)
        contexts.append(context)
    return contexts


def _outcome_of(exc: RadfleetError) -> Outcome:
    if isinstance(exc, RefusedError):
        get_logger().warning("intake.refused", outcome=exc.outcome.value, reason=exc.message)
        return exc.outcome
    get_logger().error("intake.not_stored", error=exc.message, cure=exc.cure)
    return Outcome.NO_ROOM if isinstance(exc, RoomError) else Outcome.FAULT


def _association_id(association: Any) -> str:
    return f"{association.native_id}-{id(association):x}-{association.name}"


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _network(peer: Peer) -> _Network | None:
    if not peer.address:
        return None
    try:
        return ipaddress.ip_network(peer.address, strict=False)
    except ValueError as exc:
        raise ConfigError(
            f"The allowed peer {peer.ae_title} has the address {peer.address!r}.",
            cure="Write an IP address, a network such as 10.1.0.0/16, or nothing for any address.",
        ) from exc


def _inside(address: str, network: _Network | None) -> bool:
    if network is None:
        return True
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    return parsed in network
