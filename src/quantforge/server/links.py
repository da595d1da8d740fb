"""OpenAPI links: what can be asked after an answer, and how with what it says."""

from __future__ import annotations

from typing import Any

Links = dict[str, dict[str, Any]]

COLLECTION = "/v1/collections/{name}"
JOB = "/v1/jobs/{id}"


def _link(method: str, path: str, parameters: dict[str, str], body: Any = None) -> dict[str, Any]:
    escaped = path.replace("~", "~0").replace("/", "~1")
    found = {"operationRef": f"#/paths/{escaped}/{method}", "parameters": parameters}
    return found if body is None else found | {"requestBody": body}


_HERE = {"name": "$request.path.name"}
_IDS = "$response.body#/ids"
_ID = {"id": "$response.body#/id"}

AFTER_LIST: Links = {"make": _link("put", COLLECTION, {})}
AFTER_COLLECTION: Links = {
    "look": _link("get", COLLECTION, _HERE),
    "delete": _link("delete", COLLECTION, _HERE),
    "train": _link("post", f"{COLLECTION}/train", _HERE),
    "add": _link("post", f"{COLLECTION}/points", _HERE),
    "list": _link("get", f"{COLLECTION}/points", _HERE),
    "compact": _link("post", f"{COLLECTION}/compact", _HERE),
}
AFTER_POINTS: Links = {
    "remove": _link("delete", f"{COLLECTION}/points", _HERE, {"ids": _IDS}),
    "search": _link("post", f"{COLLECTION}/search", _HERE, {"like": _IDS}),
    "compact": _link("post", f"{COLLECTION}/compact", _HERE),
}
AFTER_JOB: Links = {
    "look": _link("get", JOB, _ID),
    "result": _link("get", f"{JOB}/result", _ID),
    "cancel": _link("delete", JOB, _ID),
}
