"""The people port and the node port over real TLS: who may do what, pages with their marks, downloads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import insert

from cloud.access.people import MAY
from cloud.access.tables import nodes
from cloud.web.fleet import champion_of
from cloud.web.session import COOKIE
from edge import enrolment as node_side
from shared.errors import PeerError
from shared.signin import ROLES, Role
from tests.simulators.access import PASSWORD, LiveCloud


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCloud]:
    live = LiveCloud(tmp_path_factory.mktemp("cloud")).start()
    report = {
        "version": "0.1.0", "package": "a" * 64, "release": 3, "variant": "cpu-u8s8", "weights_loaded": "b" * 64,
        "golden": "c" * 64, "serving_pid": 4711, "provider": "CPUExecutionProvider",
        "slots": [{"package": "d" * 64, "release": 4, "state": "REFUSED", "reason": "golden outputs differ"}],
        "studies": 12, "quarantined": 1, "labelled": 5, "outbox_waiting": 2, "outbox_expired": 0, "clock_trusted": True,
    }  # fmt: skip
    with live.engine.begin() as conn:
        here = {"site": "hospital-a", "node": "edge-1", "invited_at": live.clock.now()}
        conn.execute(insert(nodes).values(**here, last_seen=live.clock.now(), report=report))
        conn.execute(insert(nodes).values(site="hospital-b", node="edge-1", invited_at=live.clock.now()))
    yield live
    live.stop()


@pytest.fixture(scope="module")
def tokens(cloud: LiveCloud) -> dict[Role, str]:
    return {role: cloud.person(f"{role} one", role) for role in ROLES}


@pytest.fixture
def api(cloud: LiveCloud) -> Iterator[httpx.Client]:
    with cloud.browser() as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    ("method", "path", "body", "action"),
    [
        ("GET", "/api/nodes", None, "fleet.read"),
        ("GET", "/api/releases", None, "fleet.read"),
        ("GET", "/api/campaigns", None, "fleet.read"),
        ("GET", "/api/audit", None, "audit.read"),
        ("POST", "/api/rollouts", {"release": 2}, "release.roll"),
        ("POST", "/api/rollbacks", {}, "release.roll"),
        ("POST", "/api/campaigns", {}, "campaign.start"),
        ("POST", "/api/invitations", {"site": "hospital-c", "node": "edge-1"}, "node.invite"),
        ("POST", "/api/people", {"name": "new", "role": "auditor"}, "people.invite"),
    ],
)
def test_each_role_may_do_what_the_table_says(
    api: httpx.Client, tokens: dict[Role, str], method: str, path: str, body: object, action: str
) -> None:
    assert api.request(method, path, json=body).status_code == 401
    assert api.request(method, path, json=body, headers=bearer("made-up")).status_code == 401
    for role, token in tokens.items():
        answer = api.request(method, path, json=body, headers=bearer(token))
        allowed = role in MAY[action]  # type: ignore[index]
        assert (answer.status_code in (200, 202)) == allowed, (role, answer.text)
        assert allowed or answer.status_code == 403


def test_the_fleet_shows_what_each_node_really_serves(api: httpx.Client, tokens: dict[Role, str]) -> None:
    first, second, *_ = api.get("/api/nodes", headers=bearer(tokens["auditor"])).json()
    assert first["present"]
    assert first["moving"] == "4: REFUSED (golden outputs differ)"
    assert first["report"]["serving_pid"] == 4711
    assert first["report"]["golden"] == "c" * 64
    assert second["report"] is None
    assert not second["present"]


def test_a_campaign_starts_from_what_is_served(cloud: LiveCloud) -> None:
    with cloud.engine.connect() as conn:
        assert champion_of(conn) == ("a" * 64, [("hospital-a", "edge-1")])


def test_an_order_names_its_actor(cloud: LiveCloud, api: httpx.Client, tokens: dict[Role, str]) -> None:
    body = {"release": 7, "nodes": [["hospital-a", "edge-1"]]}
    assert api.post("/api/rollouts", json=body, headers=bearer(tokens["engineer"])).status_code == 202
    assert cloud.deeds[-1] == ("roll_out", 7, [("hospital-a", "edge-1")], "engineer one")


def test_a_body_with_unknown_keys_is_refused(api: httpx.Client, tokens: dict[Role, str]) -> None:
    body = {"release": 7, "force": True}
    assert api.post("/api/rollouts", json=body, headers=bearer(tokens["engineer"])).status_code == 422


class TestPages:
    def sign_in(self, page: httpx.Client, role: Role) -> str:
        """Signs in with the form and returns the page's CSRF mark."""
        answer = page.post("/login", data={"name": f"{role} one", "password": PASSWORD})
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"{COOKIE}=")
        for word in ("HttpOnly", "Secure", "SameSite=strict", "Path=/"):
            assert word in cookie
        found = re.search('name="csrf" value="([0-9a-f]+)"', page.get("/").text)
        assert found
        return found[1]

    def test_a_stranger_is_sent_to_the_login_page(self, api: httpx.Client) -> None:
        answer = api.get("/")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        assert api.get("/parts/fleet", headers={"hx-request": "true"}).headers["hx-redirect"] == "/login"

    def test_every_page_says_research_use_only(self, api: httpx.Client, tokens: dict[Role, str]) -> None:
        self.sign_in(api, "administrator")
        for path in ("/", "/audit", "/people", "/login", "/welcome/nothing"):
            assert "Research use only, not for diagnosis" in api.get(path).text, path

    def test_the_page_shows_nodes_and_takes_orders(
        self, cloud: LiveCloud, api: httpx.Client, tokens: dict[Role, str]
    ) -> None:
        mark = self.sign_in(api, "engineer")
        page = api.get("/").text
        assert "hospital-a" in page
        assert "pid 4711" in page
        form = {"csrf": mark, "deed": "roll-out", "release": "5", "node": ["hospital-a/edge-1"]}
        assert api.post("/deeds", data=form).headers["location"] == "/?did=roll-out"
        assert cloud.deeds[-1] == ("roll_out", 5, [("hospital-a", "edge-1")], "engineer one")
        refused = api.post("/deeds", data={"csrf": mark, "deed": "roll-back"})
        assert (refused.status_code, "No node is selected" in refused.text) == (400, True)

    def test_an_order_from_another_site_is_refused(
        self, cloud: LiveCloud, api: httpx.Client, tokens: dict[Role, str]
    ) -> None:
        self.sign_in(api, "engineer")
        before = len(cloud.deeds)
        for mark in ({}, {"csrf": "0" * 64}):
            assert api.post("/deeds", data={**mark, "deed": "roll-back-all"}).status_code == 403
        assert api.post("/api/rollbacks", json={}).status_code == 403
        assert len(cloud.deeds) == before

    def test_a_reader_is_offered_no_orders_and_cannot_make_them_up(
        self, cloud: LiveCloud, api: httpx.Client, tokens: dict[Role, str]
    ) -> None:
        mark = self.sign_in(api, "radiologist")
        assert "Roll out" not in api.get("/").text
        before = len(cloud.deeds)
        assert api.post("/deeds", data={"csrf": mark, "deed": "roll-back-all"}).status_code == 400
        assert len(cloud.deeds) == before
        assert api.get("/audit").status_code == 403

    def test_guessing_a_password_is_slowed_down(self, cloud: LiveCloud, tmp_path: Path) -> None:
        cloud.person("victim", "engineer")
        with cloud.browser() as page:
            for _ in range(5):
                assert page.post("/login", data={"name": "victim", "password": "guess"}).status_code == 401
            right = page.post("/login", data={"name": "victim", "password": PASSWORD})
            assert "Too many failed attempts" in right.text
        cloud.clock.advance(301)

    def test_signing_out_ends_the_session(self, api: httpx.Client, tokens: dict[Role, str]) -> None:
        mark = self.sign_in(api, "engineer")
        session = api.cookies[COOKIE]
        assert api.post("/logout", data={"csrf": mark}).status_code == 303
        assert api.get("/", headers={"Cookie": f"{COOKIE}={session}"}).headers["location"] == "/login"

    def test_answers_carry_the_headers_that_keep_strangers_out(self, api: httpx.Client) -> None:
        headers = api.get("/login").headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "unsafe" not in headers["content-security-policy"]


