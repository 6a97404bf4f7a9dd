"""Endpoints that belong to no repo: who am I, model card check, what clients ask at start."""

from __future__ import annotations

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import accounts, front_matter, refusal
from ckptd.hub.local.options import Hub
from ckptd.hub.local.wire import Call, route


class CardBody(BaseModel):
    """A README.md to be checked."""

    content: str
    repoType: str = "model"  # noqa: N815 - the API's name


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    return [
        route(hub, "/api/whoami-v2", "GET", whoami),
        route(hub, "/api/validate-yaml", "POST", validate_card),
        route(hub, "/api/agent-harnesses", "GET", agent_harnesses),
    ]


def whoami(call: Call) -> Response:
    """Return the account behind the token."""
    account = call.account
    if account is accounts.ANONYMOUS:
        raise refusal.login_needed()
    orgs = [name for name in account.orgs if name != accounts.EVERYWHERE]
    return JSONResponse(
        {
            "type": "user",
            "id": account.name,
            "name": account.name,
            "fullname": account.name,
            "email": f"{account.name}@localhost",
            "isPro": False,
            "orgs": [{"type": "org", "name": org, "roleInOrg": account.role} for org in orgs],
            "auth": {
                "type": "access_token",
                "accessToken": {
                    "displayName": f"{account.name} ({account.role})",
                    "role": "read" if account.role == "read" else "write",
                },
            },
        }
    )


def validate_card(call: Call) -> Response:
    """Check the front matter of a README.md: 200, or 400 with what is wrong."""
    errors, warnings = front_matter.check(call.json(CardBody).content)
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return JSONResponse(answer, 400 if errors else 200)


def agent_harnesses(_: Call) -> Response:
    """Return an empty registry; the client asks for it once a day."""
    return JSONResponse({"standardEnvVars": [], "harnesses": {}})
