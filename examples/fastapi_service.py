"""A web service on one cached policy: clients edit its fields and get decisions, without a prefill for each request.

Install and run it: pip install 'programmable-kv[examples]' && python examples/fastapi_service.py
"""

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from programmable_kv import Model, ModelQueue, Notebook, ProgrammableKVError, load_model

POLICY = """You are the support agent of an online shop.
order_status: {order_status}
- If order_status is pending, cancel.
- If order_status is shipped, deny.
Reply with the action only."""


class Question(BaseModel):
    request: str
    options: list[str]


def create_app(model: Model) -> FastAPI:
    """The service, with one notebook. Requests wait in the model's queue, so the event loop stays free."""
    notebook = Notebook(model).message("system", POLICY, order_status="pending")
    notebook.prefill()
    queue = ModelQueue.of(model)
    app = FastAPI(title="programmable-kv")

    @app.put("/fields")
    async def edit(fields: dict[str, str]) -> dict[str, float]:
        account = await queue.run(notebook.edit, fields)
        return {"tokens_computed": account.tokens_computed, "seconds": account.seconds}

    @app.get("/fields")
    async def fields() -> dict[str, str]:
        return notebook.fields

    @app.post("/decide")
    async def decide(question: Question) -> dict[str, object]:
        decision = await queue.run(notebook.decide, question.request, question.options)
        return {"choice": decision.choice, "probabilities": decision.probabilities}

    @app.exception_handler(ProgrammableKVError)
    def refused(_: Request, error: ProgrammableKVError) -> JSONResponse:
        return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status_code=422)

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(load_model()), port=8000)
