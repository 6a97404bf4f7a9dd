"""Endpoints about the files of a revision: tree, paths-info, and what an upload must look like."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import history, names, refusal, rules
from ckptd.hub.local.options import Hub
from ckptd.hub.local.routes.repos import REPO
from ckptd.hub.local.values import Commit, File, pointer
from ckptd.hub.local.wire import Call, route


class UploadFile(BaseModel):
    """A file about to be uploaded; `sample` is its first bytes in base64."""

    path: str
    size: int
    sample: str = ""


class UploadBody(BaseModel):
    """Files about to be uploaded, and a .gitignore to use in place of the repo's."""

    files: list[UploadFile]
    gitIgnore: str | None = None  # noqa: N815 - the API's name


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    return [
        route(hub, REPO + "/tree/{revision}", "GET", tree),
        route(hub, REPO + "/tree/{revision}/{path:path}", "GET", tree),
        route(hub, REPO + "/paths-info/{revision}", "POST", paths_info),
        route(hub, REPO + "/preupload/{revision}", "POST", preupload),
    ]


def tree(call: Call) -> Response:
    """List a folder, page by page: ?recursive=, ?expand=, ?cursor=, ?limit=."""
    commit = call.commit(call.repo())
    folder = call.params.get("path", "").strip("/")
    expand, recursive = call.flag("expand"), call.flag("recursive")
    entries = history.tree(commit, folder, recursive=recursive)
    page = call.hub.choices.tree_page // 20 if expand else call.hub.choices.tree_page
    limit = max(1, min(_number(call, "limit", page), page))
    start = _number(call, "cursor", 0)
    chosen = dict(entries[start : start + limit])
    headers = {}
    if start + limit < len(entries):
        query = dict(call.query) | {"cursor": str(start + limit)}
        url = f"{call.base_url}{call.url_path}?{urlencode(query)}"
        headers["Link"] = f'<{url}>; rel="next"'
    return JSONResponse(_described(call, commit, chosen, expand=expand), headers=headers)


def paths_info(call: Call) -> Response:
    """Return what the named paths hold; those that hold nothing are left out."""
    commit = call.commit(call.repo())
    form = parse_qs(call.body.decode(errors="replace"), max_num_fields=20_000)
    paths = [path.strip("/") for path in form.get("paths", [])]
    expand = form.get("expand", ["false"])[0].lower() in ("1", "true")
    found = {path: history.entry(commit, path) for path in paths}
    chosen = {path: entry for path, entry in found.items() if entry is not None}
    return JSONResponse(_described(call, commit, chosen, expand=expand))


def preupload(call: Call) -> Response:
    """Say for each file how it must be uploaded, whether it is ignored, what its path holds now."""
    revision = call.params["revision"]
    repo = call.contributable(None if call.flag("create_pr") else revision)
    body = call.json(UploadBody)
    commit = history.resolve(call.hub.store, call.repo_id(), repo, revision)
    gitattributes = _text(call, commit, ".gitattributes")
    ignored = body.gitIgnore if body.gitIgnore is not None else _text(call, commit, ".gitignore")
    answers = []
    for file in body.files:
        names.path(file.path)
        lfs = file.size > 0 and rules.is_lfs(
            file.path, size=file.size, sample=_sample(file), gitattributes=gitattributes
        )
        answer: dict[str, Any] = {
            "path": file.path,
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": rules.is_ignored(file.path, ignored),
        }
        if file.path in commit.files:
            answer["oid"] = commit.files[file.path].etag
        answers.append(answer)
    return JSONResponse({"files": answers, "commitOid": commit.oid})


def _described(
    call: Call, commit: Commit, entries: Mapping[str, File | history.Folder], *, expand: bool
) -> list[dict[str, Any]]:
    items = [_item(call.hub, path, entry) for path, entry in entries.items()]
    if expand:
        changed = history.last_changes(call.hub.store, call.repo_id(), commit, entries)
        for item in items:
            last = changed[item["path"]]
            item["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return items


def _item(hub: Hub, path: str, entry: File | history.Folder) -> dict[str, Any]:
    if isinstance(entry, history.Folder):
        return {"type": "directory", "path": path, "oid": entry.oid, "size": 0}
    item: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.lfs:
        item["lfs"] = {
            "oid": entry.sha256,
            "size": entry.size,
            "pointerSize": len(pointer(entry.sha256, entry.size)),
        }
    if entry.xet_hash is not None and hub.xet is not None:
        item["xetHash"] = entry.xet_hash
    return item


def _text(call: Call, commit: Commit, path: str) -> str:
    file = commit.files.get(path)
    if file is None or file.lfs:
        return ""
    return call.hub.store.blobs.read(file.sha256).decode(errors="replace")


def _sample(file: UploadFile) -> bytes:
    try:
        return base64.b64decode(file.sample, validate=True)
    except (binascii.Error, ValueError):
        raise refusal.bad_request(f"{file.path}: the sample is not base64") from None


def _number(call: Call, name: str, default: int) -> int:
    text = call.query.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else default
