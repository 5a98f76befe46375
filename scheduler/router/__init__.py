"""The token-level router: which mode a prompt needs (RouteT2I, arXiv 2411.13787, made three-way). See docs/router.md."""
