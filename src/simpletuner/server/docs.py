"""/docs and /redoc from vendored files, so that they work offline and under a strict content policy."""

from __future__ import annotations

import secrets
from html import escape
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from simpletuner.server.rights import public

STATIC = Path(__file__).parent / "static"

SWAGGER = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<link rel="icon" href="/docs/assets/swagger-ui/favicon-32x32.png">
<link rel="stylesheet" href="/docs/assets/swagger-ui/swagger-ui.css"></head><body><div id="swagger-ui"></div>
<script nonce="{nonce}" src="/docs/assets/swagger-ui/swagger-ui-bundle.js"></script>
<script nonce="{nonce}">SwaggerUIBundle({{url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true}})</script>
</body></html>"""
REDOC = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head><body><div id="redoc"></div>
<script nonce="{nonce}" src="/docs/assets/redoc/redoc.standalone.js"></script>
<script nonce="{nonce}">
Redoc.init("/openapi.json", {{disableGoogleFont: true}}, document.getElementById("redoc"))
</script>
</body></html>"""


def add_docs(app: FastAPI) -> None:
    router = APIRouter(include_in_schema=False)

    @router.get("/docs", dependencies=[public()])
    async def swagger() -> HTMLResponse:  # pyright: ignore[reportUnusedFunction]
        return _page(SWAGGER, app.title)

    @router.get("/redoc", dependencies=[public()])
    async def redoc() -> HTMLResponse:  # pyright: ignore[reportUnusedFunction]
        return _page(REDOC, app.title)

    app.include_router(router)
    app.mount("/docs/assets", StaticFiles(directory=STATIC), name="docs-assets")


def _page(template: str, title: str) -> HTMLResponse:
    nonce = secrets.token_urlsafe(16)
    # Both pages style themselves with inline styles, and Redoc searches in a worker made from a blob.
    policy = (
        f"default-src 'self'; script-src 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; worker-src blob:; frame-ancestors 'none'"
    )
    return HTMLResponse(template.format(title=escape(title), nonce=nonce), headers={"Content-Security-Policy": policy})
