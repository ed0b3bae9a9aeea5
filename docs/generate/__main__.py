"""Write the pages of docs/ that are made from the code: `python docs/generate`. The tests compare them with it."""

from __future__ import annotations

from pathlib import Path

import docs_api
import docs_fields
import docs_surface

DOCS = Path(__file__).resolve().parents[1]


def main() -> None:
    for source in (docs_surface, docs_fields, docs_api):
        for name, text in source.pages().items():
            path = DOCS / name
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
                print(f"docs/{name}")


if __name__ == "__main__":
    main()
