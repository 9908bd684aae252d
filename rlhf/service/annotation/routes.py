"""Everything under which annotation is reached: the API and the pages."""

from __future__ import annotations

from fastapi import APIRouter

from rlhf.service.annotation import api, pages

router = APIRouter()
router.include_router(api.router)
router.include_router(pages.router)
