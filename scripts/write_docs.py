"""Write the pages under `docs/` that are generated from declarations."""

from __future__ import annotations

from pathlib import Path

from simpletuner.config.export import options_markdown

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    (DOCS / "OPTIONS.md").write_text(options_markdown())


if __name__ == "__main__":
    main()
