"""All benchmarks: prints their tables and writes them into docs/benchmarks.md.

    python benchmarks/run.py [--quick]      (or: make bench)

The document is rewritten between its markers; the text around them is for people to write.
"""

from pathlib import Path

import kto_step
import labeling
import offline
import operator_page
import pulling
import rounds
import scale
import scorers
import storage
import true_size
import watching
from measuring import Table, arguments, become_like_a_worker, machine
from rich.console import Console

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BENCHMARKS = (
    *(kto_step, true_size, rounds, storage, pulling, scale, offline, scorers),
    *(labeling, operator_page, watching),
)
BEGIN, END = "<!-- begin: written by benchmarks/run.py -->", "<!-- end -->"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="a document with the markers")
    args = parser.parse_args()
    between_markers(args.out.read_text(), "")  # a document without them is found out now, not in ten minutes
    become_like_a_worker()
    console = Console()
    console.print(machine(), highlight=False)
    quick = "A quick run, too short for conclusions: " if args.quick else ""
    sections = [f"{quick}{machine()}."]
    for benchmark in BENCHMARKS:
        tables = benchmark.measure(args.quick)
        for table in [tables] if isinstance(tables, Table) else tables:
            console.print(table.rich())
            sections.append(table.markdown())
    args.out.write_text(between_markers(args.out.read_text(), "\n\n".join(sections)))
    console.print(f"wrote {args.out}", highlight=False)


def between_markers(document: str, body: str) -> str:
    """The document with `body` between its markers. Raises ValueError when it does not have each of them once."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"the document needs the lines {BEGIN!r} and {END!r}, once each")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
