"""The README in both languages, and the documentation as a site."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    ["README.md", "README.zh.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in REPOSITORY.glob("docs/*.md"))]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def outline(page: str) -> tuple[list[int], list[tuple[str, str]], list[str], set[str]]:
    """Return what both languages share: depths of headings, code, targets of links, and names in code type."""
    text = read(page)
    blocks = [(kind, re.sub(r"\s+#.*", "", code)) for kind, code in FENCE.findall(text)]
    prose = FENCE.sub("", text)
    depths = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", prose) if not target.startswith("README")]
    return depths, blocks, sorted(targets), set(re.findall(r"`([^`\n]+)`", prose))


def test_the_readme_says_the_same_in_both_languages():
    for ours, theirs in zip(outline("README.md"), outline("README.zh.md")):
        assert ours == theirs


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_readme_is_short(page):
    assert len(read(page).splitlines()) <= 200


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page):
    here = (REPOSITORY / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if re.match(r"\w+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = here / path if path else REPOSITORY / page
        assert file.exists(), f"{page}: {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page}: {target}"


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in REPOSITORY.glob("docs/*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (tmp_path / "site" / name).is_file(), page.name


def test_no_text_refers_to_documents_that_are_not_here():
    for path in [
        *REPOSITORY.glob("jit_accel/**/*.py"),
        *REPOSITORY.glob("tests/**/*.py"),
        *REPOSITORY.glob("launch/*"),
    ]:
        if path.is_file() and path != Path(__file__) and "fixtures" not in path.parts:
            assert not re.search(r"\b(SPEC|DESIGN|STYLE)\b(\.md|,? section|,? \d)", path.read_text(encoding="utf-8")), (
                path
            )


def test_the_map_of_the_rooms_names_each_module_and_none_that_is_not_there():
    rooms = read("docs/architecture.md").split("## Promises")[0]
    cells = [line.split("|")[1] for line in rooms.splitlines() if line.startswith("| `")]
    named = {name.rpartition("/")[2] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    files = [path for path in REPOSITORY.glob("jit_accel/*/**/*.py") if "builtin" not in path.parts]
    assert named == {path.stem for path in files} - {"__init__", "__main__"}
