"""Built pages, opened in a headless Chromium of the system; skipped, with a reason, where there is none."""

import contextlib
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urldefrag, urljoin

import pytest
from homes import needs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIETLY = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
MOST_MILLISECONDS = 120_000
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def browser():
    """Chromium, by playwright; neither downloads anything."""
    sync_api = needs("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=list(QUIETLY))
        yield chromium
        chromium.close()


class Page(NamedTuple):
    """What a page was found to be."""

    address: str
    faults: list[str]
    links: list[str]
    anchors: set[str]
    overflow: int
    """Pixels by which it is wider than the window."""


class Reader:
    """A window of a browser that writes down what goes wrong in it; whatever is not on this machine cannot be had."""

    def __init__(self, chromium, home, viewport, scheme="light"):
        self.home = home
        context = chromium.new_context(viewport=viewport, color_scheme=scheme)
        self.window, self.faults = context.new_page(), []
        self.window.on("console", lambda said: said.type in ("error", "warning") and self.faults.append(said.text))
        self.window.on("pageerror", lambda error: self.faults.append(str(error)))
        self.window.on("response", self._look_at)
        context.route(lambda address: not address.startswith((home, "data:", "blob:")), self._refuse)

    def _look_at(self, response):
        if response.status >= 400:
            self.faults.append(f"{response.status} {response.url}")

    def _refuse(self, route):
        self.faults.append(f"not on this machine: {route.request.url}")
        route.abort()

    def open(self, address):
        self.faults.clear()
        self.window.goto(address, wait_until="load", timeout=MOST_MILLISECONDS)
        found = self.window.evaluate(
            """() => ({
                links: [...document.querySelectorAll("a[href]")].map(a => a.href),
                anchors: [...document.querySelectorAll("[id]")].map(x => x.id),
                overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
            })"""
        )
        links = [link for link in found["links"] if link.startswith(self.home)]
        return Page(address, list(self.faults), links, set(found["anchors"]), found["overflow"])

    def crawl(self, start="index.html"):
        """{address: page} of all that can be reached from there by links, but for what is no page."""
        found, waiting = {}, [urljoin(self.home, start)]
        while waiting:
            address = waiting.pop()
            if address not in found:
                found[address] = self.open(address)
                waiting += [bare for bare, _ in map(urldefrag, found[address].links) if bare.endswith(".html")]
        return found


def broken_links(pages):
    """Links into a page to what is not in it."""
    for page in pages.values():
        for bare, anchor in map(urldefrag, page.links):
            if anchor and bare in pages and anchor not in pages[bare].anchors:
                yield f"{page.address}: {bare}#{anchor}"
