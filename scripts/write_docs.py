"""Write the documents that are generated from the code: `python -m scripts.write_docs`, in the repository's root.

It writes `docs/claims.md`, `docs/cli.md`, `docs/reference.md`, `docs/templates.md`, and the generated parts of
`docs/structure.md` and `docs/explain-miss.md`. A test fails when one of them differs from the code or the records.
"""

from __future__ import annotations

from pathlib import Path

from scripts.causes_page import causes_page
from scripts.claims_page import claims_page
from scripts.cli_page import cli_page
from scripts.reference_page import reference_page
from scripts.structure_page import structure_page
from scripts.templates_page import templates_page

ROOT = Path(__file__).parent.parent


def generated() -> dict[Path, str]:
    """Return path -> text for every generated document."""
    docs = ROOT / "docs"
    structure, causes = docs / "structure.md", docs / "explain-miss.md"
    return {
        docs / "claims.md": claims_page(ROOT / "results"),
        docs / "cli.md": cli_page(),
        docs / "reference.md": reference_page(),
        docs / "templates.md": templates_page(ROOT / "tests" / "templates"),
        causes: causes_page(causes.read_text(encoding="utf-8")),
        structure: structure_page(structure.read_text(encoding="utf-8"), ROOT),
    }


def main() -> None:
    """Write the documents that differ, and print their paths."""
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
