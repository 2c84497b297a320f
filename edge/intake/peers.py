"""Who may call: the configuration's allow-list, and callers that an administrator admitted on the page."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from edge.intake.part import OBJECT_LIMIT_BYTES
from edge.sqlite import open_foreign
from shared.errors import ConfigError, StateError
from shared.log import get_logger

MAX_ASSOCIATIONS = 128
PEER_ASSOCIATIONS = 112  # no single peer takes the last sixteen


_AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]{0,15})")  # PS3.5 6.2: no control, no backslash


class Peer(Struct, frozen=True):
    """Who may send and how much.

    `ae_title` may hold the wildcards * and ?; `address` is an address or network (`10.1.0.0/16`), empty for any;
    `port` is where the peer itself listens (reports of Storage Commitment), 0 where it does not.
    """

    ae_title: str
    address: str = ""
    port: int = 0
    associations: int = PEER_ASSOCIATIONS
    objects_per_second: float = 0.0  # 0: no limit; a faster sender is slowed down, never refused
    object_limit_bytes: int = OBJECT_LIMIT_BYTES


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AllowList:
    """Peers of the configuration first, then the admitted; an empty list lets nobody in.

    Raises:
        ConfigError: an address is no address or network.
    """

    def __init__(self, peers: Sequence[Peer], admitted: Callable[[], Sequence[Peer]] = tuple) -> None:
        self._peers = [(peer, _network(peer)) for peer in peers]
        self._admitted = admitted

    def find(self, ae_title: str, address: str) -> Peer | None:
        """Returns the entry that lets this caller in; None when there is none, or when the title is no AE title."""
        if not _AE_TITLE.fullmatch(ae_title):
            return None
        for peer, network in [*self._peers, *((one, _network(one)) for one in self._admitted())]:
            if fnmatch.fnmatchcase(ae_title, peer.ae_title.strip()) and _inside(address, network):
                return peer
        return None


def admitted_callers(labels: Path) -> Callable[[], Sequence[Peer]]:
    """Returns a function that reads the page's table of admitted callers; nobody where there is no such table.

    Their titles are taken literally: wildcards are for the configuration.
    """

    def read() -> Sequence[Peer]:
        try:
            db = open_foreign(labels)
            if db is None:
                return ()
            try:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'admitted'").fetchone():
                    return ()
                rows = db.execute("SELECT ae_title, address FROM admitted").fetchall()
            finally:
                db.close()
        except StateError as exc:
            get_logger().warning("intake.admitted_unreadable", error=exc.message)
            return ()
        return [Peer(_literal(row["ae_title"]), row["address"]) for row in rows if _is_network(row["address"])]

    return read


def _literal(title: str) -> str:
    return "".join(f"[{one}]" if one in "*?[" else one for one in title)


def _is_network(address: str) -> bool:
    try:
        ipaddress.ip_network(address, strict=False)
    except ValueError:
        return False
    return True


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
    return ipaddress.ip_address(plain_address(address)) in network


def plain_address(address: str) -> str:
    """Returns an address without its zone; an IPv4 address that came through an IPv6 socket as what it is."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)
