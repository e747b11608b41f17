"""The tab "Routing" of TensorBoard: the dashboard over the routing logs that lie below its log folder.

    tensorboard --logdir RUN

What a tab draws from event files is thinned: TensorBoard keeps 100 of 500 logged tensors. The recorder's own log has
all of it, so the tab reads that, while training writes it. TensorBoard finds this class by its entry point.

    GET index.js, tab.css, dashboard.js, dashboard.css      the page (``page/``)
    GET runs                  {"logdir": ..., "runs": [{"name": ..., "changed": ...}]}
    GET data?run=A&run=B      what ``page_data`` makes of these runs, or {"message": why it cannot}

A run is asked for by a name of the list, never by a path. Neither links nor anything but plain files are followed, so
that nothing outside the log folder can be read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs

from tensorboard.plugins import base_plugin

PAGE = Path(__file__).parent / "page"
# Those of moe/record_log.py, whose import takes seconds: TensorBoard starts without it.
FOLDER, HEADER, PART = "routing", "header.json", re.compile(r"part-\d{6}\.routing")
SCAN_EVERY = 5.0  # seconds
CACHED = 8
_FILES = {
    "/index.js": ("tab.js", "application/javascript; charset=utf-8"),
    "/tab.css": ("tab.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "application/javascript; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
}
_JSON = "application/json"
_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    # TensorBoard's page sets the policy under which the module runs; a file opened by itself may do nothing.
    ("Content-Security-Policy", "default-src 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-cache, must-revalidate"),
]

Answer = tuple[int, str, bytes]  # status, content type, content


class RoutingPlugin(base_plugin.TBPlugin):
    """What TensorBoard asks a plugin. ``context.logdir`` may be a folder or, of ``--logdir_spec``, several."""

    plugin_name = "gatewright_routing"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._logdir = context.logdir or ""
        self._runs = _Runs(_roots(context))
        self._made: OrderedDict[tuple, bytes] = OrderedDict()
        self._making = threading.Lock()

    def get_plugin_apps(self):
        apps = {route: _app(functools.partial(_serve_file, *entry)) for route, entry in _FILES.items()}
        return apps | {"/runs": _app(self._serve_runs), "/data": _app(self._serve_data)}

    def is_active(self) -> bool:
        return bool(self._runs.find(wait=0.3))

    def data_plugin_names(self):
        return ()

    def frontend_metadata(self):
        # The tab asks for what is new by itself.
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Routing", disable_reload=True)

    def _serve_runs(self, query: dict[str, list[str]]) -> Answer:
        runs = self._runs.find(wait=30.0)
        listed = [{"name": name, "changed": _changed(folder)} for name, folder in sorted(runs.items())]
        return _json(200, {"logdir": self._logdir, "runs": [run for run in listed if run["changed"]]})

    def _serve_data(self, query: dict[str, list[str]]) -> Answer:
        names = query.get("run", [])
        if not names:
            return _error(400, "no run was named")
        runs = self._runs.find(wait=30.0)
        for name in names:
            if name not in runs:
                return _error(404, f'no run "{name}" is recorded below {self._logdir}')
        state = tuple((name, _changed(runs[name])) for name in names)
        if not all(changed for _, changed in state):
            return _error(404, f"{' or '.join(names)} is no longer there")
        with self._making:
            if state not in self._made:
                try:
                    self._made[state] = _page_data({name: runs[name] for name in names})
                except (ValueError, OSError, ImportError) as error:
                    # Not an error of HTTP: a run that has only begun, say, or runs that cannot be compared.
                    return _json(200, {"message": " ".join(str(error).split())})
                while len(self._made) > CACHED:
                    self._made.popitem(last=False)
            self._made.move_to_end(state)
            return 200, _JSON, self._made[state]


def _page_data(folders: dict[str, Path]) -> bytes:
    from .data import page_data, read_runs

    logs = read_runs(list(folders.values()))
    # As TensorBoard calls them; the log folder itself has no name there.
    logs = [
        log if name == "." else dataclasses.replace(log, name=name) for name, log in zip(folders, logs, strict=True)
    ]
    return json.dumps(page_data(logs), separators=(",", ":"), allow_nan=False).encode()


def _app(serve: Callable[[dict[str, list[str]]], Answer]):
    """A WSGI application of a function that answers a query."""

    def application(environ, start_response):
        method = environ["REQUEST_METHOD"]
        if method in ("GET", "HEAD"):
            code, kind, content = serve(parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True))
        else:
            code, kind, content = _error(405, "only GET is answered")
        headers = [("Content-Type", kind), ("Content-Length", str(len(content))), *_HEADERS]
        start_response(f"{code} {HTTPStatus(code).phrase}", headers)
        return [] if method == "HEAD" else [content]

    return application


def _serve_file(name: str, kind: str, query: dict[str, list[str]]) -> Answer:
    return 200, kind, (PAGE / name).read_bytes()


def _json(code: int, content: dict) -> Answer:
    return code, _JSON, json.dumps(content).encode()


def _error(code: int, message: str) -> Answer:
    return _json(code, {"error": message})


def _roots(context: base_plugin.TBContext) -> dict[str, Path]:
    """The log folders by the name before their runs' names; "" before those of ``--logdir``."""
    spec = getattr(context.flags, "logdir_spec", "") if context.flags else ""
    if not spec or getattr(context.flags, "logdir", ""):
        return {"": Path(context.logdir)} if context.logdir else {}
    roots: dict[str, Path] = {}
    for part in spec.split(","):
        name, colon, path = part.partition(":")
        if not colon or "/" in name:
            name, path = "", part
        roots[name] = Path(path)
    return roots


