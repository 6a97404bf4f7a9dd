"""Answers of Hubs that say it another way, put into the form that the library reads. Pure.

The library takes what huggingface.co writes and fails on anything else: on `actions: null`, on a
link without a host, on a route that is not there. What is missing here and means the same as what
it would have been is filled in; what means something else stays, and fails with its own text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx2

from ckptd import errors

BATCH = ".git/info/lfs/objects/batch"
VALIDATE = "/api/validate-yaml"
NO_SUCH_ROUTE = frozenset({404, 405, 410, 501})
"""What Hubs answer to a request for something that they do not have."""
_OF_THE_BODY = frozenset(
    {"content-length", "content-encoding", "transfer-encoding", "content-type"}
)


def usual(request: httpx2.Request, response: httpx2.Response) -> httpx2.Response:
    """Return the answer to a POST in the form that the library reads.

    Raises:
        errors.HubUnavailable: it says nothing of some of the objects that were asked for.
        LookupError, TypeError, AttributeError, ValueError: it is of no form that is known.
    """
    path = request.url.path
    if path.endswith(VALIDATE):
        return _validated(response)
    if not response.is_success:
        return response
    if path.endswith(BATCH):
        asked = {one["oid"]: one["size"] for one in json.loads(request.content)["objects"]}
        return _rewritten(response, batch(response.json(), asked, response.url))
    if "/preupload/" in path:
        return _rewritten(response, preupload(response.json()))
    return response


def batch(answer: Any, asked: Mapping[str, int], url: httpx2.URL) -> dict[str, Any]:
    """Return the answer of an LFS batch about exactly the objects that were asked for.

    No actions, null, an empty mapping, or actions without `upload` all mean that the object is
    there. Links may be relative to `url`, from where the answer came.
    """
    objects = []
    for item in answer["objects"]:
        oid = str(item["oid"]).lower().removeprefix("sha256:")
        if oid not in asked:
            continue
        made: dict[str, Any] = {"oid": oid, "size": asked[oid]}
        if problem := item.get("error"):
            made["error"] = _problem(problem)
        else:
            made |= _actions(item.get("actions") or {}, url)
        objects.append(made)
    silent = sorted(asked.keys() - {one["oid"] for one in objects})
    if silent:
        raise errors.HubUnavailable(
            f"asked where to upload {len(asked)} files, the Hub said nothing of {len(silent)} "
            f"(the first is {silent[0]})",
            hint="a new try asks again",
        )
    return {"transfer": answer.get("transfer"), "objects": objects}


def preupload(answer: Any) -> dict[str, Any]:
    """Return the answer of a preupload, in which no file is to be ignored unless it says so."""
    return {
        **answer,
        "files": [
            file
            | {
                "uploadMode": str(file["uploadMode"]).lower(),
                "shouldIgnore": bool(file.get("shouldIgnore")),
            }
            for file in answer["files"]
        ],
    }


def _validated(response: httpx2.Response) -> httpx2.Response:
    """Return what was said of a card; a Hub that checks none has nothing against it."""
    if response.status_code in NO_SUCH_ROUTE:
        return httpx2.Response(200, json={"errors": [], "warnings": []}, request=response.request)
    try:
        told = response.json()
    except ValueError:  # a page
        told = {}
    told = told if isinstance(told, dict) else {}
    lists = {name: _messages(told.get(name)) for name in ("errors", "warnings")}
    return _rewritten(response, told | lists)


def _messages(found: Any) -> list[dict[str, Any]]:
    items = found if isinstance(found, list) else []
    return [item if isinstance(item, dict) else {"message": str(item)} for item in items]


def _actions(actions: Any, url: httpx2.URL) -> dict[str, Any]:
    """Return the actions of an object, with links that can be followed; nothing where there is none."""
    if not actions.get("upload"):
        return {}
    return {
        "actions": {
            name: _link(actions[name], url) for name in ("upload", "verify") if actions.get(name)
        }
    }


def _link(action: Any, url: httpx2.URL) -> dict[str, Any]:
    """Return an action whose links are absolute: its own, and those of its parts."""
    header = {
        key: _absolute(value, url) if str(key).isdigit() else value
        for key, value in (action.get("header") or {}).items()
    }
    return {"href": _absolute(action["href"], url), "header": header}


def _absolute(href: str, url: httpx2.URL) -> str:
    return href if "://" in href else str(url.join(href))


def _problem(problem: Any) -> dict[str, Any]:
    if not isinstance(problem, dict):
        return {"code": 0, "message": str(problem)}
    code = str(problem.get("code") or 0)
    return {
        "code": int(code) if code.isdecimal() else 0,
        "message": str(problem.get("message") or "refused"),
    }


def _rewritten(response: httpx2.Response, value: Any) -> httpx2.Response:
    headers = [
        (name, text)
        for name, text in response.headers.multi_items()
        if name.lower() not in _OF_THE_BODY
    ]
    return httpx2.Response(
        response.status_code, headers=headers, json=value, request=response.request
    )
