"""The login page, as a browser without scripts uses it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from account_world import PASSWORD, AccountWorld

from simpletuner.server.routes.login import AFTERWARDS, local_path

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path_factory.mktemp("login"))
    built.add_users("admin")
    yield built
    built.close()


def submit(world: AccountWorld, password: str, next_path: str = "/redoc?a=1", **headers: str) -> httpx2.Response:
    form = {"username": "admin", "password": password, "next": next_path}
    return world.ask("POST", "/login", data=form, headers=BROWSER | headers)


def test_a_page_leads_through_the_login_and_back(world: AccountWorld) -> None:
    refused = world.ask("GET", "/docs?x=%22y", headers=BROWSER)
    assert (refused.status_code, refused.headers["location"]) == (303, "/login?next=/docs%3Fx%3D%2522y")
    page = world.ask("GET", refused.headers["location"], headers=BROWSER)
    assert page.status_code == 200
    assert 'name="next" value="/docs?x=%22y"' in page.text
    assert "<script" not in page.text and "style=" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert (page.headers["cache-control"], page.headers["referrer-policy"]) == ("no-store", "same-origin")
    assert world.ask("GET", "/login/style.css").headers["content-type"].startswith("text/css")
    done = submit(world, PASSWORD)
    assert (done.status_code, done.headers["location"]) == (303, "/redoc?a=1")
    cookie = done.headers["set-cookie"].partition(";")[0]
    assert world.ask("GET", "/docs", headers=BROWSER | {"Cookie": cookie}).status_code == 200


def test_a_wrong_password_shows_the_page_again(world: AccountWorld) -> None:
    answer = submit(world, "wrong", next_path='/docs"><b>')
    assert answer.status_code == 401
    assert "User name or password is wrong." in answer.text and 'value="admin"' in answer.text
    assert "<b>" not in answer.text
    assert "set-cookie" not in answer.headers
    newest = world.ask("GET", "/api/audit?limit=1", by="admin").json()["entries"][0]
    assert (newest["action"], newest["actor"]) == ("auth.login_failed", "admin")


def test_another_site_cannot_log_somebody_in(world: AccountWorld) -> None:
    answer = submit(world, PASSWORD, Origin="http://evil.example")
    assert answer.json()["code"] == "origin_not_allowed"


@pytest.mark.parametrize("path", ["/docs", "/redoc?a=1#b", "/api/configs/x"])
def test_paths_of_this_server_are_followed(path: str) -> None:
    assert local_path(path) == path


@pytest.mark.parametrize(
    "path",
    ["", "docs", "//evil.example", "/\\evil.example", "https://evil.example", "/a\n", "/\t/evil.example", "/login"],
)
def test_nothing_else_is(world: AccountWorld, path: str) -> None:
    assert local_path(path) == AFTERWARDS
    assert submit(world, PASSWORD, next_path=path).headers["location"] == AFTERWARDS


def test_without_an_admin_the_page_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = AccountWorld(tmp_path_factory.mktemp("empty"))
    try:
        assert "first admin" in world.ask("GET", "/login", headers=BROWSER).text
    finally:
        world.close()
