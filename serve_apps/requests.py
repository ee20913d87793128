"""Reading a request: its JSON body into a typed request, its model's name checked. Used by all routes."""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from serve_apps.refusals import Refusal, RequestRefusedError, invalid

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, kind: type[Body]) -> Body:
    """The body as `kind`. Raises `RequestRefusedError` when it is not JSON or not of this form."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid(error) from None


def check_model(wanted: str, served: str) -> None:
    """Raises `RequestRefusedError` (404) unless the wanted model is the one served."""
    if wanted != served:
        raise RequestRefusedError(
            Refusal(404, f"the model '{wanted[:100]}' does not exist here: use '{served}'", "model_not_found", "model")
        )
