"""`gatewright dashboard RUN [RUN ...] --out report.html`: the routing of recorded runs as one file that opens
anywhere."""

import argparse
from pathlib import Path

DEMO = Path(__file__).parent / "demo"
DEMO_TITLE = "A small diffusion transformer on digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a recorded run; several are compared")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="where to write it (default: %(default)s)")
    parser.add_argument("--title", default="", help="what to call it (default: the runs' names)")
    parser.add_argument("--demo", action="store_true", help="show a small run that comes with gatewright")


def run(args: argparse.Namespace) -> int:
    from ...moe.files import write_bytes
    from .data import page_data, read_runs
    from .report import page_of

    if args.demo == bool(args.runs):
        raise ValueError("name the folders of recorded runs, or --demo, not both" if args.runs else _NOTHING)
    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it, {out / 'report.html'}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if args.demo and not DEMO.is_dir():
        raise ValueError("this installation of gatewright holds no demo run")
    logs = read_runs([DEMO] if args.demo else args.runs)
    data = page_data(logs, title=args.title or (DEMO_TITLE if args.demo else ""))
    page = page_of(data).encode()
    write_bytes(out, page)
    for shown in data["runs"]:
        for sentence in (*shown["notices"], *(alert["sentence"] for alert in shown["alerts"])):
            print(f"{shown['name']}: {sentence}")
    print(f"wrote {out} ({len(page) / 1e6:.2f} MB): open it in a browser, it needs no network")
    return 0


_NOTHING = "name the folder of a recorded run, or --demo to see one that comes with gatewright"
