"""Which web pages may use the endpoint from a browser: those of origins that the operator lists."""

EXPOSED = ", ".join(
    [
        "x-request-id, openai-processing-ms, x-nanogpt-ranks, retry-after, x-should-retry",
        *(
            f"x-ratelimit-{what}-{kind}"
            for what in ("limit", "remaining", "reset")
            for kind in ("requests", "tokens")
        ),
    ]
)
PREFLIGHT_S = 600  # how long a browser may remember the answer to a preflight


def headers(
    origins: tuple[str, ...],
    origin: str | None,
    *,
    preflight: bool,
    methods: str,
    asked: str | None,
) -> dict[str, str]:
    """Headers for a request from `origin` ("*" in `origins`: any). No cookies are ever used.

    For a preflight: `methods` that the route has, and the header names that were asked for.
    """
    if not origins:
        return {}
    found = {"Vary": "Origin"}
    if origin is None or not ("*" in origins or origin in origins):
        return found
    found["Access-Control-Allow-Origin"] = origin
    found["Access-Control-Expose-Headers"] = EXPOSED
    if preflight:
        found["Access-Control-Allow-Methods"] = methods
        found["Access-Control-Allow-Headers"] = asked or "authorization, content-type"
        found["Access-Control-Max-Age"] = str(PREFLIGHT_S)
    return found
