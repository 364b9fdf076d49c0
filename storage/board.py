"""What optuna-dashboard shows of a study beside its trials: a note, plots, an image, attributes; and its own pages.

All of a study's is written in one transaction: readers see it whole, and of several writers the last one's.
Knows how optuna-dashboard keeps these things. Knows nothing of what they say.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import optuna
import optuna_dashboard
from optuna.artifacts import ArtifactMeta, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import InMemoryStorage
from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage import DatabaseUnavailable
from storage.files import replace_file
from storage.retrying import RetryingStorage
from storage.urls import without_password

BOARD_LOCK = 3  # first key of the advisory lock of those who write a study's board
NOTE, NOTE_VERSION, PLOT, ARTIFACT = "dashboard:note_str:", "dashboard:note_ver", "dashboard:plot_data:", "artifacts:"
OURS = "studies-"  # begins the ids of our plots, so that people's own stay
IMAGES = uuid.UUID("5f0f2c7e-7a4e-4a53-9d0e-6f9c1c5b8a11")  # namespace of our images' ids; uploads have random ids

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]  # WSGI


@dataclass(frozen=True, kw_only=True)
class Image:
    """A PNG in the artifact folder. Equal keys have equal ids."""

    id: str
    name: str  # as a file

    def path(self, study_id: int) -> str:
        """Where the dashboard serves it."""
        return f"/artifacts/{study_id}/{self.id}"


def keep_image(folder: Path, name: str, key: str, draw: Callable[[], bytes]) -> Image:
    """An image that is drawn only if none of this key is in the artifact folder. Raises OSError."""
    image = Image(id=str(uuid.uuid5(IMAGES, key)), name=name)
    path = folder / image.id
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, draw())
    return image


def put(
    storage: RetryingStorage,
    study_id: int,
    *,
    note: str,
    plots: Mapping[str, Any],
    attributes: Mapping[str, Any],
    image: Image | None,
    folder: Path,
) -> bool:
    """Replace a study's note, and the plots and image of an earlier call; False where all was so already.

    note: Markdown. plots: Plotly figures by id: letters, digits and hyphens. attributes: user attributes of the study
    as JSON values, None removes one; others stay. folder: where images are; one that is replaced is removed.
    A study that is gone is left so.
    """
    draft = _draft(note, plots, image)
    values = {key: json.dumps(value) for key, value in attributes.items() if value is not None}
    unset = [key for key in attributes if key not in values]

    def write(connection: Connection) -> tuple[bool, list[str]]:
        connection.execute(
            text("select pg_advisory_xact_lock(:key, :study_id)"), {"key": BOARD_LOCK, "study_id": study_id}
        )
        there: dict[str, str] = dict(connection.execute(text(WRITTEN), {"study_id": study_id}).tuples().all())
        version = int(there.pop(NOTE_VERSION, "0"))
        owned = {key: value for key, value in there.items() if not key.startswith(ARTIFACT) or _is_ours(key)}
        changed = {key: value for key, value in draft.items() if owned.get(key) != value}
        stale = [key for key in owned if key not in draft]
        if any(key.startswith(NOTE) for key in (*changed, *stale)):
            changed[NOTE_VERSION] = str(version + 1)  # who is editing the note is told to load it anew
        rows = 0
        for table, gone, new in (("system", stale, changed), ("user", unset, values)):
            rows += connection.execute(text(DELETE[table]), {"study_id": study_id, "keys": gone}).rowcount
            rows += connection.execute(
                text(UPSERT[table]), {"study_id": study_id, "keys": list(new), "new": list(new.values())}
            ).rowcount
        return rows > 0, [key.removeprefix(ARTIFACT) for key in stale if key.startswith(ARTIFACT)]

    written, replaced = storage.transaction(write)
    for image_id in replaced:
        (folder / image_id).unlink(missing_ok=True)
    return written


def check_writable(storage: RetryingStorage) -> None:
    """Raise DatabaseUnavailable where boards cannot be written: a role or a server that only reads."""
    allowed = text(
        "select current_setting('transaction_read_only') = 'off' and bool_and(has_table_privilege(t, 'insert')) "
        "from unnest(cast(:tables as text[])) t"
    )
    if not storage.transaction(lambda c: c.execute(allowed, {"tables": list(TABLES.values())}).scalar_one()):
        raise DatabaseUnavailable(
            f"{without_password(storage.engine.url)}: may only be read, and decisions are written to it; "
            "use another role, or --dry-run"
        )


WRITTEN = f"""
select key, value_json from study_system_attributes where study_id = :study_id
and (key = '{NOTE_VERSION}' or starts_with(key, '{NOTE}') or starts_with(key, '{PLOT}{OURS}')
     or starts_with(key, '{ARTIFACT}'))
