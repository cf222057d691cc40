"""The page in Chromium: what it shows, with nothing to complain of and nothing fetched."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.report.test_page import HOSTILE, page, world

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


class Server(ThreadingHTTPServer):
    """Serves one page, and remembers everything it was asked for."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.server.content if self.path == "/" else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    server = Server(page(world(HOSTILE)).encode())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def chromium(folder: Path, url: str, *options: str) -> tuple[str, list[str]]:
    """Open a page without a window; return what it printed and what the page's console said."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--disable-background-networking", f"--user-data-dir={folder / 'profile'}"),
        *("--hide-scrollbars", "--window-size=1200,1600", *options, url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_it_and_has_nothing_to_say(tmp_path: Path, served: Server) -> None:
    url = f"http://127.0.0.1:{served.server_port}/"
    dom, said = chromium(tmp_path, url, "--dump-dom")
    assert said == []
    assert served.asked == ["/"]
    assert "pflalign</b> is the best by validation" in dom
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom
    assert dom.count("<svg") == 2
    assert "<script" not in dom
    assert "<img" not in dom


def test_the_policy_holds_what_a_template_might_let_through(tmp_path: Path, served: Server) -> None:
    """Were something to get in all the same, it could neither run nor call out."""
    evil = b"<img src='/pixel.png'><script>document.title='got in';fetch('/leak')</script></body>"
    served.content = served.content.replace(b"</body>", evil)
    dom, said = chromium(tmp_path, f"http://127.0.0.1:{served.server_port}/", "--dump-dom")
    assert served.asked == ["/"]
    assert "<title>got in" not in dom
    assert any("Content Security Policy" in line for line in said)


def test_it_can_be_opened_as_a_file_and_drawn_light_and_dark(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "compare.html"
    path.write_text(page(world()), encoding="utf-8")
    papers = []
    for scheme in (0, 1):  # dark, light
        picture = tmp_path / f"{scheme}.png"
        blink = f"--blink-settings=preferredColorScheme={scheme}"
        _, said = chromium(tmp_path, path.as_uri(), blink, f"--screenshot={picture}")
        assert said == []
        with Image.open(picture) as image:
            assert image.size == (1200, 1600)
            colours = image.convert("RGB").getcolors(maxcolors=10**6)
        assert colours is not None
        assert len(colours) > 100  # there are charts, and text
        papers.append(max(colours)[1])
    assert papers == [(0x15, 0x18, 0x1C), (0xFD, 0xFD, 0xFC)]