class _Runs:
    """The recorded runs below the log folders, by name. Looking takes a while on a large or remote folder, so that it
    is done beside the requests, at most once in ``SCAN_EVERY`` seconds."""

    def __init__(self, roots: dict[str, Path]) -> None:
        self._roots = {name: path.expanduser() for name, path in roots.items()}
        self._found: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._scan: threading.Thread | None = None
        self._done = -SCAN_EVERY

    def find(self, wait: float) -> dict[str, Path]:
        """What the last look found; waits so many seconds at most for one that is due."""
        with self._lock:
            if self._scan is None and time.monotonic() - self._done >= SCAN_EVERY:
                self._scan = threading.Thread(target=self._look, daemon=True)
                self._scan.start()
            scan = self._scan
        if scan is not None:
            scan.join(wait)
        return self._found

    def _look(self) -> None:
        found = {}
        try:
            for prefix, root in self._roots.items():
                for folder in _logs_below(root):
                    name = folder.parent.relative_to(root).as_posix()
                    found[name if not prefix else prefix if name == "." else f"{prefix}/{name}"] = folder
        finally:
            with self._lock:
                self._found, self._scan, self._done = found, None, time.monotonic()


def _logs_below(root: Path):
    for folder, below, _ in os.walk(root):
        if FOLDER in below:
            log = Path(folder, FOLDER)
            if _is_plain(log, folder=True) and _is_plain(log / HEADER):
                below.remove(FOLDER)
                yield log
        below[:] = [name for name in below if not name.startswith(".")]


def _is_plain(path: Path, folder: bool = False) -> bool:
    try:
        entry = path.lstat()
    except OSError:
        return False
    return (stat.S_ISDIR if folder else stat.S_ISREG)(entry.st_mode)


def _changed(folder: Path) -> str:
    """Another text whenever the log has grown; "" where it is no longer a folder of plain files."""
    try:
        with os.scandir(folder) as entries:
            files = [(e, e.stat(follow_symlinks=False)) for e in entries if e.name == HEADER or PART.fullmatch(e.name)]
    except OSError:
        return ""
    if not all(stat.S_ISREG(about.st_mode) for _, about in files):
        return ""
    return f"{len(files)}-{sum(s.st_size for _, s in files)}-{max((s.st_mtime_ns for _, s in files), default=0)}"