"""  # noqa: S608 - constants of ours

TABLES = {"system": "study_system_attributes", "user": "study_user_attributes"}
DELETE = {
    name: f"delete from {table} where study_id = :study_id and key = any(:keys)"  # noqa: S608 - as above
    for name, table in TABLES.items()
}
UPSERT = {
    name: f"""
insert into {table} as a (study_id, key, value_json)
select s.study_id, n.key, n.value
from studies s, unnest(cast(:keys as text[]), cast(:new as text[])) as n (key, value) where s.study_id = :study_id
on conflict (study_id, key) do update set value_json = excluded.value_json where a.value_json <> excluded.value_json
"""  # noqa: S608 - as above
    for name, table in TABLES.items()
}


def _is_ours(key: str) -> bool:
    return uuid.UUID(key.removeprefix(ARTIFACT)).version == uuid.UUID(int=0, version=5).version


def _draft(note: str, plots: Mapping[str, Any], image: Image | None) -> dict[str, str]:
    """The rows of study_system_attributes, value_json by key, as optuna-dashboard writes them to a study in memory."""
    draft = optuna.create_study(storage=InMemoryStorage())
    optuna_dashboard.save_note(draft, note)
    for name, figure in plots.items():
        optuna_dashboard.save_plotly_graph_object(draft, figure, graph_object_id=OURS + name)
    attrs: dict[str, Any] = draft._storage.get_study_system_attrs(draft._study_id)
    attrs.pop(NOTE_VERSION)
    if image is not None:
        meta = ArtifactMeta(artifact_id=image.id, filename=image.name, mimetype="image/png", encoding=None)
        attrs[ARTIFACT + image.id] = json.dumps(asdict(meta))  # JSON in JSON, as Optuna has it
    return {key: json.dumps(value) for key, value in attrs.items()}


def trial_values(storage: RetryingStorage, study_id: int) -> dict[int, float]:
    """The first value of every complete trial, by number, in one query."""
    statement = text(
        "select t.number, v.value from trials t join trial_values v using (trial_id) "
        "where t.study_id = :study_id and t.state = 'COMPLETE' and v.objective = 0 "
        "and v.value is not null order by t.number"
    )
    rows = storage.transaction(lambda c: c.execute(statement, {"study_id": study_id}).all())
    return {row.number: row.value for row in rows}


def application(storage: RetryingStorage, folder: Path) -> Application:
    """optuna-dashboard's pages over a storage and the artifact folder, as WSGI.

    A page asked for while the database is away waits for `storage.wait_s`, and then says in one line that it is.
    """
    pages = cast(Any, optuna_dashboard.wsgi(storage, artifact_store=FileSystemArtifactStore(folder)))
    pages.catchall = False  # what a page raises comes here, not as a traceback to the log

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return pages(environ, start_response)
        except DatabaseUnavailable as error:
            status, line = "503 Service Unavailable", str(error)
        except ArtifactNotFound:
            status, line = "404 Not Found", f"{environ['PATH_INFO']}: not in {folder}; another machine may have it"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [line.encode()]

    return answer
