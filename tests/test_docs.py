"""The documentation says what is so: the table of errors, the table of dependencies, the links, the Makefile's targets.

`python -m tests.test_docs` writes the table of errors anew.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dormouse.errors import ConfigError, DormouseError, RequestError

ROOT = Path(__file__).parent.parent
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"
ERRORS = re.compile(r"(<!-- errors: [^\n]*-->\n).*?(<!-- end of errors -->)", re.DOTALL)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def error_classes(base: type[DormouseError] = DormouseError) -> Iterator[type[DormouseError]]:
    """All error classes of the package's own tree, parents first."""
    for child in base.__subclasses__():
        if child.__module__ == DormouseError.__module__:
            yield child
            yield from error_classes(child)


def error_table() -> str:
    """The table as it has to be."""
    rows = "".join(
        f"| `{error.code}` | {error.__name__} | {error.exit_code} | {error.http_status} | "
        f"{(error.__doc__ or '').split('. ')[0].splitlines()[0].rstrip('.')} |\n"
        for error in error_classes()
    )
    return "\n| code | class | exit | HTTP | meaning |\n|---|---|---|---|---|\n" + rows + "\n"


def with_error_table(text: str) -> str:
    """The page with its table renewed."""
    return ERRORS.sub(lambda match: match[1] + error_table() + match[2], text)


def direct_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["transformers"], *extras["dev"]]
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in requirements}
    return names - {"dormouse"}


def test_the_table_of_errors_is_fresh() -> None:
    text = TROUBLESHOOTING.read_text()
    assert text == with_error_table(text), "stale: run `python -m tests.test_docs`"


def test_every_error_class_has_its_row_and_they_are_told_apart() -> None:
    codes = [error.code for error in error_classes()]
    assert len(codes) == len(set(codes)) > 10


def test_the_server_documents_every_code_under_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ([^|]+) \|", (ROOT / "docs/serving.md").read_text(), re.MULTILINE)
    documented = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    # A wrong configuration is no answer to a request for tokens, and a wrong request has finer codes.
    assert {
        (error.http_status, error.code)
        for error in error_classes()
        if not issubclass(error, ConfigError | RequestError)
    } <= documented


def test_every_dependency_has_a_reason_and_a_pin() -> None:
    reasons = (ROOT / "docs/dependencies.md").read_text().lower()
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for name in direct_dependencies():
        assert f"\n| {name} |" in reasons, f"docs/dependencies.md has no row for {name}"
        assert name in pins, f"constraints.txt has no pin for {name}"


def test_the_documented_versions_are_the_pinned_ones() -> None:
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    rows = re.findall(
        r"^\| ([\w-]+) \|[^|]+\| (\d[\d.]*) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 20
    for name, version in rows:
        assert f"\n{name.lower()}=={version}" in pins, f"{name} {version} is not what constraints.txt has"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_makefile_has_what_the_documentation_mentions() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name} mentions `make {target}`"


if __name__ == "__main__":
    TROUBLESHOOTING.write_text(with_error_table(TROUBLESHOOTING.read_text()))
