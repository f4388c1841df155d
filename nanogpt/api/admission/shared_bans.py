"""The bans that all servers of one queue share, in Redis: a hash with the bans in force.

Beside the bans it has two fields. `version` is another number after each change, so that who has a
copy can ask cheaply whether it is still good. `born` is made with the hash: another one tells that
Redis has lost what it had.
"""

import secrets
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from nanogpt.api.admission.bans import Ban
from nanogpt.api.admission.subject import Subject
from nanogpt.errors import NanogptError

T = TypeVar("T")

# KEYS: the hash. ARGV: a new `born`. Returns all fields.
_READ = """
redis.call('HSETNX', KEYS[1], 'born', ARGV[1])
return redis.call('HGETALL', KEYS[1])
"""

# KEYS: the hash. ARGV: a new `born`, the ban's field, the ban, "1" to replace another that lasts
# longer.
_PUT = """
redis.call('HSETNX', KEYS[1], 'born', ARGV[1])
local known = redis.call('HGET', KEYS[1], ARGV[2])
if known and ARGV[4] ~= '1' then
    local old, new = cjson.decode(known)['until'], cjson.decode(ARGV[3])['until']
    if new ~= cjson.null and (old == cjson.null or new <= old) then return end
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[1], 'version', 1)
"""

# KEYS: the hash. ARGV: key and user as State.lift means them, and the time after which bans are
# later ones, which stay ("": lift all). Returns the bans that are gone.
_LIFT = """
local gone, fields = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
    if fields[i] ~= 'born' and fields[i] ~= 'version' then
        local ban = cjson.decode(fields[i + 1])
        local meant = ban.key == ARGV[1] or (ARGV[1] == '' and ARGV[2] ~= '')
        local before = ARGV[3] == '' or ban.created <= tonumber(ARGV[3])
        if ban.user == ARGV[2] and meant and before then
            redis.call('HDEL', KEYS[1], fields[i])
            gone[#gone + 1] = fields[i + 1]
        end
    end
end
if #gone > 0 then redis.call('HINCRBY', KEYS[1], 'version', 1) end
return gone
"""

# KEYS: the hash. ARGV: fields and what they hold; those that still do are deleted.
_FORGET = """
for i = 1, #ARGV, 2 do
    if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
        redis.call('HDEL', KEYS[1], ARGV[i])
    end
end
"""


class BansUnavailable(NanogptError):
    """Redis does not answer, or has something else there."""


class Version(NamedTuple):
    """Of the hash; two are the same when nothing has changed."""

    born: str
    changes: int


class SharedBans:
    """`client` is a connection to Redis, which this closes; `queue` tells apart who shares a Redis.
    Every method raises BansUnavailable."""

    def __init__(self, client: Any, queue: str) -> None:
        import redis  # it is there: it made the client

        self.queue = queue
        self._client, self._key = client, f"{{{queue}}}:bans"
        self._error = redis.RedisError
        scripts = (_READ, _PUT, _LIFT, _FORGET)
        self._read, self._put, self._lift, self._forget = map(client.register_script, scripts)

    def close(self) -> None:
        self._client.close()

    def version(self) -> Version:
        """Of what is there now."""
        born, changes = self._ask(lambda: self._client.hmget(self._key, "born", "version"))
        return Version((born or b"").decode(), int(changes or 0))

    def read(self, now: float) -> tuple[Version, list[Ban]]:
        """The bans in force. Those that have ended are forgotten."""
        flat = self._run(self._read, secrets.token_hex(8))
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        version = Version(fields.pop(b"born").decode(), int(fields.pop(b"version", 0)))
        bans = {field: _decoded(text) for field, text in fields.items()}
        ended = [field for field, ban in bans.items() if not ban.holds(now)]
        if ended:
            self._run(self._forget, *(word for field in ended for word in (field, fields[field])))
        return version, [ban for ban in bans.values() if ban.holds(now)]

    def put(self, ban: Ban, *, replace: bool) -> None:
        """See State.put_ban."""
        field = msgspec.json.encode([ban.key, ban.user, ban.kind])
        text = msgspec.json.encode(ban)
        self._run(self._put, secrets.token_hex(8), field, text, int(replace))

    def lift(self, subject: Subject, before: float | None = None) -> list[Ban]:
        """See State.lift. Bans that were made after `before` stay."""
        found = self._run(self._lift, *subject, "" if before is None else repr(before))
        return [_decoded(text) for text in found]

    def _run(self, script: Any, *arguments: bytes | str | int) -> Any:
        return self._ask(lambda: script(keys=[self._key], args=arguments))

    def _ask(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except self._error as error:
            raise BansUnavailable(f"the bans in Redis can't be used ({error})") from error


def _decoded(text: bytes) -> Ban:
    try:
        return msgspec.json.decode(text, type=Ban)
    except msgspec.MsgspecError as error:
        raise BansUnavailable(f"Redis has a ban that can't be read: {error}") from error
