"""All pages but those of annotation."""

from __future__ import annotations

from fastapi import APIRouter

from rlhf.service.pages import assets, audit, batches, login, nodes, reports, runs

router = APIRouter(include_in_schema=False)
for module in (assets, login, runs, nodes, reports, batches, audit):
    router.include_router(module.router)
