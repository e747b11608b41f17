"""Routing strategies, one a file. ``base.py`` holds the contract, ``losses.py`` the auxiliary losses.

A file put here is found by itself; another package registers its routers through the entry-point group
``gatewright.routers``.
"""

from .base import (
    GatedRouter,
    Router,
    Routing,
    TokenContext,
    create_router,
    list_routers,
    register_preset,
    register_router,
    router_class,
    router_options,
    router_paper,
)

__all__ = [
    "GatedRouter",
    "Router",
    "Routing",
    "TokenContext",
    "create_router",
    "list_routers",
    "register_preset",
    "register_router",
    "router_class",
    "router_options",
    "router_paper",
]