class TestNodePort:
    @pytest.fixture(scope="class")
    def node(self, cloud: LiveCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
        state = tmp_path_factory.mktemp("node")
        node_side.enrol(cloud.url, cloud.invite("hospital-d", "edge-1"), state)
        with cloud.node(state) as client:
            yield client

    def test_a_blob_comes_whole_and_in_ranges(self, cloud: LiveCloud, node: httpx.Client) -> None:
        data = bytes(range(256)) * 4000  # more than one piece
        path = f"/blobs/{cloud.objects.put(data)}"
        whole = node.get(path)
        assert (whole.status_code, whole.content) == (200, data)
        for wanted, expected in (("bytes=1000-1999", data[1000:2000]), ("bytes=1023990-", data[1023990:])):
            part = node.get(path, headers={"Range": wanted})
            assert (part.status_code, part.content) == (206, expected)
        assert node.get(path, headers={"Range": "bytes=1000-99999999"}).content == data[1000:]
        beyond = node.get(path, headers={"Range": f"bytes={len(data)}-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(data)}")

    def test_metadata_is_served_and_nothing_beside_it(self, cloud: LiveCloud, node: httpx.Client) -> None:
        (cloud.release / "1.root.json").write_bytes(b"{}")
        (cloud.release.parent / "secret.json").write_bytes(b"secret")
        (cloud.release / "secret.json").write_bytes(b"secret")
        assert node.get("/tuf/release/1.root.json").content == b"{}"
        for path in (
            "/tuf/release/2.root.json", "/tuf/release/secret.json", "/tuf/release/..%2fsecret.json",
            "/tuf/director/1.root.json", "/tuf/pki/1.root.json", "/blobs/..%2fsecret.json", "/blobs/" + "g" * 64,
        ):  # fmt: skip
            assert node.get(path).status_code == 404, path

    def test_people_cannot_use_it_and_nodes_cannot_use_theirs(self, cloud: LiveCloud, node: httpx.Client) -> None:
        assert node.get("/api/nodes").status_code == 404
        assert node.get(cloud.url + "/api/nodes").status_code == 401


def test_without_a_report_there_is_no_champion(tmp_path: Path) -> None:
    live = LiveCloud(tmp_path)
    with live.engine.connect() as conn, pytest.raises(PeerError, match="No node serves"):
        champion_of(conn)
    live.engine.dispose()
