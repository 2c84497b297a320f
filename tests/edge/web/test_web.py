"""The reading page over real HTTP, on answers that the real pipeline gave."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge.web.labels import MAY, Labels
from edge.web.session import COOKIE
from shared.errors import TrustError
from shared.signin import LINK_LIFETIME_S, ROLES, Role
from tests.simulators.reading import PASSWORD, ReadingNode
from tests.simulators.release import HandClock

BANNER = "Research use only, not for diagnosis"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadingNode]:
    reading = ReadingNode(tmp_path_factory.mktemp("node")).start()
    yield reading
    reading.stop()


@pytest.fixture(scope="module")
def tokens(node: ReadingNode) -> dict[Role, str]:
    return {role: node.person(f"{role} one", role) for role in ROLES}


@pytest.fixture
def radiologist(node: ReadingNode, tokens: dict[Role, str]) -> Iterator[httpx.Client]:
    with node.client(tokens["radiologist"]) as client:
        yield client


@pytest.fixture
def page(node: ReadingNode, tokens: dict[Role, str]) -> Iterator[httpx.Client]:
    """A browser without scripts, signed in as the radiologist."""
    with node.client() as client:
        assert client.post("/login", data={"name": "radiologist one", "password": PASSWORD}).status_code == 303
        yield client


def answers(client: httpx.Client) -> list[dict[str, object]]:
    found: list[dict[str, object]] = client.get("/api/worklist").json()
    return found


def read_ones(client: httpx.Client) -> list[str]:
    return [str(row["answer"]) for row in answers(client) if row["finding"]]


def mark(page: httpx.Client) -> str:
    found = re.search('name="csrf" value="([0-9a-f]+)"', page.get("/").text)
    assert found
    return found[1]


def test_the_worklist_has_answers_and_what_was_not_assessed(radiologist: httpx.Client) -> None:
    rows = answers(radiologist)
    assert len(rows) == 3
    (unread,) = [row for row in rows if not row["finding"]]
    assert unread["reason"] == "no model reads DX of KNEE"
    assert unread["probability"] == 0


def test_an_answer_tells_classes_model_and_what_it_is_not_for(radiologist: httpx.Client) -> None:
    answer = radiologist.get(f"/api/answers/{read_ones(radiologist)[0]}").json()
    assert {one["name"] for one in answer["classes"]} == {"normal", "pneumonia", "other"}
    assert sum(one["probability"] for one in answer["classes"]) == pytest.approx(1, abs=1e-3)
    assert answer["notice"] == BANNER
    assert answer["release"] >= 1


def test_an_answer_that_was_not_assessed_has_no_probability(radiologist: httpx.Client) -> None:
    (unread,) = [row for row in answers(radiologist) if not row["finding"]]
    answer = radiologist.get(f"/api/answers/{unread['answer']}").json()
    assert answer["chosen"] == ""
    assert all(one["probability"] is None for one in answer["classes"])


def test_image_and_evidence_are_pictures(radiologist: httpx.Client) -> None:
    for name in ("image", "evidence"):
        picture = radiologist.get(f"/api/answers/{read_ones(radiologist)[0]}/{name}.png")
        assert picture.headers["content-type"] == "image/png"
        assert picture.content.startswith(b"\x89PNG")


def test_a_label_is_recorded_with_who_and_when_and_wakes_the_pipeline(
    node: ReadingNode, radiologist: httpx.Client
) -> None:
    answer, before = read_ones(radiologist)[0], node.nudges
    first = radiologist.post(f"/api/answers/{answer}/label", json={"label": "other"}).json()["serial"]
    again = radiologist.post(f"/api/answers/{answer}/label", json={"label": "other"}).json()["serial"]
    corrected = radiologist.post(f"/api/answers/{answer}/label", json={"label": "normal"}).json()["serial"]
    assert first == again < corrected
    assert node.nudges == before + 3
    database = sqlite3.connect(node.folder / "labels.sqlite")
    rows = database.execute("SELECT answer_id, head, label, by FROM labels ORDER BY serial").fetchall()
    database.close()
    assert rows == [
        (answer, "chest-xray", "other", "radiologist one"),
        (answer, "chest-xray", "normal", "radiologist one"),
    ]
    (row,) = [row for row in answers(radiologist) if row["answer"] == answer]
    assert (row["label"], row["labelled_by"]) == ("normal", "radiologist one")


def test_a_label_that_is_no_class_is_refused(radiologist: httpx.Client) -> None:
    answer = read_ones(radiologist)[0]
    refused = radiologist.post(f"/api/answers/{answer}/label", json={"label": "glioma"})
    assert refused.status_code == 400
    assert "One of normal, pneumonia, other" in refused.json()["cure"]
    assert radiologist.post("/api/answers/nothing/label", json={"label": "normal"}).status_code == 404
    (unread,) = [row["answer"] for row in answers(radiologist) if not row["finding"]]
    assert radiologist.post(f"/api/answers/{unread}/label", json={"label": "normal"}).status_code == 400


def test_the_quarantine_says_why(radiologist: httpx.Client) -> None:
    (row,) = radiologist.get("/api/quarantine").json()
    assert "1000 bytes" in row["reason"]
    assert row["calling_ae"] == "MODALITY"


def test_the_status_counts(radiologist: httpx.Client) -> None:
    status = radiologist.get("/api/status").json()
    assert status["counts"]["answers"] == 3
    assert status["counts"]["quarantined"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "action"),
    [
        ("GET", "/api/worklist", None, "study.read"),
        ("GET", "/api/answers/{}", None, "study.read"),
        ("GET", "/api/answers/{}/image.png", None, "study.read"),
        ("GET", "/api/answers/{}/evidence.png", None, "study.read"),
        ("GET", "/api/quarantine", None, "study.read"),
        ("GET", "/api/status", None, "status.read"),
        ("POST", "/api/answers/{}/label", {"label": "normal"}, "study.label"),
        ("POST", "/api/people", {"name": "new", "role": "auditor"}, "people.invite"),
    ],
)
def test_each_role_may_do_what_the_table_says(
    node: ReadingNode, tokens: dict[Role, str], method: str, path: str, body: object, action: str
) -> None:
    with node.client(tokens["radiologist"]) as reader:
        path = path.format(read_ones(reader)[1])
    with node.client() as stranger:
        assert stranger.request(method, path, json=body).status_code == 401
    for role, token in tokens.items():
        with node.client(token) as client:
            answer = client.request(method, path, json=body)
        assert (answer.status_code == 200) == (role in MAY[action]), (role, answer.text)  # type: ignore[index]
        assert answer.status_code in (200, 403)


class TestPages:
    def test_every_page_says_research_use_only(self, page: httpx.Client, radiologist: httpx.Client) -> None:
        paths = ["/", "/quarantine", "/status", "/login", "/welcome/nothing", "/people", "/studies/nothing"]
        for path in [*paths, *(f"/studies/{row['answer']}" for row in answers(radiologist))]:
            assert BANNER in page.get(path).text, path

    def test_a_stranger_is_sent_to_the_login_page(self, node: ReadingNode) -> None:
        with node.client() as stranger:
            assert stranger.get("/").headers["location"] == "/login"
            part = stranger.get("/parts/worklist", headers={"hx-request": "true"})
            assert part.headers["hx-redirect"] == "/login"

    def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(self, node: ReadingNode) -> None:
        with node.client() as client:
            answer = client.post("/login", data={"name": "radiologist one", "password": PASSWORD})
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Secure" not in cookie  # plain HTTP, which the configuration allows on loopback only

    def test_a_study_is_reviewed_without_scripts(self, page: httpx.Client, radiologist: httpx.Client) -> None:
        answer = read_ones(radiologist)[1]
        assert f'action="/studies/{answer}/label"' in page.get(f"/studies/{answer}").text
        form = {"csrf": mark(page), "label": "pneumonia"}
        saved = page.post(f"/studies/{answer}/label", data=form)
        assert saved.headers["location"] == f"/studies/{answer}"
        assert "Reviewed by radiologist one: pneumonia" in page.get(f"/studies/{answer}").text

    def test_saving_goes_only_to_studies_that_exist(self, page: httpx.Client, radiologist: httpx.Client) -> None:
        here, other = read_ones(radiologist)
        form = {"csrf": mark(page), "label": "normal"}
        assert page.post(f"/studies/{here}/label", data={**form, "then": other}).headers["location"].endswith(other)
        away = page.post(f"/studies/{here}/label", data={**form, "then": "//evil.example"})
        assert away.headers["location"] == f"/studies/{here}"

    def test_a_label_from_another_site_is_refused(self, page: httpx.Client, radiologist: httpx.Client) -> None:
        answer = read_ones(radiologist)[0]
        before = next(row["label"] for row in answers(radiologist) if row["answer"] == answer)
        for form in ({"label": "other"}, {"label": "other", "csrf": "0" * 64}):
            assert page.post(f"/studies/{answer}/label", data=form).status_code == 403
        assert page.post(f"/api/answers/{answer}/label", json={"label": "other"}).status_code == 403
        assert before == next(row["label"] for row in answers(radiologist) if row["answer"] == answer)

    def test_what_is_not_assessed_shows_its_reason_and_no_guess(
        self, page: httpx.Client, radiologist: httpx.Client
    ) -> None:
        (unread,) = [row["answer"] for row in answers(radiologist) if not row["finding"]]
        text = page.get(f"/studies/{unread}").text
        assert "Not assessed" in text
        assert "no model reads DX of KNEE" in text
        assert "%" not in text

    def test_names_from_dicom_are_text_not_markup(self, node: ReadingNode, page: httpx.Client) -> None:
        database = sqlite3.connect(node.folder / "results.sqlite")
        database.execute("UPDATE studies SET patient_name = '<script>alert(1)</script>^X'")
        database.commit()
        database.close()
        text = page.get("/").text
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)" in text

    def test_guessing_a_password_is_slowed_down(self, node: ReadingNode) -> None:
        node.person("victim", "radiologist")
        with node.client() as client:
            for _ in range(5):
                assert client.post("/login", data={"name": "victim", "password": "guess"}).status_code == 401
            assert "Too many" in client.post("/login", data={"name": "victim", "password": PASSWORD}).text
        node.clock.advance(301)

    def test_a_one_time_link_sets_a_password_and_ends(self, node: ReadingNode) -> None:
        link = node.labels.invite("grace", "radiologist", actor="test")
        with node.client() as client:
            assert "Welcome, grace" in client.get(f"/welcome/{link}").text
            differ = client.post(f"/welcome/{link}", data={"password": PASSWORD, "again": PASSWORD + "!"})
            assert "differ" in differ.text
            assert client.post(f"/welcome/{link}", data={"password": PASSWORD, "again": PASSWORD}).status_code == 200
            assert client.get(f"/welcome/{link}").status_code == 404
            assert client.post("/login", data={"name": "grace", "password": PASSWORD}).status_code == 303
            assert COOKIE in client.cookies


def test_a_link_ends_after_a_day(tmp_path: Path) -> None:
    clock = HandClock()
    labels = Labels(tmp_path / "labels.sqlite", clock)
    link = labels.invite("late", "radiologist", actor="test")
    clock.advance(LINK_LIFETIME_S + 1)
    with pytest.raises(TrustError, match="has expired"):
        labels.set_password(link, PASSWORD)
    labels.close()


def test_secrets_are_stored_as_digests_only(node: ReadingNode, tokens: dict[Role, str], tmp_path: Path) -> None:
    stored = b"".join(path.read_bytes() for path in node.folder.glob("labels.sqlite*"))
    assert b"radiologist one" in stored
    for secret in (*tokens.values(), PASSWORD):
        assert secret.encode() not in stored
